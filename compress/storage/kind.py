"""What a way to store a weight must say of itself: see `Kind`. The ways that there are: `kinds`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from paredown.compress.storage.spec import Spec

Tensors = Mapping[str, Tensor]
Sizes = dict[str, tuple[int, ...]]
Parts = list[int] | None
Dtypes = dict[str, torch.dtype | None]  # None: the model's own


class Kind(ABC):
    """One way to store a weight (out, in), or the weights of fused experts (experts, out, in).

    `tensors` below are the stored ones by name, as `Kind.tensors` and `sizes` describe them.
    """

    asks: ClassVar[tuple[str, ...]]  # fields that a Spec must have beside kind, layout and shape
    tensors: ClassVar[Dtypes]  # dtype of each stored tensor
    chain: ClassVar[bool] = (
        False  # multiplied as a chain of smaller weights, so the product rounds as no dense one does
    )
    joins: ClassVar[bool] = False  # several weights with the same input can be multiplied as one, see `fuse`

    @staticmethod
    @abstractmethod
    def sizes(spec: Spec) -> Sizes:
        """Shapes of the stored tensors. Raises ValueError if there can be no such weight."""

    @staticmethod
    @abstractmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        """The dense weight (..., out, in); `shape` is its shape."""

    @staticmethod
    @abstractmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None, ranks: Parts = None, outs: Parts = None) -> Tensor:
        """x (..., in) times the transposed weight (out, in), plus bias (out,): (..., out).

        If several weights were joined, `ranks` and `outs` are the rank and the number of outputs of each.
        """

    @staticmethod
    def derive(tensors: Tensors) -> dict[str, Tensor]:
        """Tensors that a kernel needs beside the stored ones. They are computed once and passed to `matmul` with the rest."""
        return {}

    @staticmethod
    def kept_numbers(spec: Spec) -> int:
        """How many numbers stay in memory on a CPU for faster products, see `unpacked`; 0: nothing helps."""
        return 0

    @staticmethod
    def keep(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        """These numbers; `shape` is the dense weight's."""
        raise NotImplementedError

    @staticmethod
    def matmul_kept(x: Tensor, tensors: Tensors, kept: Tensor, bias: Tensor | None) -> Tensor:
        """As `matmul`, with what `keep` gave."""
        raise NotImplementedError

    @staticmethod
    def fault(tensors: Tensors, shape: tuple[int, ...]) -> str | None:
        """What is wrong with the index data, the tensor's name first; None if nothing is."""
        return None

    @staticmethod
    def starts(tensors: Tensors) -> list[int]:
        """Of fused experts: where in `values` each expert begins, and where the last one ends.

        Empty if `values[expert]` are the values of an expert.
        """
        return []


class Mask(Kind):
    """A weight of which only the values that a mask keeps are stored."""

    asks = ("values",)

    @staticmethod
    @abstractmethod
    def pack(weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """The tensors to store of a weight (..., out, in); `keep` (bool, same shape) marks the values that are stored."""

    @staticmethod
    def kept_numbers(spec: Spec) -> int:
        return spec.size

    @classmethod
    def keep(cls, tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return cls.unpack(tensors, shape)

    @staticmethod
    def matmul_kept(x: Tensor, tensors: Tensors, kept: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, kept, bias)
