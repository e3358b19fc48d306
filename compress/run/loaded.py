"""A written checkpoint as its users load it: by `from_pretrained`, whole or, where memory is short, from the disk."""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.configs import first_line
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.machine import available_memory
from paredown.compress.model.stream import next_token_nll

ROOM = 1.5  # times the bytes of the weights: what loading and one forward pass take


class CannotLoad(Exception):
    """The checkpoint does not load and run as its users would have it: the message says why."""


class NoRoom(Exception):
    """This machine is too small to tell."""


def loaded_losses(source: ModelSource, ids: Tensor, tied: Mapping[str, str]) -> Tensor:  # (1, length - 1)
    """Losses in nats of the tokens ids (1, length) by the model as `from_pretrained` loads it.

    `tied`: the weights that were written as one. Raises CannotLoad or PareError for a fault of the checkpoint, and NoRoom
    if memory and disk are too small.
    """
    whole = sum(entry.bytes for entry in source.files.entries.values())
    free = available_memory()
    if free is None or free >= ROOM * whole:
        return _losses(source, ids, tied, {})
    with tempfile.TemporaryDirectory(prefix="paredown-") as scratch:
        if shutil.disk_usage(scratch).free < whole:  # some weights are written once more, in another layout
            raise NoRoom(f"{whole / 1e9:.1f} GB fit neither into memory nor into {scratch}")
        try:
            return _losses(source, ids, tied, {"device_map": {"": "disk"}, "offload_folder": scratch})
        except CannotLoad as fault:  # it may be that only the way from the disk is closed
            raise NoRoom(str(fault)) from fault


@torch.no_grad()
def _losses(source: ModelSource, ids: Tensor, tied: Mapping[str, str], where: dict[str, Any]) -> Tensor:
    try:
        with _quiet():
            model, told = transformers_plugin.load(source.folder, output_loading_info=True, **where)
        _check(model, told, tied)
        return next_token_nll(model.eval(), ids)
    except CannotLoad:
        raise
    except PareError as fault:
        raise PareError(f"loaded by from_pretrained: {fault}") from fault
    except Exception as fault:  # whatever a model class raises, its user would see
        if isinstance(fault, MemoryError) or "allocate memory" in str(fault):
            raise NoRoom(first_line(fault)) from fault
        raise CannotLoad(f"loaded by from_pretrained it fails: {type(fault).__name__}: {first_line(fault)}") from fault


def _check(model: Any, told: Mapping[str, Any], tied: Mapping[str, str]) -> None:
    for kind in ("missing", "mismatched"):
        if keys := sorted(map(str, told.get(f"{kind}_keys") or ())):
            raise CannotLoad(f"from_pretrained finds {kind} tensors, first {keys[0]!r} ({len(keys)} in all)")
    found = dict(model.all_tied_weights_keys)
    if bool(found) != bool(tied):
        name = next(iter({**found, **tied}))
        how = ("tied", "not tied") if found else ("not tied", "tied")
        raise CannotLoad(f"from_pretrained loads weight {name!r} {how[0]} to another, and it was written {how[1]}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers and accelerate print while a model is loaded."""
    from transformers.utils import logging as theirs

    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    accelerate = logging.getLogger("accelerate")
    before = accelerate.level
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    accelerate.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        accelerate.setLevel(before)
        if bars:
            theirs.enable_progress_bar()
