"""Experts drawn at random stay: the baseline that every score must beat."""

from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from paredown.compress.methods.base import register
from paredown.compress.methods.structured.experts import ExpertMethod, Experts


@register("random_experts")
@dataclass(frozen=True)
class RandomExperts(ExpertMethod):
    seed: int = 0

    reads_outputs = False

    def scores(self, experts: Experts) -> Tensor:
        draw = torch.Generator().manual_seed(crc32(f"{self.seed} {experts.group.name}".encode()))
        return torch.rand(experts.group.units, generator=draw, dtype=torch.float64)
