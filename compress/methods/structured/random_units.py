"""Units drawn at random stay: the baseline that every score must beat."""

from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from paredown.compress.methods.base import Units, register
from paredown.compress.methods.structured.width import Scored


@register("random")
@dataclass(frozen=True)
class Random(Scored):
    seed: int = 0

    def scores(self, units: Units) -> Tensor:
        draw = torch.Generator().manual_seed(crc32(f"{self.seed} {units.group.name}".encode()))
        return torch.rand(units.weight.shape[1], generator=draw, dtype=torch.float64).to(units.weight.device)
