"""How each product runs on a GPU: by the path that a choice names, or by one that is there.

A path takes a choice, x (tokens, in), the operator's tensors, bias, and y (tokens, out), which kernels fill; it returns
the product. Kernels are imported when they are first needed: this module, and ops.py above it, need no Triton.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paredown.kernels import bitmap as bitmaps
from paredown.kernels import lowrank as lowranks
from paredown.kernels import sparse24 as sparse24s
from paredown.kernels.dispatch import Choice

HALVES = (torch.float16, torch.bfloat16)


def on_gpu(x: Tensor, *weights: Tensor) -> bool:
    """Whether kernels run here: 16-bit tensors of one dtype on a GPU, and Triton."""
    return x.is_cuda and x.dtype in HALVES and all(w.dtype == x.dtype for w in weights) and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def sparse24(
    choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor,
    lowrank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """`lowrank`: left factor and partial sums of `x @ right.T`, for the paths that add them to the same sums."""
    from paredown.kernels import sparse24_cusparselt, sparse24_expand, sparse24_mma

    values, indices = tensors
    pairs = lowrank is None or lowrank[0].shape[1] % 2 == 0  # the factor's numbers are loaded two at a time
    if choice.path == "mma" and pairs:
        kernel = sparse24_mma.matmul(x, values, indices, bias, y, lowrank, **choice.tile)
        if _mma_is_sound(kernel):
            return y
    if choice.path in ("mma", "portable"):
        tile = choice.tile if choice.path == "portable" else {}
        sparse24_expand.matmul(x, values, indices, bias, y, lowrank, **tile)
        return y
    if choice.path == "cusparselt" and sparse24_cusparselt.is_available(values):
        return sparse24_cusparselt.matmul(x, values, indices, bias)
    weight = x.new_empty(y.shape[1], x.shape[1])
    sparse24_expand.decompress(values, indices, weight)
    return F.linear(x, weight, bias)


def sparse24_lowrank(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    from paredown.kernels import lowrank_chain

    values, indices, left, right = tensors
    if choice.path in ("mma", "portable"):
        sums = lowrank_chain.partial_sums(x, right)
        return sparse24(choice, x, (values, indices), bias, y, (left, sums))
    return sparse24(choice, x, (values, indices), bias, y) + lowranks.lowrank_matmul(x, left, right)


def bitmap(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    from paredown.kernels import bitmap_expand

    values, bitmap, starts = tensors
    if choice.path == "portable":
        bitmap_expand.matmul(x, values, bitmap, starts, bias, y, **choice.tile)
        return y
    weight = x.new_empty(y.shape[1], x.shape[1])
    bitmap_expand.decompress(values, bitmap, starts, weight)
    return F.linear(x, weight, bias)


def lowrank(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    from paredown.kernels import lowrank_chain

    left, right, ranks, outs = tensors
    if choice.path != "portable":
        return lowranks.grouped_lowrank_matmul(x, left, right, bias, ranks, outs)
    lowrank_chain.lowrank_matmul(x, left, right, bias, y, ranks, outs, **choice.tile)
    return y


def pifa(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    from paredown.kernels import lowrank_chain

    pivots, coefficients, order, ranks, outs = tensors
    if choice.path != "portable":
        return lowranks.grouped_pifa_matmul(x, pivots, coefficients, order, bias, ranks, outs)
    lowrank_chain.pifa_matmul(x, pivots, coefficients, order, bias, y, ranks, outs, **choice.tile)
    return y


def cur(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    from paredown.kernels import lowrank_chain

    columns, link, rows = tensors
    if choice.path != "portable":
        return lowranks.cur_matmul(x, columns, link, rows, bias)
    lowrank_chain.cur_matmul(x, columns, link, rows, bias, y, **choice.tile)
    return y


Path = Callable[..., Tensor]
PATHS: dict[str, Path] = {
    "sparse24": sparse24, "sparse24_lowrank": sparse24_lowrank, "bitmap": bitmap,
    "lowrank": lowrank, "pifa": pifa, "cur": cur,
}  # fmt: skip


def sparse24_dense(values: Tensor, indices: Tensor) -> Tensor:
    """The dense weight (..., out, in), bit for bit, as `unpack24` makes it."""
    if not on_gpu(values):
        return sparse24s.unpack24(values, indices)
    from paredown.kernels import sparse24_expand

    dense = values.new_empty(*values.shape[:-1], 2 * values.shape[-1])
    if dense.numel():
        with torch.cuda.device(values.device):
            sparse24_expand.decompress(values.flatten(0, -2), indices.flatten(0, -2), dense.flatten(0, -2))
    return dense


def bitmap_dense(values: Tensor, bitmap: Tensor, in_features: int) -> Tensor:
    """The dense weight (..., out, in), bit for bit, as `unpack_bitmap` makes it."""
    if not on_gpu(values):
        return bitmaps.unpack_bitmap(values, bitmap, in_features)
    from paredown.kernels import bitmap_expand

    rows, dense = bitmap.flatten(0, -2), values.new_empty(*bitmap.shape[:-1], in_features)
    if dense.numel():
        with torch.cuda.device(values.device):
            bitmap_expand.decompress(values, rows, bitmaps.row_starts(rows), dense.flatten(0, -2))
    return dense


_SOUND: set[str] = set()


def _mma_is_sound(kernel: Any) -> bool:
    """Whether a compiled kernel hands its registers to `mma.sp` as it must: looked at once, before its result is used."""
    if kernel.hash in _SOUND:
        return True
    from paredown.kernels.sparse24_mma import layout_fault

    fault = layout_fault(kernel.asm["ttgir"])
    if fault is None:
        _SOUND.add(kernel.hash)
        return True
    warnings.warn(
        f"this Triton lays registers out differently ({fault}): the portable 2:4 kernel runs instead", stacklevel=2
    )
    return False
