"""From what the user typed to a local folder: a folder stays itself, a hub id is fetched into the local cache."""

from pathlib import Path
from typing import Any

from paredown.compress.errors import PareError

FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "tokenizer*"]  # never pickles, never python


def resolve(model: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of `model`, and the commit it is at (None for a local folder).

    Raises PareError if neither a folder nor a hub model of this name can be had.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path, None
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise PareError(f"{model}: no such folder. Name a folder with a Hugging Face model, or a hub id like org/name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=FETCHED))
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
    """The model's own tokenizer. Raises PareError if the folder has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise PareError(
            f"{folder} has no tokenizer that transformers can load ({type(fault).__name__}). "
            "Copy tokenizer.json and tokenizer_config.json of the model into it."
        ) from fault
