"""The MLP half of LoRAP: channels with small weights go, but for the very smallest. Li et al. 2024 (arXiv 2404.09695).

I_j = |G_j: * n|_2 + |U_j: * n|_2 + |D_:j|_2 n_j: for all matrices that write or read channel j the norm of its part, with
each column times the root mean square of its input. What goes lies above the `least` smallest of all channels in the order of
I: the paper found these to be vital. `kept` is a share of each MLP's channels, as the paper gives attention and MLP the same;
the other half is `lorap` with attention alone as its target.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Sliced, Units, register
from paredown.compress.methods.structured.width import Scored, check_count, made_up
from paredown.compress.numerics.moments import Need


@register("lorap_mlp")
@dataclass(frozen=True)
class LoRAPMLP(Scored):
    least: Annotated[float, Field(ge=0, lt=1)] = 0.01

    reads = frozenset({Need.SECOND_MOMENT})
    of_units = True
    reads_writers = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit != "channels":
            raise PareError("lorap_mlp removes channels of MLPs: leave unit out, and compress attention with lorap.")

    def scores(self, units: Units) -> Tensor:
        scores: Tensor = units.weight.double().norm(dim=0) * units.stats.inputs.rms  # (units,)
        for part in units.group.parts:
            name = part.name.rpartition(".")[0]
            if name in units.writers and name in units.inputs and part.name.endswith(".weight"):
                rows = units.writers[name].narrow(0, part.first, len(scores) * part.width).double()
                norms = (rows * units.inputs[name].rms).norm(dim=1)  # (units * copies side by side,)
                scores = scores + norms.unflatten(0, (-1, part.width)).sum(1)
        return scores

    def compress(self, units: Units, keep: int) -> Sliced:
        check_count(units, keep)
        order = self.unit_scores(units).sort(stable=True).indices
        least = min(int(self.least * len(order)), keep)
        stay = torch.zeros_like(order, dtype=torch.bool)
        stay[order[:least]] = True
        stay[order[len(order) - (keep - least) :]] = True
        return made_up(units, stay, self.damping if self.refit else None, self.shifts)
