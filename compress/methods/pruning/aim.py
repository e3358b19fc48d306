"""What a pruner aims at: the layer's own output, or the dense model's, whatever errors came before the layer."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from paredown.compress.methods.base import Damping, Shape
from paredown.compress.methods.pruning.base import Pruner
from paredown.compress.numerics.least_squares import regressed
from paredown.compress.numerics.moments import Need, Stats


@dataclass(frozen=True)
class Aimed(Pruner):
    """A pruner whose mask and update work on the weight that serves its target best."""

    # the layer's own output, or the dense model's from the compressed model's input
    target: Literal["own", "dense"] = "own"
    ridge: Damping = 0.3  # of the regression towards the dense output, relative to the mean diagonal of H

    @property
    def needs(self) -> frozenset[Need]:
        paired = {Need.GRAM, Need.CROSS, Need.RESIDUAL} if self.target == "dense" else set()
        return super().needs | paired

    def working_bytes(self, shape: Shape) -> int:
        """Beside those of a pruner, for a dense target: moments and goal in float64."""
        out, inner = shape
        paired = 8 * (2 * inner * inner + 2 * out * inner) if self.target == "dense" else 0
        return super().working_bytes(shape) + paired

    def goal(self, weight: Tensor, stats: Stats) -> Tensor:  # (out, in)
        """With `target` dense the weight whose output from the compressed model's input comes nearest to the dense model's.

        A layer that writes to the residual stream makes up for the stream's error too.
        """
        if self.target == "own":
            return weight
        inputs, residual = stats.inputs, stats.residual
        if residual is None and Need.CROSS not in inputs.needs:  # an expert, or a survey of the dense model
            return weight
        gram = inputs.gram
        missing = residual.missing if residual else weight.double() @ (inputs.cross - gram)  # (out, in)
        return (weight.double() + regressed(missing, gram, self.ridge)).float()
