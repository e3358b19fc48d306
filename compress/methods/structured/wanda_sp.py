"""Wanda by whole channels: S_j = sum_i |W_ij| (E[a_j^2])^(1/2). The baseline Wanda-sp of An et al. 2023 (arXiv 2312.11983).

The score of single weights is that of Sun et al. 2023 (arXiv 2306.11695).
"""

from dataclasses import dataclass

from torch import Tensor

from paredown.compress.methods.base import Units, register
from paredown.compress.methods.structured.width import Scored
from paredown.compress.numerics.moments import Need


@register("wanda_sp")
@dataclass(frozen=True)
class WandaSp(Scored):
    reads = frozenset({Need.SECOND_MOMENT})

    def scores(self, units: Units) -> Tensor:
        return units.weight.double().abs().sum(0) * units.stats.inputs.rms
