"""AWSVD, the attention part of LoRAP: columns weighed by the norm of their input. Li et al. 2024 (arXiv 2404.09695)."""

from dataclasses import dataclass

from paredown.compress.methods.base import register
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.numerics.metric import Metric
from paredown.compress.numerics.moments import Need, Stats


@register("awsvd")
@dataclass(frozen=True)
class AWSVD(Factorized):
    needs = frozenset({Need.SECOND_MOMENT})

    def metric(self, stats: Stats) -> Metric:
        return Metric(input=stats.inputs.second_moment_diagonal)
