"""AWSVD, the attention part of LoRAP: columns weighed by the norm of their input. Li et al. 2024 (arXiv 2404.09695)."""

from dataclasses import dataclass
from typing import ClassVar

from paredown.compress.methods import register
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.numerics.factorize import Metric
from paredown.compress.numerics.moments import InputStats


@register("awsvd")
@dataclass(frozen=True)
class AWSVD(Factorized):
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment_diagonal"})

    def metric(self, stats: InputStats) -> Metric:
        return Metric(input=stats.second_moment_diagonal)
