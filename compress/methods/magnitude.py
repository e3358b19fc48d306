"""Magnitude: keep the largest weights of a layer, whatever flows through them. Han et al. 2015 (arXiv 1506.02626)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from paredown.compress.edits import Masked
from paredown.compress.methods import register
from paredown.compress.solvers import magnitude_score, masked
from paredown.compress.sparsity import Sparsity, keep_mask
from paredown.compress.statistics import InputStats


@register("magnitude")
@dataclass(frozen=True)
class Magnitude:
    sparsity: Sparsity = 0.5  # fraction removed, or "2:4" to keep 2 of every 4

    # not read by the score: it weighs the error that the report tells
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment_diagonal"})

    def compress(self, weight: Tensor, stats: InputStats) -> Masked:
        keep = keep_mask(magnitude_score(weight, stats), self.sparsity, within="layer")
        return Masked(masked(weight, keep), keep, self.sparsity)
