"""ALPS: the mask by ADMM on the layer loss, then the weights on it by conjugate gradients.

Meng et al. 2024, ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models (arXiv 2406.07831).
"""

from dataclasses import dataclass

from torch import Tensor

from paredown.compress.methods.base import Damping, register
from paredown.compress.methods.pruning.base import MASKS, Pruner
from paredown.compress.methods.pruning.least_squares import Count, LeastSquaresUpdate
from paredown.compress.numerics.admm import admm_mask
from paredown.compress.numerics.masked_least_squares import damped_gram
from paredown.compress.numerics.masks import Sparsity, check_width
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.sweep import Choose, fixed_mask


@MASKS.register("admm")
@dataclass(frozen=True)
class ADMMMask:
    """The support that ADMM settles on, over the whole layer or in each group of m."""

    damping: Damping = 0.01  # relative to the mean diagonal of H
    steps: Count = 300  # at most; it ends once the support no longer changes

    needs = frozenset({Need.GRAM})

    def choose(self, weight: Tensor, stats: Stats, sparsity: Sparsity) -> Choose:
        check_width(weight.shape[1], sparsity)
        gram = damped_gram(stats.inputs.gram, self.damping)
        return fixed_mask(admm_mask(weight.float(), gram, sparsity, self.steps))


@register("alps")
@dataclass(frozen=True)
class ALPS(Pruner):
    damping: Damping = 0.01  # relative to the mean diagonal of H
    steps: Count = 300  # of ADMM, at most
    iterations: Count = 10  # of conjugate gradients

    def pair(self) -> tuple[ADMMMask, LeastSquaresUpdate]:
        return ADMMMask(self.damping, self.steps), LeastSquaresUpdate(self.damping, self.iterations)
