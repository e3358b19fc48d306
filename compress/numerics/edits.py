"""What a method made of one weight: its dense form, what it stores, and how it is packed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paredown.compress.numerics.masks import NofM, Sparsity
from paredown.compress.numerics.moments import InputStats
from paredown.compress.storage import kinds

ROWS = 1024  # rows whose error is measured at a time


class Edit(ABC):
    """An edited weight (out, in) in its original dtype."""

    damping: float | None  # what the solver used, as a fraction of the mean diagonal
    fallback: str | None  # a numerical remedy that the report must tell

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight (out, in)."""

    @property
    @abstractmethod
    def kept(self) -> int:
        """How many numbers are stored of the weight."""

    @property
    @abstractmethod
    def told(self) -> dict[str, Any]:
        """What the record tells of it beside the share kept and the error."""

    def relative_error(self, original: Tensor, stats: InputStats) -> float:
        """`tr(D H D^T) / tr(W H W^T)` with D = original - edited: the share of the output's energy that is wrong.

        With the Gram matrix where it was collected, else with its diagonal (inputs taken as uncorrelated). Not rooted.
        """
        lost = total = 0.0
        for before, after in zip(original.split(ROWS), self.dense().split(ROWS), strict=True):
            lost += stats.energy(before.float() - after.float())
            total += stats.energy(before)
        return lost / max(total, 1e-300)


@dataclass(frozen=True)
class Masked(Edit):
    """A pruned weight: exactly +0.0 where `keep` (bool, (out, in)) is False."""

    weight: Tensor
    keep: Tensor
    sparsity: Sparsity
    damping: float | None = None
    fallback: str | None = None

    def dense(self) -> Tensor:  # (out, in)
        return self.weight

    @cached_property
    def kept(self) -> int:
        return int(torch.count_nonzero(self.keep))

    @property
    def told(self) -> dict[str, Any]:
        return {"sparsity": self.sparsity if isinstance(self.sparsity, float) else str(self.sparsity)}

    @property
    def kind(self) -> str:
        """The smallest exact storage: `sparse24`, `bitmap`, or `dense` where neither is smaller."""
        return storage_kind(tuple(self.weight.shape), self.kept, self.sparsity, self.weight.element_size())


@dataclass(frozen=True)
class LowRank(Edit):
    """A weight that is stored and multiplied as a chain of smaller ones: `tensors` of `kind`, of rank `rank`."""

    kind: str
    shape: tuple[int, int]
    rank: int
    tensors: Mapping[str, Tensor]
    shift: Tensor | None = None  # (out,) float64: what the layer's output needs added on average
    loss: float | None = None  # in the method's own metric, as a share of what dropping the whole weight would lose
    damping: float | None = None
    fallback: str | None = None

    def dense(self) -> Tensor:  # (out, in)
        return kinds.kind_of(self.kind).unpack(self.tensors, self.shape)

    @property
    def spec(self) -> dict[str, Any]:
        """For config.json, without the layout."""
        kept = {"kept": self.tensors["values"].numel()} if "values" in self.tensors else {}
        return {"kind": self.kind, "shape": list(self.shape), "rank": self.rank, **kept}

    @property
    def kept(self) -> int:
        return kinds.stored_numbers(self.spec)

    @property
    def told(self) -> dict[str, Any]:
        return {"kind": self.kind, "rank": self.rank, "measured_loss": self.loss}

    def relative_error(self, original: Tensor, stats: InputStats) -> float:
        error = super().relative_error(original, stats)
        if self.shift is None:
            return error
        # E|D x - s|^2 = E|D x|^2 - 2 s . D E[x] + |s|^2
        made = (original.double() - self.dense().double()) @ stats.mean  # (out,)
        return error + float(self.shift @ (self.shift - 2 * made)) / max(_total(original, stats), 1e-300)


def _total(weight: Tensor, stats: InputStats) -> float:
    return sum(stats.energy(rows) for rows in weight.split(ROWS))


def storage_kind(shape: tuple[int, ...], kept: int, sparsity: Sparsity, element_size: int) -> str:
    """Which packed kind holds a mask of this sort in the fewest bytes."""
    if sparsity == NofM(2, 4) and shape[-1] % 4 == 0:
        return "sparse24"
    bitmap = kinds.stored_bytes({"kind": "bitmap", "shape": shape, "kept": kept}, element_size)
    return "bitmap" if bitmap < math.prod(shape) * element_size else "dense"
