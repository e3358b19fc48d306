"""Products with packed weights, `x @ weight.T + bias`, as operators for torch.compile and CUDA graphs.

On a GPU that Triton supports, float16 and bfloat16 run in a kernel; the table of the device chooses which one by the
number of tokens. All other tensors, and calls that need gradients, run in the reference functions in plain torch.
Shapes: x (..., in), bias (out,), results (..., out); packed tensors as in sparse24.py, bitmap.py and lowrank.py.
Every function raises ValueError if sizes do not fit each other.

Linears that share an input (q, k and v; gate and up) are one product: their packed rows follow one another. In low-rank
forms, `right` and `pivots` are (sum of ranks, in), `left` and `coefficients` are flat, one linear after the other, and
the lists `ranks` and `outs` give the sizes of each linear. A single linear needs neither list.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paredown.kernels import bitmap as bitmaps
from paredown.kernels import expand, paths
from paredown.kernels import lowrank as lowranks
from paredown.kernels import sparse24 as sparse24s
from paredown.kernels.dispatch import choose
from paredown.kernels.paths import kernels_run

Sizes = list[int] | None


class _Operator:
    """A function that is an operator of torch's where torch compiles. Elsewhere it is called as it is: a call through torch's
    registry takes as long as reading a megabyte of weights.
    """

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._traced = torch.library.custom_op(f"paredown::{name}", function, mutates_args=())
        self.register_fake = self._traced.register_fake

    def __call__(self, *arguments: Any) -> Tensor:
        product: Tensor = (self._traced if torch.compiler.is_compiling() else self._function)(*arguments)
        return product


@partial(_Operator, "sparse24_matmul")
def _sparse24_matmul(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = values.shape[0], 2 * values.shape[1]
    _expect(x, columns, indices.shape == (rows, sparse24s.index_bytes(columns)), "indices", indices, bias, rows)
    if not kernels_run(x, values):
        return sparse24s.sparse24_matmul(x, values, indices, bias)
    return _launch(paths.sparse24, "sparse24", x, (values, indices), bias, rows)


@partial(_Operator, "sparse24_lowrank_matmul")
def _sparse24_lowrank_matmul(
    x: Tensor, values: Tensor, indices: Tensor, left: Tensor, right: Tensor, bias: Tensor | None
) -> Tensor:
    rows, columns = values.shape[0], 2 * values.shape[1]
    _expect(x, columns, indices.shape == (rows, sparse24s.index_bytes(columns)), "indices", indices, bias, rows)
    _expect(x, right.shape[1], left.shape == (rows, right.shape[0]), "left", left, bias, rows)
    if not kernels_run(x, values, left, right):
        return sparse24s.sparse24_matmul(x, values, indices, bias) + lowranks.lowrank_matmul(x, left, right)
    return _launch(paths.sparse24_lowrank, "sparse24_lowrank", x, (values, indices, left, right), bias, rows)


@partial(_Operator, "bitmap_matmul")
def _bitmap_matmul(x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor | None, bias: Tensor | None) -> Tensor:
    rows, columns = bitmap.shape[0], x.shape[-1]
    _expect(x, columns, bitmap.shape[1] == -(-columns // 8), "bitmap", bitmap, bias, rows)
    if not kernels_run(x, values):
        return bitmaps.bitmap_matmul(x, values, bitmap, bias)
    starts = bitmaps.row_starts(bitmap) if starts is None else starts
    return _launch(paths.bitmap, "bitmap", x, (values, bitmap, starts), bias, rows)


@partial(_Operator, "lowrank_matmul")
def _lowrank_matmul(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, ranks: list[int], outs: list[int]
) -> Tensor:
    sizes = sum(out * rank for out, rank in zip(outs, ranks, strict=True))
    fits = left.numel() == sizes and right.shape[0] == sum(ranks)
    _expect(x, right.shape[1], fits, "left", left, bias, sum(outs))
    if not kernels_run(x, left, right):
        return lowranks.grouped_lowrank_matmul(x, left, right, bias, ranks, outs)
    return _launch(paths.lowrank, "lowrank", x, (left, right, ranks, outs), bias, sum(outs))


@partial(_Operator, "pifa_matmul")
def _pifa_matmul(
    x: Tensor,
    pivots: Tensor,
    coefficients: Tensor,
    order: Tensor,
    bias: Tensor | None,
    ranks: list[int],
    outs: list[int],
) -> Tensor:
    sizes = sum((out - rank) * rank for out, rank in zip(outs, ranks, strict=True))
    fits = coefficients.numel() == sizes and pivots.shape[0] == sum(ranks) and len(order) == sum(outs)
    _expect(x, pivots.shape[1], fits, "coefficients", coefficients, bias, sum(outs))
    if not kernels_run(x, pivots, coefficients):
        return lowranks.grouped_pifa_matmul(x, pivots, coefficients, order, bias, ranks, outs)
    return _launch(paths.pifa, "pifa", x, (pivots, coefficients, order, ranks, outs), bias, sum(outs))


@partial(_Operator, "cur_matmul")
def _cur_matmul(x: Tensor, columns: Tensor, link: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    fits = link.shape == (columns.shape[1], rows.shape[0])
    _expect(x, rows.shape[1], fits, "link", link, bias, columns.shape[0])
    if not kernels_run(x, columns, link, rows):
        return lowranks.cur_matmul(x, columns, link, rows, bias)
    return _launch(paths.cur, "cur", x, (columns, link, rows), bias, columns.shape[0])


@_sparse24_matmul.register_fake
def _(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


@_sparse24_lowrank_matmul.register_fake
def _(x: Tensor, values: Tensor, indices: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


@_bitmap_matmul.register_fake
def _(x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], bitmap.shape[0])


@_lowrank_matmul.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, ranks: list[int], outs: list[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(outs))


@_pifa_matmul.register_fake
def _(
    x: Tensor,
    pivots: Tensor,
    coefficients: Tensor,
    order: Tensor,
    bias: Tensor | None,
    ranks: list[int],
    outs: list[int],
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(outs))


@_cur_matmul.register_fake
def _(x: Tensor, columns: Tensor, link: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns.shape[0])


def sparse24_matmul(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 2:4 weight: values (out, in / 2), indices (out, index_bytes(in)) uint8."""
    if _wants_gradients(x, values, bias):
        return F.linear(x, expand.sparse24_dense(values, indices), bias)
    product: Tensor = _sparse24_matmul(x, values, indices, bias)
    return product


