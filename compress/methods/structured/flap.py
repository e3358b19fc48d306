"""FLAP: channels that vary little go, and a bias makes up for their means. An et al. 2023 (arXiv 2312.11983).

S_j = (E[a_j^2] - E[a_j]^2) |W_:j|^2, the paper's WIFV; the bias gains W_R E[a_R] for the channels R that go. With
`widths: flap` all layers share one budget as in the paper: the scores are standardised within each layer, and those channels
of all layers stay whose scores are then highest. By default all layers get the same width.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from paredown.compress.methods.base import Units, register
from paredown.compress.methods.structured.width import Scored
from paredown.compress.numerics.moments import Need


@register("flap")
@dataclass(frozen=True)
class Flap(Scored):
    bias: bool = True
    widths: Literal["uniform", "flap"] = "uniform"

    reads = frozenset({Need.SECOND_MOMENT, Need.MEAN})

    @property
    def shifts(self) -> bool:
        return self.bias

    @property
    def uneven(self) -> bool:
        return self.widths == "flap"

    def scores(self, units: Units) -> Tensor:
        inputs = units.stats.inputs
        variance = inputs.second_moment_diagonal - inputs.mean.square()  # (in,)
        return variance.clamp_min(0) * units.weight.double().square().sum(0)
