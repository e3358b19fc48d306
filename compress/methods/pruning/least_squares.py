"""Updates that fit the weights that stay to the layer's own output: on the mask as it is, or with swaps."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from paredown.compress.methods.base import Damping
from paredown.compress.methods.pruning.base import UPDATES
from paredown.compress.numerics.edits import Masked
from paredown.compress.numerics.masked_least_squares import damped_gram, fitted
from paredown.compress.numerics.masks import Sparsity, masked
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.precision import narrowed
from paredown.compress.numerics.swaps import swapped
from paredown.compress.numerics.sweep import Choose

Count = Annotated[int, Field(ge=1, le=1000)]


@UPDATES.register("least_squares")
@dataclass(frozen=True)
class LeastSquaresUpdate:
    """The weights that stay minimise the layer loss: conjugate gradients on the full Gram matrix, all rows at once."""

    damping: Damping = 0.01  # relative to the mean diagonal of H
    iterations: Count = 20

    needs = frozenset({Need.GRAM})

    def apply(self, weight: Tensor, choose: Choose, stats: Stats, sparsity: Sparsity) -> Masked:
        keep = choose.whole()  # (out, in)
        moment = stats.inputs.unit_moment(self.damping)
        start = None if choose.start is None else choose.start * moment.scale
        x = fitted(weight.float() * moment.scale, keep, moment.matrix, self.iterations, start) / moment.scale
        return Masked(masked(narrowed(x, weight.dtype), keep), keep, sparsity, self.damping)


@UPDATES.register("swaps")
@dataclass(frozen=True)
class SwapsUpdate:
    """As `least_squares`, in turn with swaps of a kept for a removed weight, until the layer loss stops falling."""

    damping: Damping = 0.01  # relative to the mean diagonal of H
    iterations: Count = 10  # of each fit
    rounds: Count = 20

    needs = frozenset({Need.GRAM})

    def apply(self, weight: Tensor, choose: Choose, stats: Stats, sparsity: Sparsity) -> Masked:
        gram = damped_gram(stats.inputs.gram, self.damping)
        x, keep = swapped(weight.float(), choose.whole(), gram, sparsity, self.rounds, self.iterations)
        return Masked(masked(narrowed(x, weight.dtype), keep), keep, sparsity, self.damping)
