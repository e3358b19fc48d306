"""Wanda: prune by |weight| times input norm, compared within each output row. Sun et al. 2023, eq. 1 (arXiv 2306.11695)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from paredown.compress.edits import Masked
from paredown.compress.methods import register
from paredown.compress.solvers import masked, wanda_score
from paredown.compress.sparsity import Sparsity, keep_mask, row_wise
from paredown.compress.statistics import InputStats


@register("wanda")
@dataclass(frozen=True)
class Wanda:
    sparsity: Sparsity = 0.5  # fraction removed, or "2:4" to keep 2 of every 4

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment_diagonal"})

    def compress(self, weight: Tensor, stats: InputStats) -> Masked:
        keep = row_wise(lambda rows: keep_mask(wanda_score(rows, stats), self.sparsity), weight)
        return Masked(masked(weight, keep), keep, self.sparsity)
