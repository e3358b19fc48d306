"""`paredown tune`: a measured dispatch table of this GPU for the products of packed checkpoints."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from paredown.compress.checkpoint.configs import load_config, stored_dtype
from paredown.compress.checkpoint.tensor_files import TensorFiles
from paredown.compress.checkpoint.transformers_plugin import packed_modules
from paredown.compress.errors import PareError
from paredown.compress.machine import pick_device
from paredown.compress.storage.fuse import products
from paredown.kernels import tuning
from paredown.kernels.dispatch import DispatchTable, cache_file, forget
from paredown.kernels.tuning import Product


class Measure(Protocol):
    """Times every kernel for some products on a device; `progress` is called with (steps done, steps)."""

    def __call__(
        self,
        products: set[Product],
        device: torch.device,
        dtype: torch.dtype,
        /,
        *,
        progress: Callable[[int, int], None],
    ) -> DispatchTable: ...


def tune(
    folders: Sequence[Path],
    device: str | torch.device = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
    measure: Measure = tuning.tune,
) -> tuple[DispatchTable, Path]:
    """Measure a table for the products of these checkpoints and write it to the user's cache; returns it and its file.

    An older table of the same GPU keeps its choices for other sizes. `progress` is called with (steps done, steps).
    Raises PareError without a GPU, or if a folder holds no packed weights.
    """
    wanted = {product for folder in folders for product in _products(folder)}
    place = pick_device(device) if isinstance(device, str) else device
    if place.type != "cuda":
        raise PareError(
            "tuning measures kernels on a GPU, and this machine has none. Until then the shipped tables serve; "
            "see what the kernels compile to with: python -m paredown.kernels.aot"
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
    """What the packed linear layers of a checkpoint multiply with."""
    if not (folder / "config.json").exists():
        raise PareError(
            f"{folder} is no checkpoint: it has no config.json. Name the folder that paredown compress wrote."
        )
    used = products(packed_modules(load_config(folder)))
    if not used:
        raise PareError(
            f"{folder} holds no packed linear layers: there is nothing to tune. Dense layers go through torch."
        )
    return used


def _dtype(folder: Path) -> torch.dtype:
    """Of a checkpoint's weights, or bfloat16 where the kernels have no table for it."""
    stored = stored_dtype(load_config(folder), TensorFiles(folder).entries)
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
