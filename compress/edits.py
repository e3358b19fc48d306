"""What a method made of one weight: its dense form, what it stores, and how it is packed."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from paredown.compress.sparsity import NofM, Sparsity
from paredown.compress.statistics import InputStats


@dataclass(frozen=True)
class Masked:
    """A pruned weight: `weight` (out, in) in its original dtype, exactly +0.0 where `keep` (bool) is False."""

    weight: Tensor
    keep: Tensor
    sparsity: Sparsity
    damping: float | None = None  # what the solver used, as a fraction of the mean diagonal
    fallback: str | None = None  # a numerical remedy that the report must tell

    def dense(self) -> Tensor:  # (out, in)
        return self.weight

    @cached_property
    def kept(self) -> int:
        """How many weights stay."""
        return int(self.keep.sum())

    @property
    def kind(self) -> str:
        """The smallest exact storage: `sparse24`, `bitmap`, or `dense` where neither is smaller."""
        return storage_kind(tuple(self.weight.shape), self.kept, self.sparsity, self.weight.element_size())

    def relative_error(self, original: Tensor, stats: InputStats) -> float:
        """`tr(D H D^T) / tr(W H W^T)` with D = original - edited: the share of the output's energy that is wrong.

        With the Gram matrix where it was collected, else with its diagonal (inputs taken as uncorrelated). Not rooted.
        """
        change = original.float() - self.weight.float()  # (out, in)
        return _energy(change, stats) / max(_energy(original.float(), stats), 1e-300)


def storage_kind(shape: tuple[int, ...], kept: int, sparsity: Sparsity, element_size: int) -> str:
    """Which packed kind holds a mask of this sort in the fewest bytes."""
    if sparsity == NofM(2, 4) and shape[-1] % 4 == 0:
        return "sparse24"
    bitmap = kept * element_size + math.prod(shape[:-1]) * math.ceil(shape[-1] / 8)
    return "bitmap" if bitmap < math.prod(shape) * element_size else "dense"


def _energy(weight: Tensor, stats: InputStats) -> float:
    if "gram" in stats.needs:
        return float(torch.sum((weight @ stats.gram.float()) * weight, dtype=torch.float64))
    return float((weight.square().sum(0, dtype=torch.float64) * stats.second_moment_diagonal).sum())
