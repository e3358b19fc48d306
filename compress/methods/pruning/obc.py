"""OBC: exact OBS, one weight of a row at a time, then the exact weights on that mask: for small layers.

Frantar & Alistarh 2022, Optimal Brain Compression (arXiv 2208.11580).
"""

from dataclasses import dataclass

from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Damping, register
from paredown.compress.methods.pruning.base import MASKS, Pruner
from paredown.compress.methods.pruning.least_squares import Count, LeastSquaresUpdate
from paredown.compress.numerics.masked_least_squares import damped_gram
from paredown.compress.numerics.masks import Sparsity, check_width
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.obs import obs_mask
from paredown.compress.numerics.sweep import Choose, fixed_mask

MOST_INPUTS = 4096  # of a layer: the time grows with their third power, for each row


@MASKS.register("obc")
@dataclass(frozen=True)
class OBCMask:
    """The weights that exact OBS leaves in each row."""

    damping: Damping = 0.01  # relative to the mean diagonal of H

    needs = frozenset({Need.GRAM})

    def choose(self, weight: Tensor, stats: Stats, sparsity: Sparsity) -> Choose:
        check_width(weight.shape[1], sparsity)
        if weight.shape[1] > MOST_INPUTS:
            raise PareError(
                f"exact OBS takes far too long for {weight.shape[1]} inputs; it is for layers of at most {MOST_INPUTS}. "
                "Choose sparsegpt or alps, or leave the layer out with targets.skip."
            )
        return fixed_mask(obs_mask(weight, damped_gram(stats.inputs.gram, self.damping), sparsity))


@register("obc")
@dataclass(frozen=True)
class OBC(Pruner):
    damping: Damping = 0.01  # relative to the mean diagonal of H
    iterations: Count = 50  # of conjugate gradients

    def pair(self) -> tuple[OBCMask, LeastSquaresUpdate]:
        return OBCMask(self.damping), LeastSquaresUpdate(self.damping, self.iterations)
