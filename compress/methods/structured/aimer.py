"""AIMER: experts whose weights are all about as large go; no data are needed. Liu et al. 2026 (arXiv 2603.18492).

A_j = (|w_j|_1 / N) / (|w_j|_2^2 / N)^(1/2), where w_j holds the N numbers of all matrices of expert j: absolute mean over
root mean square. It is 1 where all numbers are equally large; the experts with the highest go.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.compress.methods.base import register
from paredown.compress.methods.structured.experts import ExpertMethod, Experts


@register("aimer")
@dataclass(frozen=True)
class Aimer(ExpertMethod):
    reads_outputs = False

    def scores(self, experts: Experts) -> Tensor:
        absolute, squares = (torch.zeros(experts.group.units, dtype=torch.float64) for _ in range(2))
        numbers = 0
        for matrices in experts.weights.values():  # (experts, out, in)
            numbers += matrices[0].numel()
            for expert, weight in enumerate(matrices):  # one at a time: float64 of all would not fit
                absolute[expert] += weight.double().abs().sum().cpu()
                squares[expert] += weight.double().square().sum().cpu()
        rms = (squares / numbers).sqrt()
        # an expert of zeros is the first to go
        return -torch.where(rms > 0, absolute / numbers / rms.clamp_min(1e-300), 2.0)
