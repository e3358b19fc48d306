"""From the name of a model to a folder: a local folder is used as it is, a hub id is fetched into the local cache."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from paredown.compress.checkpoint.companions import COMPANIONS, SUFFIXES
from paredown.compress.errors import PareError

# of a repository; the card says the licence. The hub's patterns also match / : folders are other forms of the model, but
# for that of chat templates; consolidated files are the same weights once more
FETCHED = ("*.safetensors", "README.md", *COMPANIONS)
NOT_FETCHED = (*(f"*/{suffix}" for suffix in ("*.safetensors", *SUFFIXES) if suffix != "*.jinja"), "consolidated*")
# any of which holds a vocabulary
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def local(model: str) -> Path | None:
    """The folder of that name; None for a hub id. Raises PareError for what is neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise PareError(f"{model}: no such folder. Name a folder with a Hugging Face model, or a hub id like org/name.")
    return None


def resolve(model: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of `model`, a local folder or a hub id, and its commit (None for a local folder).

    Raises PareError if there is no such folder, and if the hub does not have the model or cannot be reached.
    """
    if (path := local(model)) is not None:
        return path, None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = {"allow_patterns": list(FETCHED), "ignore_patterns": list(NOT_FETCHED)}
        folder = Path(snapshot_download(model, revision=revision, **patterns))
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
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as fault:  # the tokenizers library raises plain exceptions, and panics that are none
        raise _no_tokenizer(folder, fault) from fault


def _no_tokenizer(folder: Path, fault: BaseException) -> PareError:
    """What to do about a tokenizer that cannot be loaded: the file is missing, damaged, or of a newer library."""
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        return PareError(
            f"{folder} has no tokenizer that transformers can load ({type(fault).__name__}). "
            "Copy tokenizer.json and tokenizer_config.json of the model into it."
        )
    reason = " ".join(str(fault).split()).rstrip(".") or type(fault).__name__
    versions = f"tokenizers {version('tokenizers')} and transformers {version('transformers')}"
    return PareError(
        f"the tokenizer in {folder} ({', '.join(found)}) cannot be loaded by {versions}: {reason[:300]}. The files are "
        "damaged or of a newer version: fetch them again, or pip install -U tokenizers transformers."
    )
