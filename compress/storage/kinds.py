"""How a weight can be stored: which tensors, their sizes, and how to multiply with them.

A kind is chosen by a spec, which stands in config.json: {"kind", "layout", "shape": [out, in] or [experts, out, in]} and
what the kind asks for beside: "kept", the number of stored values of a mask, or "rank".
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from paredown.compress.errors import PareError, did_you_mean
from paredown.kernels import bitmap as bitmaps
from paredown.kernels import lowrank as lowranks
from paredown.kernels import ops, paths
from paredown.kernels import sparse24 as sparse24s

# 2: the indices of 2:4 weights lie in the order of sparse24.py. Format 1 was never released.
FORMAT_VERSION = 2
Spec = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Sizes = dict[str, tuple[int, ...]]
Parts = list[int] | None
Dtypes = dict[str, torch.dtype | None]  # None: the model's own


class Kind(ABC):
    """One way to store a weight `(..., out, in)`."""

    asks: ClassVar[tuple[str, ...]]  # what a spec must hold beside kind, layout and shape
    tensors: ClassVar[Dtypes]
    chain: ClassVar[bool] = False  # multiplies as it is stored, so that its dense product rounds differently
    joins: ClassVar[bool] = False  # several weights of one input can be one product

    @staticmethod
    @abstractmethod
    def sizes(spec: Spec) -> Sizes:
        """Shapes of the tensors of such a weight. Raises ValueError if no such weight can exist."""

    @staticmethod
    @abstractmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        """The dense weight (..., out, in)."""

    @staticmethod
    @abstractmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None, ranks: Parts = None, outs: Parts = None) -> Tensor:
        """x (..., in) times the transposed weight (out, in), plus bias. Of weights that are joined, their ranks and outs."""

    @staticmethod
    def derive(tensors: Tensors) -> dict[str, Tensor]:
        """What a kernel needs beside the stored tensors, made once."""
        return {}

    @staticmethod
    def fault(tensors: Tensors, shape: tuple[int, ...]) -> str | None:
        """What is damaged in the index data, or None."""
        return None

    @staticmethod
    def starts(tensors: Tensors) -> list[int]:
        """Where the values of each expert begin, and where the last one's end; empty if `values[expert]` says it."""
        return []


