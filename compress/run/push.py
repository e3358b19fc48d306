"""A finished checkpoint goes to the Hugging Face Hub, by the token of `hf auth login` or HF_TOKEN."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from paredown.compress.errors import PareError
from paredown.evaluation.card import CARD, named


def check_push(repository: str) -> None:
    """Raise PareError, before any work is done, if the name is none or the token may not write there."""
    owner, slash, _ = repository.partition("/")
    try:
        validate_repo_id(repository)
    except HFValidationError as fault:
        raise PareError(f"--push {repository}: {fault}") from fault
    if not slash:
        raise PareError(f"--push {repository}: wanted ORG/NAME, or USER/NAME.")
    try:
        who = HfApi().whoami()
    except LocalTokenNotFoundError as fault:
        raise PareError("--push needs a token of the Hub. Log in with: hf auth login, or set HF_TOKEN.") from fault
    except HfHubHTTPError as fault:
        raise PareError(f"the Hub does not accept the token: {_line(fault)} Log in with: hf auth login") from fault
    except (HTTPError, OSError) as fault:  # no network, or HF_HUB_OFFLINE
        raise PareError(f"the Hub cannot be reached ({_line(fault)}). Leave out --push, or connect.") from fault
    names = [who["name"], *(org["name"] for org in who.get("orgs", []))]
    if owner not in names:
        raise PareError(f"--push {repository}: the token is of {who['name']}, who may write to {', '.join(names)}.")
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PareError("the token of the Hub only reads. Make one that writes, and log in with: hf auth login")


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a checkpoint, with a card whose example names the repository, and return its address.

    A repository that is there gets a new commit. Raises PareError if that fails; the folder is whole then.
    """
    card = folder / CARD
    if card.is_file():
        card.write_text(named(card.read_text(encoding="utf-8"), repository), encoding="utf-8", newline="\n")
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by paredown")
    except (HTTPError, OSError) as fault:
        raise PareError(
            f"{folder} is whole, and could not be uploaded: {_line(fault)} Try again with: hf upload {repository} {folder}"
        ) from fault
    return str(url)


def _line(fault: Exception) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0]
