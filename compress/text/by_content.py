"""The cache of `datasets`, by what files hold: by itself it takes a file of the same path and time for the same file."""

import glob
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paredown.compress.errors import PareError


def installed_datasets() -> Any:
    """The package `datasets`. Raises PareError if it is not installed."""
    try:
        import datasets
    except ImportError as fault:
        raise PareError(
            "texts other than stdlib and .txt files are read by the package datasets, which cannot be imported here "
            f"({fault}). Install it with: pip install 'datasets>=4.0'"
        ) from fault
    return datasets


def cache_folder() -> Path:
    """Our own folder in the cache of `datasets`."""
    return Path(installed_datasets().config.HF_DATASETS_CACHE) / "paredown"


def digest_of(files: Iterable[Path]) -> str:
    """One digest of the contents of the files, in this order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def folder_options(folder: str, config: str | None) -> dict[str, Any]:
    """What `load_dataset` takes beside the path of a local folder, which it would glob.

    Raises PareError for a path that is a pattern, because it may stand for other folders.
    """
    path = str(Path(folder).resolve())
    if "::" in path or glob.has_magic(path):
        raise PareError(
            f"{folder} cannot be read: its path holds ::, *, ? or [, by which `datasets` may find another folder. Rename it."
        )
    found = installed_datasets().load_dataset_builder(folder, config).config.data_files or {}
    files = [Path(name) for names in found.values() for name in names]
    return {"cache_dir": str(cache_folder() / digest_of([*files, *Path(folder).glob("README.md")]))}
