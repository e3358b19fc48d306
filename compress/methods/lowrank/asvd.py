"""ASVD: columns weighed by the mean size of their input, to a power. Yuan et al. 2023 (arXiv 2312.05821)."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from paredown.compress.methods.base import register
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.numerics.metric import Metric
from paredown.compress.numerics.moments import Need, Stats


@register("asvd")
@dataclass(frozen=True)
class ASVD(Factorized):
    alpha: Annotated[float, Field(ge=0, le=2)] = 0.5

    needs = frozenset({Need.SECOND_MOMENT, Need.ABSOLUTE_MEAN})

    def metric(self, stats: Stats) -> Metric:
        return Metric(input=stats.inputs.absolute_mean.pow(2 * self.alpha))
