"""The bundled reference model: a small Llama trained on Python's standard library, for trials without a network."""

from importlib.resources import files
from pathlib import Path

from paredown.compress.errors import PareError

BUNDLED = Path(str(files("paredown.evaluation.reference"))) / "model"


def model_path(folder: Path = BUNDLED) -> Path:
    """The folder of the bundled model in Hugging Face layout. Raises `PareError` where its files were not installed."""
    if not (folder / "model.safetensors").is_file():
        raise PareError(
            f"the bundled reference model is missing: found no model.safetensors in {folder}. "
            "Reinstall paredown with its package data, or train it again: "
            f"python -m paredown.evaluation.reference.train -o {folder}"
        )
    return folder
