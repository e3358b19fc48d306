"""The bundled reference model: small, trained on the standard library's training split, for trials without a network."""

from importlib.resources import files
from pathlib import Path

from paredown.compress.errors import PareError


def model_path() -> Path:
    """The folder of the bundled model in Hugging Face layout. Raises `PareError` where the files were not installed."""
    folder = Path(str(files("paredown.evaluation.reference"))) / "model"
    if not (folder / "model.safetensors").is_file():
        raise PareError(
            f"the bundled reference model is missing: found no model.safetensors in {folder}. "
            "Reinstall paredown with its package data, or train it again: "
            f"python -m paredown.evaluation.reference.train -o {folder}"
        )
    return folder
