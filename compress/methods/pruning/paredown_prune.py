"""Ours: ADMM's mask and least squares on it, towards the dense model's output, and each layer's own sparsity.

Each part can be changed by its option, and `masked` pairs others; evaluation/BENCHMARKS.md shows what each is worth. A
larger penalty settles ADMM's support in a few steps; the fit makes up for what the mask then lacks.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from paredown.compress.methods.base import Damping, Shape, register
from paredown.compress.methods.pruning.aim import Aimed
from paredown.compress.methods.pruning.alps import ADMMMask, Penalty, admm_bytes
from paredown.compress.methods.pruning.least_squares import Count, LeastSquaresUpdate
from paredown.compress.numerics.masks import NofM
from paredown.compress.numerics.moments import Stats

TRIED = 3  # steps of ADMM, and of conjugate gradients, by which losses are predicted


@register("paredown_prune")
@dataclass(frozen=True)
class ParedownPrune(Aimed):
    target: Literal["own", "dense"] = "dense"
    damping: Damping = 0.01  # of mask and fit, relative to the mean diagonal of H
    steps: Count = 15  # of ADMM
    penalty: Penalty = 0.3  # its first rho
    iterations: Count = 10  # of conjugate gradients
    # of the calibration text, on which gradients are taken where an allocation reads them
    gradient_windows: Annotated[int, Field(ge=1)] = 16

    measured = (0.95, 0.8, 0.6, 0.4, 0.2)

    @property
    def strategy(self) -> str:
        """A pattern is the same in every layer, unless `kept` leaves some of them dense."""
        return "uniform" if isinstance(self.sparsity, NofM) and self.kept is None else "global"

    def pair(self) -> tuple[ADMMMask, LeastSquaresUpdate]:
        return ADMMMask(self.damping, self.steps, self.penalty), LeastSquaresUpdate(self.damping, self.iterations)

    @property
    def spread(self) -> dict[str, float]:
        """Nothing lies between a pattern and a dense layer that could be gone back to."""
        return {} if isinstance(self.sparsity, NofM) else {"shrink": 0.5}

    def tried(self, weight: Tensor, stats: Stats) -> Tensor:  # (out, in)
        """By a few steps of each: what counts is how layers compare."""
        return super(ParedownPrune, replace(self, steps=TRIED, iterations=TRIED)).tried(weight, stats)

    def working_bytes(self, shape: Shape) -> int:
        return super().working_bytes(shape) + admm_bytes(shape)
