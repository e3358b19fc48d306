"""What a method made of one weight: its dense form, what it stores, and how it is packed."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from paredown.compress.sparsity import NofM, Sparsity
from paredown.compress.statistics import InputStats

ROWS = 1024  # rows whose error is measured at a time


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
        return int(torch.count_nonzero(self.keep))

    @property
    def kind(self) -> str:
        """The smallest exact storage: `sparse24`, `bitmap`, or `dense` where neither is smaller."""
        return storage_kind(tuple(self.weight.shape), self.kept, self.sparsity, self.weight.element_size())

    def relative_error(self, original: Tensor, stats: InputStats) -> float:
        """`tr(D H D^T) / tr(W H W^T)` with D = original - edited: the share of the output's energy that is wrong.

        With the Gram matrix where it was collected, else with its diagonal (inputs taken as uncorrelated). Not rooted.
        """
        lost = total = 0.0
        for before, after in zip(original.split(ROWS), self.weight.split(ROWS), strict=True):
            lost += stats.energy(before.float() - after.float())
            total += stats.energy(before)
        return lost / max(total, 1e-300)


def storage_kind(shape: tuple[int, ...], kept: int, sparsity: Sparsity, element_size: int) -> str:
    """Which packed kind holds a mask of this sort in the fewest bytes."""
    if sparsity == NofM(2, 4) and shape[-1] % 4 == 0:
        return "sparse24"
    bitmap = kept * element_size + math.prod(shape[:-1]) * math.ceil(shape[-1] / 8)
    return "bitmap" if bitmap < math.prod(shape) * element_size else "dense"
