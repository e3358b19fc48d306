"""SparseGPT: prune column by column by the OBS loss w^2 / [H^-1]_jj, later columns making up for the error.

Frantar & Alistarh 2023, algorithm 1 (arXiv 2301.00774).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from paredown.compress.methods import Damping, register
from paredown.compress.numerics.edits import Masked
from paredown.compress.numerics.masks import Sparsity
from paredown.compress.numerics.moments import InputStats
from paredown.compress.numerics.sweep import adaptive_mask, block_columns, masked, narrowed, sparsegpt_sweep


@register("sparsegpt")
@dataclass(frozen=True)
class SparseGPT:
    sparsity: Sparsity = 0.5  # fraction removed, or "2:4" to keep 2 of every 4
    damping: Damping = 0.01  # of the mean diagonal of H, added to the diagonal

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def compress(self, weight: Tensor, stats: InputStats) -> Masked:
        if self.sparsity == 0:
            return Masked(weight, weight == weight, 0.0)
        inverse = stats.inverse_cholesky(self.damping)
        choose = adaptive_mask(self.sparsity, *weight.shape)
        updated, keep = sparsegpt_sweep(weight, inverse, choose, block_columns(self.sparsity))
        return Masked(
            masked(narrowed(updated, weight.dtype), keep),
            keep,
            self.sparsity,
            inverse.damping,
            inverse.told(self.damping),
        )
