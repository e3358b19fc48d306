"""Weights that are stored as a chain of smaller ones, and a mask beside such a chain."""

from typing import ClassVar

import torch
from torch import Tensor

from paredown.compress.storage.kind import Dtypes, Kind, Mask, Parts, Sizes, Tensors
from paredown.compress.storage.mask_kinds import Sparse24
from paredown.compress.storage.spec import Spec
from paredown.kernels import lowrank as lowranks
from paredown.kernels import ops


class LowRank(Kind):
    """Two factors: `left @ right`."""

    asks = ("rank",)
    tensors: ClassVar[Dtypes] = {"left": None, "right": None}
    chain = joins = True

    @staticmethod
    def sizes(spec: Spec) -> Sizes:
        *experts, out, inner = spec.shape
        rank = _rank(spec)
        return {"left": (*experts, out, rank), "right": (*experts, rank, inner)}

    @staticmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return lowranks.lowrank_dense(tensors["left"], tensors["right"])

    @staticmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None, ranks: Parts = None, outs: Parts = None) -> Tensor:
        return ops.lowrank_matmul(x, tensors["left"], tensors["right"], bias, ranks, outs)


class Pifa(Kind):
    """Some rows of the weight (pivots), and coefficients that give each other row as a sum of these.

    `order` gives, for each row of the weight, its place in the list of the pivots followed by the other rows.
    """

    asks = ("rank",)
    tensors: ClassVar[Dtypes] = {"pivots": None, "coefficients": None, "order": torch.int32}
    chain = joins = True

    @staticmethod
    def sizes(spec: Spec) -> Sizes:
        *experts, out, inner = spec.shape
        rank = _rank(spec)
        return {
            "pivots": (*experts, rank, inner),
            "coefficients": (*experts, out - rank, rank),
            "order": (*experts, out),
        }

    @staticmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return lowranks.pifa_dense(tensors["pivots"], tensors["coefficients"], tensors["order"])

    @staticmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None, ranks: Parts = None, outs: Parts = None) -> Tensor:
        pivots, coefficients, order = tensors["pivots"], tensors["coefficients"], tensors["order"]
        return ops.pifa_matmul(x, pivots, coefficients, order, bias, ranks, outs)

    @staticmethod
    def kept_numbers(spec: Spec) -> int:
        """Of a small weight the left factor by which it is multiplied: outputs are the same to the last bit."""
        return spec.shape[0] * _rank(spec) if spec.size <= lowranks.SMALL else 0

    @staticmethod
    def keep(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return lowranks.pifa_left(tensors["coefficients"], tensors["order"])

    @staticmethod
    def matmul_kept(x: Tensor, tensors: Tensors, kept: Tensor, bias: Tensor | None) -> Tensor:
        return lowranks.lowrank_matmul(x, kept, tensors["pivots"], bias)

    @staticmethod
    def fault(tensors: Tensors, shape: tuple[int, ...]) -> str | None:
        order = tensors["order"].long()
        whole = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
        return None if torch.equal(order.sort(-1).values, whole) else "order: is no permutation of the rows"


class Cur(Kind):
    """Some columns of the weight, some of its rows, and a small matrix between: `columns @ link @ rows`."""

    asks = ("rank",)
    tensors: ClassVar[Dtypes] = {"columns": None, "link": None, "rows": None}
    chain = True

    @staticmethod
    def sizes(spec: Spec) -> Sizes:
        *experts, out, inner = spec.shape
        rank = _rank(spec)
        return {
            "columns": (*experts, out, rank),
            "link": (*experts, rank, rank),
            "rows": (*experts, rank, inner),
        }

    @staticmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return lowranks.cur_dense(tensors["columns"], tensors["link"], tensors["rows"])

    @staticmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None, ranks: Parts = None, outs: Parts = None) -> Tensor:
        return ops.cur_matmul(x, tensors["columns"], tensors["link"], tensors["rows"], bias)


def with_lowrank(mask: type[Mask]) -> type[Kind]:
    """The kind of a weight that is a masked weight plus two factors: `mask + left @ right`."""

    class MaskAndLowRank(Kind):
        asks = ("values", "rank")
        tensors: ClassVar[Dtypes] = {**mask.tensors, **LowRank.tensors}
        chain = joins = True

        @staticmethod
        def sizes(spec: Spec) -> Sizes:
            return {**mask.sizes(spec), **LowRank.sizes(spec)}

        @staticmethod
        def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
            sparse, product = mask.unpack(tensors, shape), LowRank.unpack(tensors, shape)
            return (sparse.float() + product.float()).to(sparse.dtype)

        @staticmethod
        def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None, ranks: Parts = None, outs: Parts = None) -> Tensor:
            if mask is Sparse24 and outs is None:
                values, indices, left, right = (tensors[n] for n in ("values", "indices", "left", "right"))
                return ops.sparse24_lowrank_matmul(x, values, indices, left, right, bias)
            return mask.matmul(x, tensors, bias) + LowRank.matmul(x, tensors, None, ranks, outs)

        @staticmethod
        def derive(tensors: Tensors) -> dict[str, Tensor]:
            return mask.derive(tensors)

        @staticmethod
        def fault(tensors: Tensors, shape: tuple[int, ...]) -> str | None:
            return mask.fault(tensors, shape)

        @staticmethod
        def starts(tensors: Tensors) -> list[int]:
            return mask.starts(tensors)

    return MaskAndLowRank


def _rank(spec: Spec) -> int:
    rank = spec.rank or 0
    if not 1 <= rank <= min(spec.shape[-2:]):
        raise ValueError(f"a weight of {[*spec.shape]} cannot have rank {rank}")
    return rank
