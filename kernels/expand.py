"""Dense weights of masked ones, as operators with a true gradient: what a kept value gets is the dense weight's gradient
in its place. torch.compile and torch.export see one step whose shape is known.

Shapes as in sparse24.py and bitmap.py. A weight that is not kept has no gradient, so that training keeps the mask.
"""

from typing import Any

import torch
from torch import Tensor

from paredown.kernels import bitmap as bitmaps
from paredown.kernels import paths
from paredown.kernels import sparse24 as sparse24s


@torch.library.custom_op("paredown::sparse24_dense", mutates_args=())
def _sparse24_dense(values: Tensor, indices: Tensor) -> Tensor:
    return paths.sparse24_dense(values, indices)


@torch.library.custom_op("paredown::sparse24_kept", mutates_args=())
def _sparse24_kept(dense: Tensor, indices: Tensor) -> Tensor:
    return sparse24s.kept24(dense, indices)


@torch.library.custom_op("paredown::bitmap_dense", mutates_args=())
def _bitmap_dense(values: Tensor, bitmap: Tensor, in_features: int) -> Tensor:
    return paths.bitmap_dense(values, bitmap, in_features)


@torch.library.custom_op("paredown::bitmap_kept", mutates_args=())
def _bitmap_kept(dense: Tensor, bitmap: Tensor, kept: int) -> Tensor:
    return bitmaps.kept_values(dense, bitmap)


@_sparse24_dense.register_fake
def _(values: Tensor, indices: Tensor) -> Tensor:
    return values.new_empty(*values.shape[:-1], 2 * values.shape[-1])


@_sparse24_kept.register_fake
def _(dense: Tensor, indices: Tensor) -> Tensor:
    return dense.new_empty(*dense.shape[:-1], dense.shape[-1] // 2)


@_bitmap_dense.register_fake
def _(values: Tensor, bitmap: Tensor, in_features: int) -> Tensor:
    return values.new_empty(*bitmap.shape[:-1], in_features)


@_bitmap_kept.register_fake
def _(dense: Tensor, bitmap: Tensor, kept: int) -> Tensor:
    return dense.new_empty(kept)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, index = inputs[:2]
    ctx.save_for_backward(index)
    ctx.kept = values.numel()


def _sparse24_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    return _sparse24_kept(grad, indices), None


def _bitmap_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (bitmap,) = ctx.saved_tensors
    return _bitmap_kept(grad, bitmap, ctx.kept), None, None


_sparse24_dense.register_autograd(_sparse24_backward, setup_context=_remember)
_bitmap_dense.register_autograd(_bitmap_backward, setup_context=_remember)


def sparse24_dense(values: Tensor, indices: Tensor) -> Tensor:
    """The dense weight (..., out, in) of `pack24`'s values (..., out, in / 2) and indices."""
    dense: Tensor = _sparse24_dense(values, indices)
    return dense


def bitmap_dense(values: Tensor, bitmap: Tensor, in_features: int) -> Tensor:
    """The dense weight (..., out, in) of `pack_bitmap`'s values (kept,) and bitmap (..., out, ceil(in / 8))."""
    dense: Tensor = _bitmap_dense(values, bitmap, in_features)
    return dense
