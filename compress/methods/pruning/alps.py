"""ALPS: the mask by ADMM on the layer loss, then the weights on it by conjugate gradients.

Meng et al. 2024, ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models (arXiv 2406.07831).
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from paredown.compress.methods.base import Damping, Shape, register
from paredown.compress.methods.pruning.base import MASKS, Pruner
from paredown.compress.methods.pruning.least_squares import Count, LeastSquaresUpdate
from paredown.compress.numerics.admm import EVERY, admm
from paredown.compress.numerics.masks import Sparsity, check_width
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.sweep import Choose, fixed_mask

Penalty = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@MASKS.register("admm")
@dataclass(frozen=True)
class ADMMMask:
    """The support that ADMM settles on, over the whole layer or in each group of m."""

    damping: Damping = 0.01  # relative to the mean diagonal of H
    steps: Count = 300  # at most; it ends once the support no longer changes
    penalty: Penalty = 0.1  # the first rho; the larger, the sooner it settles
    every: Count = EVERY  # steps between two looks at whether it has, when rho grows
    exact: bool = True  # invert anew for each rho; otherwise nearly, from the inverse before: see `raised`

    needs = frozenset({Need.GRAM})

    def choose(self, weight: Tensor, stats: Stats, sparsity: Sparsity) -> Choose:
        check_width(weight.shape[1], sparsity)
        moment = stats.inputs.unit_moment(self.damping)
        asked = (self.steps, self.penalty, self.every, self.exact)
        return fixed_mask(*admm(weight.float(), moment, sparsity, *asked))


@register("alps")
@dataclass(frozen=True)
class ALPS(Pruner):
    damping: Damping = 0.01  # relative to the mean diagonal of H
    steps: Count = 300  # of ADMM, at most
    iterations: Count = 10  # of conjugate gradients

    def pair(self) -> tuple[ADMMMask, LeastSquaresUpdate]:
        return ADMMMask(self.damping, self.steps), LeastSquaresUpdate(self.damping, self.iterations)

    def working_bytes(self, shape: Shape) -> int:
        return super().working_bytes(shape) + admm_bytes(shape)


def admm_bytes(shape: Shape) -> int:
    """Eight float32 copies of a weight (out, in): target and start of the fit, which takes more than ADMM, and six more."""
    return 8 * 4 * shape[0] * shape[1]
