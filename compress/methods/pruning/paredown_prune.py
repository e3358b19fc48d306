"""Ours: ADMM's mask and least squares on it, towards the dense model's output, and each layer's own sparsity.

Each part can be changed by its option, and `masked` pairs others; evaluation/BENCHMARKS.md shows what each is worth. A
larger penalty settles ADMM's support in a few steps; the fit makes up for what the mask then lacks.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from paredown.compress.methods.base import Choice, Damping, Shape, register
from paredown.compress.methods.pruning.aim import Aimed
from paredown.compress.methods.pruning.alps import ADMMMask, Penalty, admm_bytes
from paredown.compress.methods.pruning.curves import LEAST, predicted_loss
from paredown.compress.methods.pruning.least_squares import Count, LeastSquaresUpdate
from paredown.compress.numerics.masks import NofM
from paredown.compress.numerics.moments import Need, Stats

EVERY = 4  # steps of ADMM between two looks at its support
TRIED = 3  # steps of ADMM, and of conjugate gradients, by which losses are predicted
ROWS = 256  # of a weight, whose losses are predicted


@register("paredown_prune")
@dataclass(frozen=True)
class ParedownPrune(Aimed):
    target: Literal["own", "dense"] = "dense"
    damping: Damping = 0.01  # of mask and fit, relative to the mean diagonal of H
    steps: Count = 16  # of ADMM
    penalty: Penalty = 0.3  # its first rho
    iterations: Count = 3  # of conjugate gradients, from where ADMM ends
    # of the calibration text, on which gradients are taken where an allocation reads them
    gradient_windows: Annotated[int, Field(ge=1)] = 16

    measured = (0.95, 0.8, 0.6, 0.4, 0.2)

    @property
    def strategy(self) -> str:
        """A pattern is the same in every layer, unless `kept` leaves some of them dense."""
        return "uniform" if isinstance(self.sparsity, NofM) and self.kept is None else "global"

    def pair(self) -> tuple[ADMMMask, LeastSquaresUpdate]:
        mask = ADMMMask(self.damping, self.steps, self.penalty, EVERY, exact=False)
        return mask, LeastSquaresUpdate(self.damping, self.iterations)

    @property
    def spread(self) -> dict[str, float]:
        """Nothing lies between a pattern and a dense layer that could be gone back to."""
        return {} if isinstance(self.sparsity, NofM) else {"shrink": 0.5}

    def choices(self, shape: Shape, weight: Tensor | None = None, stats: Stats | None = None) -> list[Choice]:
        """Of a large weight losses are those of ROWS rows, drawn at random, scaled as the loss of all of it is to theirs."""
        if weight is None or stats is None or shape[0] <= ROWS:
            return super().choices(shape, weight, stats)
        rows = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0))[:ROWS].to(weight.device)
        own: dict[Need, Tensor] = {n: g[rows] for n, g in stats.gradients.items() if n is Need.OUTPUT_GRADIENT_DIAGONAL}
        some = super().choices((len(rows), shape[1]), weight[rows], replace(stats, gradients=own))
        scale = predicted_loss(weight, stats) / max(some[0].loss, LEAST)
        return [replace(c, loss=scale * part.loss) for c, part in zip(super().choices(shape), some, strict=True)]

    def tried(self, weight: Tensor, stats: Stats) -> Tensor:  # (out, in)
        """By a few steps of each: what counts is how layers compare."""
        return super(ParedownPrune, replace(self, steps=TRIED, iterations=TRIED)).tried(weight, stats)

    def working_bytes(self, shape: Shape) -> int:
        return super().working_bytes(shape) + admm_bytes(shape)
