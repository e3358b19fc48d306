"""The experts with the largest weights stay; no data are needed. A baseline, beside random choice.

S_j = |w_j|_2, where w_j holds the numbers of all matrices of expert j.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paredown.compress.methods.base import register
from paredown.compress.methods.structured.experts import ExpertMethod, Experts


@register("magnitude_experts")
@dataclass(frozen=True)
class MagnitudeExperts(ExpertMethod):
    reads_outputs: ClassVar[bool] = False

    def scores(self, experts: Experts) -> Tensor:
        squares = torch.zeros(experts.group.units, dtype=torch.float64)
        for matrices in experts.weights.values():  # (experts, out, in)
            for expert, weight in enumerate(matrices):  # one at a time: float64 of all would not fit
                squares[expert] += weight.double().square().sum().cpu()
        return squares.sqrt()
