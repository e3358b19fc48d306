"""Ours: ADMM's mask and least squares on it, towards the dense model's output.

Each part can be changed by its option, and `masked` pairs others; evaluation/BENCHMARKS.md shows what each is worth. A
larger penalty settles ADMM's support in a few steps; the fit makes up for what the mask then lacks.
"""

from dataclasses import dataclass
from typing import Literal

from paredown.compress.methods.base import Damping, Shape, register
from paredown.compress.methods.pruning.aim import Aimed
from paredown.compress.methods.pruning.alps import ADMMMask, Penalty, admm_bytes
from paredown.compress.methods.pruning.least_squares import Count, LeastSquaresUpdate


@register("paredown_prune")
@dataclass(frozen=True)
class ParedownPrune(Aimed):
    target: Literal["own", "dense"] = "dense"
    damping: Damping = 0.01  # of mask and fit, relative to the mean diagonal of H
    steps: Count = 15  # of ADMM
    penalty: Penalty = 0.3  # its first rho
    iterations: Count = 10  # of conjugate gradients

    def pair(self) -> tuple[ADMMMask, LeastSquaresUpdate]:
        return ADMMMask(self.damping, self.steps, self.penalty), LeastSquaresUpdate(self.damping, self.iterations)

    def working_bytes(self, shape: Shape) -> int:
        return super().working_bytes(shape) + admm_bytes(shape)
