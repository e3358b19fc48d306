"""Wanda: prune by |weight| times input norm, compared within each output row. Sun et al. 2023, eq. 1 (arXiv 2306.11695)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from paredown.compress.methods import register
from paredown.compress.numerics.edits import Masked
from paredown.compress.numerics.masks import Sparsity, keep_mask, row_wise
from paredown.compress.numerics.moments import InputStats
from paredown.compress.numerics.sweep import masked, wanda_score


@register("wanda")
@dataclass(frozen=True)
class Wanda:
    sparsity: Sparsity = 0.5  # fraction removed, or "2:4" to keep 2 of every 4

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment_diagonal"})

    def compress(self, weight: Tensor, stats: InputStats) -> Masked:
        keep = row_wise(lambda rows: keep_mask(wanda_score(rows, stats), self.sparsity), weight)
        return Masked(masked(weight, keep), keep, self.sparsity)
