"""SparseGPT: prune column by column by the OBS loss w^2 / [H^-1]_jj, and let later columns make up for the error.

Frantar & Alistarh 2023, algorithm 1 (arXiv 2301.00774).
"""

from dataclasses import dataclass

from torch import Tensor

from paredown.compress.methods.base import Damping, register
from paredown.compress.methods.pruning.base import MASKS, UPDATES, Pruner
from paredown.compress.numerics.edits import Masked
from paredown.compress.numerics.masks import Sparsity, masked
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.precision import narrowed
from paredown.compress.numerics.sweep import Choose, adaptive_mask, block_columns, sparsegpt_sweep


@MASKS.register("sparsegpt")
@dataclass(frozen=True)
class SparseGPTMask:
    """`w^2 / [H^-1]_jj` of the weights during the sweep; with another update, those of a sweep whose weights are dropped."""

    damping: Damping = 0.01  # relative to the mean diagonal of H

    needs = frozenset({Need.GRAM})

    def choose(self, weight: Tensor, stats: Stats, sparsity: Sparsity) -> Choose:
        return adaptive_mask(sparsity, weight, lambda: stats.inputs.inverse_cholesky(self.damping))


@UPDATES.register("sparsegpt")
@dataclass(frozen=True)
class SparseGPTUpdate:
    """The columns to the right of each make up for its error."""

    damping: Damping = 0.01  # relative to the mean diagonal of H

    needs = frozenset({Need.GRAM})

    def apply(self, weight: Tensor, choose: Choose, stats: Stats, sparsity: Sparsity) -> Masked:
        inverse = stats.inputs.inverse_cholesky(self.damping)
        updated, keep = sparsegpt_sweep(weight, inverse, choose, block_columns(sparsity))
        pruned = masked(narrowed(updated, weight.dtype), keep)
        return Masked(pruned, keep, sparsity, inverse.damping, inverse.fallback)


@register("sparsegpt")
@dataclass(frozen=True)
class SparseGPT(Pruner):
    damping: Damping = 0.01  # relative to the mean diagonal of H

    def pair(self) -> tuple[SparseGPTMask, SparseGPTUpdate]:
        return SparseGPTMask(self.damping), SparseGPTUpdate(self.damping)
