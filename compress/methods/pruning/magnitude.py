"""Magnitude: keep the largest weights of a layer, whatever flows through them. Han et al. 2015 (arXiv 1506.02626)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from paredown.compress.methods import register
from paredown.compress.numerics.edits import Masked
from paredown.compress.numerics.masks import Sparsity, keep_mask
from paredown.compress.numerics.moments import InputStats
from paredown.compress.numerics.sweep import magnitude_score, masked


@register("magnitude")
@dataclass(frozen=True)
class Magnitude:
    sparsity: Sparsity = 0.5  # fraction removed, or "2:4" to keep 2 of every 4

    # not read by the score: it weighs the error that the report tells
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment_diagonal"})

    def compress(self, weight: Tensor, stats: InputStats) -> Masked:
        keep = keep_mask(magnitude_score(weight, stats), self.sparsity, within="layer")
        return Masked(masked(weight, keep), keep, self.sparsity)
