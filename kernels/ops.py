"""Products with packed weights: `x @ weight.T + bias`, as operators that torch.compile and CUDA graphs can hold.

On a GPU that Triton knows, float16 and bfloat16 go through a kernel that the device's table chooses by the number of
tokens; everything else, and whatever asks for gradients, through the reference in plain torch. Shapes: x (..., in),
bias (out,), results (..., out); packed tensors as in sparse24.py, bitmap.py and lowrank.py.

Linears that share an input are one product (q, k, v; gate, up): their packed rows one after another. Factors of several
linears: `right` or `pivots` (sum of ranks, in), `left` or `coefficients` flat, one linear after another, and `ranks` and
`outs` tell their sizes; a single linear needs neither.
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
from paredown.kernels.dispatch import Choice, choose

Sizes = list[int] | None
HALVES = (torch.float16, torch.bfloat16)


@torch.library.custom_op("paredown::sparse24_matmul", mutates_args=())
def _sparse24_matmul(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = values.shape[0], 2 * values.shape[1]
    _expect(x, columns, indices.shape == (rows, sparse24s.index_bytes(columns)), "indices", indices, bias, rows)
    if not _on_gpu(x, values):
        return sparse24s.sparse24_matmul(x, values, indices, bias)
    return _launch(sparse24_path, "sparse24", x, (values, indices), bias, rows)


@torch.library.custom_op("paredown::sparse24_lowrank_matmul", mutates_args=())
def _sparse24_lowrank_matmul(
    x: Tensor, values: Tensor, indices: Tensor, left: Tensor, right: Tensor, bias: Tensor | None
) -> Tensor:
    rows, columns = values.shape[0], 2 * values.shape[1]
    _expect(x, columns, indices.shape == (rows, sparse24s.index_bytes(columns)), "indices", indices, bias, rows)
    _expect(x, right.shape[1], left.shape == (rows, right.shape[0]), "left", left, bias, rows)
    if not _on_gpu(x, values, left, right):
        return sparse24s.sparse24_matmul(x, values, indices, bias) + lowranks.lowrank_matmul(x, left, right)
    return _launch(sparse24_lowrank_path, "sparse24_lowrank", x, (values, indices, left, right), bias, rows)


@torch.library.custom_op("paredown::bitmap_matmul", mutates_args=())
def _bitmap_matmul(x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor | None, bias: Tensor | None) -> Tensor:
    rows, columns = bitmap.shape[0], x.shape[-1]
    _expect(x, columns, bitmap.shape[1] == -(-columns // 8), "bitmap", bitmap, bias, rows)
    if not _on_gpu(x, values):
        return bitmaps.bitmap_matmul(x, values, bitmap, bias)
    begins = bitmaps.row_starts(bitmap) if starts is None else starts
    return _launch(bitmap_path, "bitmap", x, (values, bitmap, begins), bias, rows)


@torch.library.custom_op("paredown::lowrank_matmul", mutates_args=())
def _lowrank_matmul(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, ranks: list[int], outs: list[int]
) -> Tensor:
    sizes = sum(out * rank for out, rank in zip(outs, ranks, strict=True))
    fits = left.numel() == sizes and right.shape[0] == sum(ranks)
    _expect(x, right.shape[1], fits, "left", left, bias, sum(outs))
    if not _on_gpu(x, left, right):
        return lowranks.grouped_lowrank_matmul(x, left, right, bias, ranks, outs)
    return _launch(lowrank_path, "lowrank", x, (left, right, ranks, outs), bias, sum(outs))


@torch.library.custom_op("paredown::pifa_matmul", mutates_args=())
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
    if not _on_gpu(x, pivots, coefficients):
        return lowranks.grouped_pifa_matmul(x, pivots, coefficients, order, bias, ranks, outs)
    return _launch(pifa_path, "pifa", x, (pivots, coefficients, order, ranks, outs), bias, sum(outs))


@torch.library.custom_op("paredown::cur_matmul", mutates_args=())
def _cur_matmul(x: Tensor, columns: Tensor, link: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    fits = link.shape == (columns.shape[1], rows.shape[0])
    _expect(x, rows.shape[1], fits, "link", link, bias, columns.shape[0])
    if not _on_gpu(x, columns, link, rows):
        return lowranks.cur_matmul(x, columns, link, rows, bias)
    return _launch(cur_path, "cur", x, (columns, link, rows), bias, columns.shape[0])


# On a GPU: x (tokens, in), the tensors of the operator, and y (tokens, out) to fill where a kernel does. What a choice
# does not name, a path that is not there, falls through to one that is.


def sparse24_path(
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
    if choice.path == "cusparselt" and sparse24_cusparselt.is_available(y.shape[1], x.shape[1]):
        return sparse24_cusparselt.matmul(x, values, indices, bias)
    weight = x.new_empty(y.shape[1], x.shape[1])
    sparse24_expand.decompress(values, indices, weight)
    return F.linear(x, weight, bias)


def sparse24_lowrank_path(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    from paredown.kernels import lowrank_chain

    values, indices, left, right = tensors
    if choice.path in ("mma", "portable"):
        sums = lowrank_chain.partial_sums(x, right)
        return sparse24_path(choice, x, (values, indices), bias, y, (left, sums))
    return sparse24_path(choice, x, (values, indices), bias, y) + lowranks.lowrank_matmul(x, left, right)


def bitmap_path(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    from paredown.kernels import bitmap_expand

    values, bitmap, starts = tensors
    if choice.path == "portable":
        bitmap_expand.matmul(x, values, bitmap, starts, bias, y, **choice.tile)
        return y
    weight = x.new_empty(y.shape[1], x.shape[1])
    bitmap_expand.decompress(values, bitmap, starts, weight)
    return F.linear(x, weight, bias)


def lowrank_path(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    from paredown.kernels import lowrank_chain

    left, right, ranks, outs = tensors
    if choice.path != "portable":
        return lowranks.grouped_lowrank_matmul(x, left, right, bias, ranks, outs)
    lowrank_chain.lowrank_matmul(x, left, right, bias, y, ranks, outs, **choice.tile)
    return y


def pifa_path(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    from paredown.kernels import lowrank_chain

    pivots, coefficients, order, ranks, outs = tensors
    if choice.path != "portable":
        return lowranks.grouped_pifa_matmul(x, pivots, coefficients, order, bias, ranks, outs)
    lowrank_chain.pifa_matmul(x, pivots, coefficients, order, bias, y, ranks, outs, **choice.tile)
    return y


def cur_path(choice: Choice, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, y: Tensor) -> Tensor:
    from paredown.kernels import lowrank_chain

    columns, link, rows = tensors
    if choice.path != "portable":
        return lowranks.cur_matmul(x, columns, link, rows, bias)
    lowrank_chain.cur_matmul(x, columns, link, rows, bias, y, **choice.tile)
    return y


Path = Callable[..., Tensor]
PATHS: dict[str, Path] = {
    "sparse24": sparse24_path, "sparse24_lowrank": sparse24_lowrank_path, "bitmap": bitmap_path,
    "lowrank": lowrank_path, "pifa": pifa_path, "cur": cur_path,
}  # fmt: skip


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
    """values (out, in / 2), indices (out, index_bytes(in)) uint8. Raises ValueError where sizes do not fit, as all do."""
    if _wants_gradients(x, values, bias):
        return sparse24s.sparse24_matmul(x, values, indices, bias)
    product: Tensor = _sparse24_matmul(x, values, indices, bias)
    return product


def sparse24_lowrank_matmul(
    x: Tensor, values: Tensor, indices: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None
) -> Tensor:
    """As `sparse24_matmul`, with left (out, k) @ right (k, in) added to the weight; k's products are rounded once."""
    if _wants_gradients(x, values, left, right, bias):
        return sparse24s.sparse24_matmul(x, values, indices, bias) + lowranks.lowrank_matmul(x, left, right)
    product: Tensor = _sparse24_lowrank_matmul(x, values, indices, left, right, bias)
    return product


