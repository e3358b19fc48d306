"""Prune by what a weight's removal costs the model's loss to second order, with the diagonal of the empirical Fisher.

`w^2 F / 2` (LeCun et al. 1990, Optimal Brain Damage; F is the mean squared gradient of a sequence).
"""

from dataclasses import dataclass

from torch import Tensor

from paredown.compress.methods.pruning.base import MASKS
from paredown.compress.numerics.masks import Sparsity, keep_mask
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.sweep import Choose, fixed_mask


@MASKS.register("fisher")
@dataclass(frozen=True)
class FisherMask:
    """`w^2 F`, compared over the whole layer."""

    needs = frozenset({Need.FISHER})

    def choose(self, weight: Tensor, stats: Stats, sparsity: Sparsity) -> Choose:
        score = weight.float().square() * stats.gradient(Need.FISHER).float()  # (out, in)
        return fixed_mask(keep_mask(score, sparsity, within="layer"))
