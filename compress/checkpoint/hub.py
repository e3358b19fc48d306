"""From the name of a model to a folder: a local folder is used as it is, a hub id is fetched into the local cache."""

from pathlib import Path
from typing import Any

from paredown.compress.errors import PareError

# what a model folder holds beside its weights, as far as it is data: no pickles, no python
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "tokenizer*")


def resolve(model: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of `model`, a local folder or a hub id, and its commit (None for a local folder).

    Raises PareError if there is no such folder, and if the hub does not have the model or cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path, None
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise PareError(f"{model}: no such folder. Name a folder with a Hugging Face model, or a hub id like org/name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", *COMPANIONS]))
    except LocalEntryNotFoundError as fault:
        raise PareError(
            f"{model} is not in the local cache, and the hub cannot be reached. Connect, or name a local folder."
        ) from fault
    except (HfHubHTTPError, HFValidationError, OSError) as fault:
        raise PareError(
            f"{model} cannot be fetched from the hub: {str(fault).strip().splitlines()[0]} "
            "Check the name and revision; for gated models log in with: hf auth login"
        ) from fault
    return folder, folder.name


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder. Raises PareError if there is none that transformers can load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise PareError(
            f"{folder} has no tokenizer that transformers can load ({type(fault).__name__}). "
            "Copy tokenizer.json and tokenizer_config.json of the model into it."
        ) from fault