def bitmap_matmul(
    x: Tensor, values: Tensor, bitmap: Tensor, bias: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """values (kept,), bitmap (out, ceil(in / 8)) uint8, starts (out + 1,) int32 from `row_starts`, counted anew without."""
    if _wants_gradients(x, values, bias):
        return bitmaps.bitmap_matmul(x, values, bitmap, bias)
    product: Tensor = _bitmap_matmul(x, values, bitmap, starts, bias)
    return product


def lowrank_matmul(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None, ranks: Sizes = None, outs: Sizes = None
) -> Tensor:
    """left (out, k), right (k, in), or those of several linears (see above)."""
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
    """pivots (k, in), coefficients (out - k, k), order (out,) int32; of several linears, each its own order."""
    if ranks is None or outs is None:
        ranks, outs = [pivots.shape[0]], [order.shape[0]]
    if _wants_gradients(x, pivots, coefficients, bias):
        return lowranks.grouped_pifa_matmul(x, pivots, coefficients, order, bias, ranks, outs)
    product: Tensor = _pifa_matmul(x, pivots, coefficients, order, bias, ranks, outs)
    return product


def cur_matmul(x: Tensor, columns: Tensor, link: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """columns (out, c), link (c, r), rows (r, in)."""
    if _wants_gradients(x, columns, link, rows, bias):
        return lowranks.cur_matmul(x, columns, link, rows, bias)
    product: Tensor = _cur_matmul(x, columns, link, rows, bias)
    return product


def sparse24_dense(values: Tensor, indices: Tensor) -> Tensor:
    """The dense weight (..., out, in), bit for bit, as `unpack24` makes it."""
    if not _on_gpu(values):
        return sparse24s.unpack24(values, indices)
    from paredown.kernels import sparse24_expand

    dense = values.new_empty(*values.shape[:-1], 2 * values.shape[-1])
    if dense.numel():
        with torch.cuda.device(values.device):
            sparse24_expand.decompress(values.flatten(0, -2), indices.flatten(0, -2), dense.flatten(0, -2))
    return dense


def bitmap_dense(values: Tensor, bitmap: Tensor, in_features: int) -> Tensor:
    """The dense weight (..., out, in), bit for bit, as `unpack_bitmap` makes it."""
    if not _on_gpu(values):
        return bitmaps.unpack_bitmap(values, bitmap, in_features)
    from paredown.kernels import bitmap_expand

    rows, dense = bitmap.flatten(0, -2), values.new_empty(*bitmap.shape[:-1], in_features)
    if dense.numel():
        with torch.cuda.device(values.device):
            bitmap_expand.decompress(values, rows, bitmaps.row_starts(rows), dense.flatten(0, -2))
    return dense


def _launch(path: Path, op: str, x: Tensor, tensors: Sequence[Any], bias: Tensor | None, rows: int) -> Tensor:
    """`path` by what the table chooses, with x as an aligned matrix (tokens, in) and a place for the result."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.data_ptr() % 16:
        flat = flat.clone()
    y = flat.new_empty(len(flat), rows)
    if y.numel():
        with torch.cuda.device(x.device):
            y = path(choose(op, x.device, len(flat), rows, x.shape[-1]), flat, tensors, bias, y)
    return y.view(*x.shape[:-1], rows)


def _on_gpu(x: Tensor, *weights: Tensor) -> bool:
    return x.is_cuda and x.dtype in HALVES and all(w.dtype == x.dtype for w in weights) and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _expect(x: Tensor, columns: int, fits: bool, name: str, tensor: Tensor, bias: Tensor | None, rows: int) -> None:
    if x.shape[-1] != columns:
        raise ValueError(f"x {tuple(x.shape)} has {x.shape[-1]} features, and the weight takes {columns}")
    if not fits:
        raise ValueError(f"{name} {tuple(tensor.shape)} does not belong to a weight ({rows}, {columns})")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias {tuple(bias.shape)} does not belong to {rows} outputs")


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
