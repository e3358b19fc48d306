"""The mask of a packed weight, and which of a dense matrix's numbers it stores."""

import torch
from torch import Tensor

from paredown.compress.storage.kind import Tensors
from paredown.compress.storage.kinds import MASKS

BESIDE = "_lowrank"  # with which the name of a kind ends that adds factors to a mask


def mask_kind(kind: str) -> str | None:
    """The kind of the mask in a kind, which may have factors beside it; None if it has no mask."""
    name = kind.removesuffix(BESIDE)
    return name if name in MASKS else None


def kept_places(kind: str, tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
    """Where the mask of a packed weight keeps a number, bool (..., out, in): also where that number is zero."""
    ones = torch.ones_like(tensors["values"], dtype=torch.float32)
    return MASKS[_mask(kind)].unpack({**tensors, "values": ones}, shape) != 0


def values_at(kind: str, dense: Tensor, keep: Tensor) -> Tensor:
    """The `values` that a kind with a mask stores of a dense matrix (..., out, in); `keep` is as of `kept_places`."""
    return MASKS[_mask(kind)].pack(dense, keep)["values"]


def spread(kind: str, tensors: Tensors, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A dense matrix (..., out, in) with `values` where the mask keeps a number, and zeros elsewhere."""
    return MASKS[_mask(kind)].unpack({**tensors, "values": values}, shape)


def _mask(kind: str) -> str:
    name = mask_kind(kind)
    assert name is not None
    return name
