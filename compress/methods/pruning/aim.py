"""What a pruner aims at: the layer's own output, or the dense model's, whatever errors came before the layer."""

from dataclasses import dataclass
from typing import Literal

import torch
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
        """With a dense target, first for the goal and then for a pruner; a cross moment and the goal stay."""
        plain = super().working_bytes(shape)
        if self.target == "own":
            return plain
        out, inner = shape
        return max(plain, 8 * inner * (inner + out)) + 8 * inner * min(inner, out) + 4 * out * inner

    def goal(self, weight: Tensor, stats: Stats) -> Tensor:  # (out, in)
        """With `target` dense the weight whose output from the compressed model's input comes nearest to the dense model's.

        A layer that writes to the residual stream makes up for the stream's error too. By float32: the ridge is far above
        its rounding.
        """
        if self.target == "own":
            return weight
        inputs, residual = stats.inputs.at(torch.float32), stats.residual
        if residual is None and Need.CROSS not in inputs.needs:  # an expert, or a survey of the dense model
            return weight
        wide, gram = weight.float(), inputs.gram
        missing = residual.missing.float() if residual else wide @ inputs.cross.sub_(gram)  # (out, in)
        return wide + regressed(missing, gram, self.ridge)
