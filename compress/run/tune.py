"""`paredown tune`: a measured dispatch table of this GPU for the products of packed checkpoints."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from paredown.compress.checkpoint.source import load_config, stored_dtype
from paredown.compress.checkpoint.tensor_files import TensorFiles
from paredown.compress.checkpoint.transformers_plugin import packed_modules
from paredown.compress.errors import PareError
from paredown.compress.machine import pick_device
from paredown.compress.storage.fuse import products
from paredown.kernels.dispatch import DispatchTable, cache_file, forget
from paredown.kernels.tuning import Product
from paredown.kernels.tuning import tune as measure


def tune(
    folders: Sequence[Path], device: str, progress: Callable[[int, int], None]
) -> tuple[DispatchTable, Path]:  # fmt: skip
    """The table, and where it was written. What an older table of this GPU knows of other sizes is kept.

    Raises PareError without a GPU, or if a folder holds no packed weights.
    """
    wanted = {one for folder in folders for one in _products(folder)}
    place = pick_device(device)
    if place.type != "cuda":
        raise PareError(
            "tuning measures kernels on a GPU, and this machine has none. Until then the shipped tables serve; "
            "what kernels compile to is told by: python -m paredown.kernels.aot"
        )
    table = measure(wanted, place, _dtype(folders[0]), progress=progress)
    file = cache_file(table.device)
    if file.exists():
        table = table.over(DispatchTable.read(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(table.to_json())
    partial.rename(file)
    forget()
    return table, file


def _products(folder: Path) -> set[Product]:
    if not (folder / "config.json").exists():
        raise PareError(
            f"{folder} is no checkpoint: it has no config.json. Name the folder that paredown compress wrote."
        )
    found = products(packed_modules(load_config(folder)))
    if not found:
        raise PareError(
            f"{folder} holds no packed linear layers: there is nothing to tune. Dense layers go through torch."
        )
    return found


def _dtype(folder: Path) -> torch.dtype:
    stored = stored_dtype(load_config(folder), TensorFiles(folder).entries)
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
