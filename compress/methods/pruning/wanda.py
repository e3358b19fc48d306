"""Wanda: prune by |weight| times input norm, compared within each output row. Sun et al. 2023, eq. 1 (arXiv 2306.11695)."""

from dataclasses import dataclass

from torch import Tensor

from paredown.compress.methods.base import register
from paredown.compress.methods.pruning.base import MASKS, NoUpdate, Pruner
from paredown.compress.numerics.masks import Sparsity, keep_mask, row_wise
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.scores import wanda_score
from paredown.compress.numerics.sweep import Choose, fixed_mask


@MASKS.register("wanda")
@dataclass(frozen=True)
class WandaMask:
    """`|W| * ||x||`, compared within each row."""

    needs = frozenset({Need.SECOND_MOMENT})

    def choose(self, weight: Tensor, stats: Stats, sparsity: Sparsity) -> Choose:
        rms = stats.inputs.rms  # (in,)
        return fixed_mask(row_wise(lambda rows: keep_mask(wanda_score(rows, rms), sparsity), weight))


@register("wanda")
@dataclass(frozen=True)
class Wanda(Pruner):
    def pair(self) -> tuple[WandaMask, NoUpdate]:
        return WandaMask(), NoUpdate()
