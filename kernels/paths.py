"""How each product runs on a GPU: one function per operator, which follows the path that a choice names.

If that path cannot run here, the function takes another one that can. Arguments: the choice, x (tokens, in), the tensors
of the operator, bias (out,) or None, and y (tokens, out), which the kernels fill. It returns the product (tokens, out).
The kernels are imported when they are first needed, so this module and ops.py also work without Triton.
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
from paredown.kernels.dispatch import Choice, table_in_use

HALVES = (torch.float16, torch.bfloat16)


def kernels_run(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels take these tensors: x on a GPU, all of one 16-bit dtype, and Triton is installed.

    Inside `dispatch.using(table)` they take CPU tensors as well, if Triton interprets its kernels.
    """
    if not x.is_cuda and table_in_use() is None:
        return False
    if x.dtype not in HALVES or any(w.dtype != x.dtype for w in weights) or not _has_triton():
        return False
    return x.is_cuda or (x.is_cpu and _interpreted())


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    from paredown.kernels.primitives import INTERPRETED

    return INTERPRETED


def sparse24(
    choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor,
    lowrank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """A 2:4 weight: tensors are values (out, in / 2) and indices (out, index_bytes(in)).

    `lowrank`: left (out, rank) and the float32 partial sums of `x @ right.T` (splits, tokens, rank). Only for the paths
    "mma" and "portable", which add that product to their own sums.
    """
    from paredown.kernels import sparse24_cusparselt, sparse24_expand, sparse24_mma

    values, indices = tensors
    even_rank = lowrank is None or lowrank[0].shape[1] % 2 == 0  # the kernel loads two numbers of `left` at a time
    if choice.path == "mma" and even_rank:
        kernel = sparse24_mma.matmul(x, values, indices, bias, y, lowrank, **choice.tile)
        if mma_layout_is_right(kernel):
            return y
    if choice.path in ("mma", "portable"):
        tile = choice.tile if choice.path == "portable" else {}
        sparse24_expand.matmul(x, values, indices, bias, y, lowrank, **tile)
        return y
    if choice.path == "cusparselt" and sparse24_cusparselt.is_available(values):
        return sparse24_cusparselt.matmul(x, values, indices, bias, choice.tile)
    weight = x.new_empty(y.shape[1], x.shape[1])
    sparse24_expand.decompress(values, indices, weight)
    return F.linear(x, weight, bias)


def sparse24_lowrank(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    """A 2:4 weight plus left (out, k) @ right (k, in): tensors are values, indices, left and right."""
    from paredown.kernels import lowrank_chain

    values, indices, left, right = tensors
    if choice.path in ("mma", "portable"):
        sums = lowrank_chain.partial_sums(x, right)
        return sparse24(choice, x, (values, indices), bias, y, (left, sums))
    return sparse24(choice, x, (values, indices), bias, y) + lowranks.lowrank_matmul(x, left, right)


def bitmap(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    """A bitmap weight: tensors are values (kept,), bitmap (out, ceil(in / 8)) and starts (out + 1,) of `row_starts`."""
    from paredown.kernels import bitmap_expand

    values, bitmap, starts = tensors
    if choice.path == "portable":
        bitmap_expand.matmul(x, values, bitmap, starts, bias, y, **choice.tile)
        return y
    weight = x.new_empty(y.shape[1], x.shape[1])
    bitmap_expand.decompress(values, bitmap, starts, weight)
    return F.linear(x, weight, bias)


def lowrank(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    """Two factors, of one linear or several: tensors are left, right, ranks and outs, as in `grouped_lowrank_matmul`."""
    from paredown.kernels import lowrank_chain

    left, right, ranks, outs = tensors
    if choice.path != "portable":
        return lowranks.grouped_lowrank_matmul(x, left, right, bias, ranks, outs)
    lowrank_chain.lowrank_matmul(x, left, right, bias, y, ranks, outs, **choice.tile)
    return y


def pifa(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    """PIFA, of one linear or several: tensors are pivots, coefficients, order, ranks and outs, as in
    `grouped_pifa_matmul`."""
    from paredown.kernels import lowrank_chain

    pivots, coefficients, order, ranks, outs = tensors
    if choice.path != "portable":
        return lowranks.grouped_pifa_matmul(x, pivots, coefficients, order, bias, ranks, outs)
    lowrank_chain.pifa_matmul(x, pivots, coefficients, order, bias, y, ranks, outs, **choice.tile)
    return y


def cur(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    """CUR: tensors are columns (out, c), link (c, r) and rows (r, in)."""
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
    """The dense weight (..., out, in), bit for bit that of `unpack24`; written by a kernel where kernels run."""
    if not kernels_run(values):
        return sparse24s.unpack24(values, indices)
    from paredown.kernels import sparse24_expand

    dense = values.new_empty(*values.shape[:-1], 2 * values.shape[-1])
    if dense.numel():
        with torch.cuda.device_of(values):
            sparse24_expand.decompress(values.flatten(0, -2), indices.flatten(0, -2), dense.flatten(0, -2))
    return dense


def bitmap_dense(values: Tensor, bitmap: Tensor, in_features: int) -> Tensor:
    """The dense weight (..., out, in), bit for bit that of `unpack_bitmap`; written by a kernel where kernels run."""
    if not kernels_run(values):
        return bitmaps.unpack_bitmap(values, bitmap, in_features)
    from paredown.kernels import bitmap_expand

    rows, dense = bitmap.flatten(0, -2), values.new_empty(*bitmap.shape[:-1], in_features)
    if dense.numel():
        with torch.cuda.device_of(values):
            bitmap_expand.decompress(values, rows, bitmaps.row_starts(rows), dense.flatten(0, -2))
    return dense


_RIGHT_LAYOUTS: set[str] = set()  # hashes of the kernels that were checked


def mma_layout_is_right(kernel: Any) -> bool:
    """Whether a compiled kernel passes its registers to `mma.sp` as the instruction needs them; if not, it warns.

    kernel: what the launch returned. None, which Triton's interpreter returns, has no registers and passes. A kernel is
    checked once, before its first result is used.
    """
    if kernel is None or kernel.hash in _RIGHT_LAYOUTS:
        return True
    from paredown.kernels.sparse24_mma import layout_fault

    fault = layout_fault(kernel.asm["ttgir"])
    if fault is None:
        _RIGHT_LAYOUTS.add(kernel.hash)
        return True
    warnings.warn(
        f"this Triton lays registers out differently ({fault}): the portable 2:4 kernel runs instead", stacklevel=2
    )
    return False
