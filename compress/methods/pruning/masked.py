"""Any mask with any update of the surviving weights: two separate choices, of which the papers' methods are named pairs.

`{mask: wanda, update: sparsegpt}` lets Wanda choose and SparseGPT's sweep repair (arXiv 2306.11695, section 5).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from paredown.compress.methods import Damping, register
from paredown.compress.numerics.edits import Masked
from paredown.compress.numerics.masks import Sparsity, keep_mask
from paredown.compress.numerics.moments import InputStats
from paredown.compress.numerics.sweep import (
    adaptive_mask,
    block_columns,
    fixed_mask,
    magnitude_score,
    masked,
    narrowed,
    sparsegpt_sweep,
    wanda_score,
)


@register("masked")
@dataclass(frozen=True)
class MaskAndUpdate:
    sparsity: Sparsity = 0.5  # fraction removed, or "2:4" to keep 2 of every 4
    mask: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"
    update: Literal["none", "sparsegpt"] = "sparsegpt"
    damping: Damping = 0.01  # of the mean diagonal of H, added to the diagonal

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def compress(self, weight: Tensor, stats: InputStats) -> Masked:
        if self.sparsity == 0:
            return Masked(weight, weight == weight, 0.0)
        if self.mask == "sparsegpt":
            choose = adaptive_mask(self.sparsity, *weight.shape)
        else:
            keep = self._scored(weight, stats)
            if self.update == "none":
                return Masked(masked(weight, keep), keep, self.sparsity)
            choose = fixed_mask(keep)
        inverse = stats.inverse_cholesky(self.damping)
        updated, keep = sparsegpt_sweep(weight, inverse, choose, block_columns(self.sparsity))
        new = narrowed(updated, weight.dtype) if self.update == "sparsegpt" else weight
        return Masked(masked(new, keep), keep, self.sparsity, inverse.damping, inverse.told(self.damping))

    def _scored(self, weight: Tensor, stats: InputStats) -> Tensor:  # (out, in) bool
        if self.mask == "wanda":
            return keep_mask(wanda_score(weight, stats), self.sparsity, within="row")
        return keep_mask(magnitude_score(weight, stats), self.sparsity, within="layer")