def sparse24_lowrank_matmul(
    x: Tensor, values: Tensor, indices: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None
) -> Tensor:
    """As `sparse24_matmul`, with left (out, k) @ right (k, in) added to the weight. `x @ right.T` is rounded to the dtype
    of x before it is multiplied by `left`."""
    if _wants_gradients(x, values, left, right, bias):
        sparse = F.linear(x, expand.sparse24_dense(values, indices), bias)
        return sparse + lowranks.lowrank_matmul(x, left, right)
    product: Tensor = _sparse24_lowrank_matmul(x, values, indices, left, right, bias)
    return product


def bitmap_matmul(
    x: Tensor, values: Tensor, bitmap: Tensor, bias: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """A bitmap weight: values (kept,), bitmap (out, ceil(in / 8)) uint8.

    starts (out + 1,) int32: the result of `row_starts(bitmap)`, which a kernel call computes itself if it is None.
    """
    if _wants_gradients(x, values, bias):
        return F.linear(x, expand.bitmap_dense(values, bitmap, x.shape[-1]), bias)
    product: Tensor = _bitmap_matmul(x, values, bitmap, starts, bias)
    return product


def lowrank_matmul(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None, ranks: Sizes = None, outs: Sizes = None
) -> Tensor:
    """Two factors: left (out, k) and right (k, in), or those of several linears (see the top of this module)."""
    if ranks is None or outs is None:
        ranks, outs = [right.shape[0]], [left.shape[0]]
    if _wants_gradients(x, left, right, bias):
        return lowranks.grouped_lowrank_matmul(x, left, right, bias, ranks, outs)
    product: Tensor = _lowrank_matmul(x, left, right, bias, ranks, outs)
    return product


def pifa_matmul(
    x: Tensor, pivots: Tensor, coefficients: Tensor, order: Tensor, bias: Tensor | None = None,
    ranks: Sizes = None, outs: Sizes = None,
) -> Tensor:  # fmt: skip
    """PIFA: pivots (k, in), coefficients (out - k, k), order (out,) int32, or those of several linears (see the top of
    this module); the order of each linear counts its own rows only."""
    if ranks is None or outs is None:
        ranks, outs = [pivots.shape[0]], [order.shape[0]]
    if _wants_gradients(x, pivots, coefficients, bias):
        return lowranks.grouped_pifa_matmul(x, pivots, coefficients, order, bias, ranks, outs)
    product: Tensor = _pifa_matmul(x, pivots, coefficients, order, bias, ranks, outs)
    return product


def cur_matmul(x: Tensor, columns: Tensor, link: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """CUR: columns (out, c), link (c, r), rows (r, in)."""
    if _wants_gradients(x, columns, link, rows, bias):
        return lowranks.cur_matmul(x, columns, link, rows, bias)
    product: Tensor = _cur_matmul(x, columns, link, rows, bias)
    return product


def _launch(path: paths.Path, op: str, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, rows: int) -> Tensor:
    """Run `path` with the choice of the table. x becomes an aligned, contiguous matrix (tokens, in)."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    # kernels expect each row right behind the one before it: a slice of a wider tensor is copied
    tensors = [t.contiguous() if isinstance(t, Tensor) else t for t in tensors]
    bias = None if bias is None else bias.contiguous()
    if flat.data_ptr() % 16:
        flat = flat.clone()
    y = flat.new_empty(len(flat), rows)
    if y.numel():
        with torch.cuda.device_of(x):
            y = path(choose(op, x.device, len(flat), rows, x.shape[-1]), flat, tensors, bias, y)
    return y.view(*x.shape[:-1], rows)


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _expect(x: Tensor, columns: int, fits: bool, name: str, tensor: Tensor, bias: Tensor | None, rows: int) -> None:
    if x.shape[-1] != columns:
        raise ValueError(f"x {tuple(x.shape)} has {x.shape[-1]} features, and the weight takes {columns}")
    if not fits:
        raise ValueError(f"{name} {tuple(tensor.shape)} does not belong to a weight ({rows}, {columns})")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias {tuple(bias.shape)} does not belong to {rows} outputs")
