"""The part of a packed weight that one of several devices multiplies with: some of its rows, some of its columns.

No value is changed: the part's dense form is that part of the whole dense form, bit for bit.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from paredown.compress.storage.kinds import MASKS, kind_of, pack
from paredown.compress.storage.spec import DENSE
from paredown.kernels.lowrank import pifa_left

Tensors = Mapping[str, Tensor]
Indices = Tensor | None  # int64, in their new order; None: all of them as they are
Part = tuple[str, dict[str, Tensor]]  # the kind in which a part is stored, and its tensors


def cut(kind: str, tensors: Tensors, shape: tuple[int, ...], rows: Indices, columns: Indices) -> Part:
    """These rows and columns of a weight (out, in) of `kind`, or of a dense one with its `weight` alone.

    PIFA becomes two factors where rows are chosen, since each row may be a sum of all pivots. 2:4 becomes a bitmap where
    columns are chosen that are no whole groups of four. Other kinds stay what they are.
    """
    if rows is None and columns is None:
        return kind, dict(tensors)
    mask, both, _ = kind.partition("_lowrank")
    if both:
        sparse, part = _masked(mask, {n: t for n, t in tensors.items() if n not in FACTORS}, shape, rows, columns)
        return sparse + both, {**part, **_lowrank(tensors, rows, columns)[1]}
    if kind in MASKS:
        return _masked(kind, tensors, shape, rows, columns)
    return CUTS[kind](tensors, rows, columns)


def as_factors(tensors: Tensors) -> Part:
    """PIFA as two factors: the pivots, and the coefficients of all rows, those of the pivots too."""
    return "lowrank", {"left": pifa_left(tensors["coefficients"], tensors["order"]), "right": tensors["pivots"]}


def _masked(kind: str, tensors: Tensors, shape: tuple[int, ...], rows: Indices, columns: Indices) -> Part:
    """A stored zero stays stored: ones in place of the values tell which they are."""
    ones = {**tensors, "values": torch.ones_like(tensors["values"])}
    keep, dense = (_chosen(kind_of(kind).unpack(t, shape), rows, columns) for t in (ones, tensors))
    if kind == "sparse24" and not _whole_groups(keep):
        kind = "bitmap"
    return kind, pack(kind, dense.contiguous(), keep.bool().contiguous())


def _whole_groups(keep: Tensor) -> bool:
    return keep.shape[1] % 4 == 0 and bool((keep.unflatten(-1, (-1, 4)).sum(-1) == 2).all())


def _dense(tensors: Tensors, rows: Indices, columns: Indices) -> Part:
    return DENSE, {"weight": _chosen(tensors["weight"], rows, columns)}


def _lowrank(tensors: Tensors, rows: Indices, columns: Indices) -> Part:
    return "lowrank", {"left": _chosen(tensors["left"], rows, None), "right": _chosen(tensors["right"], None, columns)}


def _pifa(tensors: Tensors, rows: Indices, columns: Indices) -> Part:
    if rows is None:
        return "pifa", {**tensors, "pivots": _chosen(tensors["pivots"], None, columns)}
    return _lowrank(as_factors(tensors)[1], rows, columns)


def _cur(tensors: Tensors, rows: Indices, columns: Indices) -> Part:
    ends = {"columns": _chosen(tensors["columns"], rows, None), "rows": _chosen(tensors["rows"], None, columns)}
    return "cur", {"link": tensors["link"], **ends}


FACTORS = ("left", "right")
CUTS: dict[str, Callable[[Tensors, Indices, Indices], Part]] = {
    DENSE: _dense,
    "lowrank": _lowrank,
    "pifa": _pifa,
    "cur": _cur,
}


def _chosen(matrix: Tensor, rows: Indices, columns: Indices) -> Tensor:
    matrix = matrix if rows is None else matrix[rows]
    return matrix if columns is None else matrix[:, columns]