class Mask(Kind):
    """A weight of which some values are stored."""

    asks = ("kept",)

    @staticmethod
    @abstractmethod
    def pack(weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """The tensors of a weight (..., out, in) of which only what `keep` marks is stored."""


class Sparse24(Mask):
    """2 of every 4 weights along the input, with 2-bit columns."""

    tensors: ClassVar[Dtypes] = {"values": None, "indices": torch.uint8}
    joins = True

    @staticmethod
    def pack(weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
        values, indices = sparse24s.pack24(weight, keep)
        return {"values": values, "indices": indices}

    @staticmethod
    def sizes(spec: Spec) -> Sizes:
        shape, kept = spec["shape"], spec["kept"]
        *rows, inner = shape
        if inner % 4 or 2 * kept != math.prod(shape):
            raise ValueError(f"2:4 of {[*shape]} stores half of its weights and needs an input divisible by 4")
        return {"values": (*rows, inner // 2), "indices": (*rows, sparse24s.index_bytes(inner))}

    @staticmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return paths.sparse24_dense(tensors["values"], tensors["indices"])

    @staticmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None, ranks: Parts = None, outs: Parts = None) -> Tensor:
        return ops.sparse24_matmul(x, tensors["values"], tensors["indices"], bias)

    @staticmethod
    def fault(tensors: Tensors, shape: tuple[int, ...]) -> str | None:
        bad = sparse24s.count_invalid24(tensors["indices"])
        return f"indices: {bad} groups name no pair of columns" if bad else None


class Bitmap(Mask):
    """Any mask: one bit per weight and the kept values in a row."""

    tensors: ClassVar[Dtypes] = {"values": None, "bitmap": torch.uint8}
    joins = True

    @staticmethod
    def pack(weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
        values, bitmap = bitmaps.pack_bitmap(weight, keep)
        return {"values": values, "bitmap": bitmap}

    @staticmethod
    def sizes(spec: Spec) -> Sizes:
        shape, kept = spec["shape"], spec["kept"]
        if not 0 <= kept <= math.prod(shape):
            raise ValueError(f"a weight of {[*shape]} cannot keep {kept} values")
        return {"values": (kept,), "bitmap": (*shape[:-1], -(-shape[-1] // 8))}

    @staticmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return paths.bitmap_dense(tensors["values"], tensors["bitmap"], shape[-1])

    @staticmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None, ranks: Parts = None, outs: Parts = None) -> Tensor:
        return ops.bitmap_matmul(x, tensors["values"], tensors["bitmap"], bias, tensors.get("starts"))

    @staticmethod
    def derive(tensors: Tensors) -> dict[str, Tensor]:
        return {"starts": bitmaps.row_starts(tensors["bitmap"])} if tensors["bitmap"].is_cuda else {}

    @staticmethod
    def starts(tensors: Tensors) -> list[int]:
        return [0, *bitmaps.count_bits(tensors["bitmap"]).sum(-1).cumsum(0).tolist()]

    @staticmethod
    def fault(tensors: Tensors, shape: tuple[int, ...]) -> str | None:
        bitmap, kept = tensors["bitmap"], tensors["values"].numel()
        marked = int(bitmaps.count_bits(bitmap).sum())
        if marked != kept:
            return f"bitmap: marks {marked} weights, and {kept} values are stored"
        if shape[-1] % 8 and bool((bitmap[..., -1] >> (shape[-1] % 8)).any()):
            return f"bitmap: marks columns past the last of {shape[-1]}"
        return None


class LowRank(Kind):
    """`left @ right`."""

    asks = ("rank",)
    tensors: ClassVar[Dtypes] = {"left": None, "right": None}
    chain = joins = True

    @staticmethod
    def sizes(spec: Spec) -> Sizes:
        out, inner = spec["shape"]
        rank = _rank(spec)
        return {"left": (out, rank), "right": (rank, inner)}

    @staticmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return lowranks.lowrank_dense(tensors["left"], tensors["right"])

    @staticmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None, ranks: Parts = None, outs: Parts = None) -> Tensor:
        return ops.lowrank_matmul(x, tensors["left"], tensors["right"], bias, ranks, outs)


class Pifa(Kind):
    """Pivot rows, and the coefficients that make the others of them."""

    asks = ("rank",)
    tensors: ClassVar[Dtypes] = {"pivots": None, "coefficients": None, "order": torch.int32}
    chain = joins = True

    @staticmethod
    def sizes(spec: Spec) -> Sizes:
        out, inner = spec["shape"]
        rank = _rank(spec)
        return {"pivots": (rank, inner), "coefficients": (out - rank, rank), "order": (out,)}

    @staticmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return lowranks.pifa_dense(tensors["pivots"], tensors["coefficients"], tensors["order"])

    @staticmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None, ranks: Parts = None, outs: Parts = None) -> Tensor:
        pivots, coefficients, order = tensors["pivots"], tensors["coefficients"], tensors["order"]
        return ops.pifa_matmul(x, pivots, coefficients, order, bias, ranks, outs)

    @staticmethod
    def fault(tensors: Tensors, shape: tuple[int, ...]) -> str | None:
        order = tensors["order"].long()
        whole = torch.arange(len(order), device=order.device)
        return None if torch.equal(order.sort().values, whole) else "order: is no permutation of the rows"


class Cur(Kind):
    """Columns of the weight, rows of it, and the matrix that links them."""

    asks = ("rank",)
    tensors: ClassVar[Dtypes] = {"columns": None, "link": None, "rows": None}
    chain = True

    @staticmethod
    def sizes(spec: Spec) -> Sizes:
        out, inner = spec["shape"]
        rank = _rank(spec)
        return {"columns": (out, rank), "link": (rank, rank), "rows": (rank, inner)}

    @staticmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return lowranks.cur_dense(tensors["columns"], tensors["link"], tensors["rows"])

    @staticmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None, ranks: Parts = None, outs: Parts = None) -> Tensor:
        return ops.cur_matmul(x, tensors["columns"], tensors["link"], tensors["rows"], bias)


def _with_lowrank(mask: type[Mask]) -> type[Kind]:
    """A mask's kind and factors, both stored; their products are added."""

    class MaskAndLowRank(Kind):
        asks = ("kept", "rank")
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

    return MaskAndLowRank


MASKS: dict[str, type[Mask]] = {"sparse24": Sparse24, "bitmap": Bitmap}
KINDS: dict[str, type[Kind]] = {
    **MASKS,
    "lowrank": LowRank,
    "pifa": Pifa,
    "cur": Cur,
    "sparse24_lowrank": _with_lowrank(Sparse24),
    "bitmap_lowrank": _with_lowrank(Bitmap),
}


def kind_of(name: str) -> type[Kind]:
    """Raises PareError for a kind that this version does not know."""
    if name not in KINDS:
        raise PareError(
            f"unknown kind of packed weight {name!r}.{did_you_mean(str(name), KINDS)} This version knows "
            f"{', '.join(KINDS)}; a newer paredown may have written this checkpoint: pip install -U paredown."
        )
    return KINDS[name]


def pack(kind: str, weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """The tensors to write for `weight` ([experts,] out, in) of which `keep` (same shape, bool) is stored.

    Raises PareError for an unknown kind, ValueError if `keep` does not fit the kind (2:4 keeps exactly 2 of 4).
    """
    if kind not in MASKS:
        kind_of(kind)
        raise ValueError(f"{kind} stores no mask; masks are stored as {', '.join(MASKS)}")
    return MASKS[kind].pack(weight, keep)


def stored_numbers(spec: Spec) -> int:
    """How many numbers in the model's dtype a weight of this spec stores, an added bias among them: its parameters."""
    kind = kind_of(spec["kind"])
    numbers = sum(math.prod(size) for name, size in kind.sizes(spec).items() if kind.tensors[name] is None)
    return numbers + (spec["shape"][-2] if spec.get("bias") else 0)


def stored_bytes(spec: Spec, element_size: int) -> int:
    """Bytes of all tensors of a weight of this spec, a bias that it adds among them."""
    kind = kind_of(spec["kind"])
    index = sum(
        math.prod(size) * dtype.itemsize
        for name, size in kind.sizes(spec).items()
        if (dtype := kind.tensors[name]) is not None
    )
    return index + stored_numbers(spec) * element_size


def _rank(spec: Spec) -> int:
    rank: int = spec["rank"]
    if not 1 <= rank <= min(spec["shape"]):
        raise ValueError(f"a weight of {[*spec['shape']]} cannot have rank {rank}")
    return rank
