"""ASVD: columns weighed by the mean size of their input, to a power. Yuan et al. 2023 (arXiv 2312.05821)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from paredown.compress.methods import register
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.numerics.factorize import Metric
from paredown.compress.numerics.moments import InputStats


@register("asvd")
@dataclass(frozen=True)
class ASVD(Factorized):
    alpha: Annotated[float, Field(ge=0, le=2)] = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment_diagonal", "absolute_mean"})

    def metric(self, stats: InputStats) -> Metric:
        return Metric(input=stats.absolute_mean.pow(2 * self.alpha))
