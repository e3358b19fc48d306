"""Truncated SVD of the weight alone: the baseline that every weighting must beat. Eckart & Young 1936."""

from dataclasses import dataclass
from typing import ClassVar

from paredown.compress.methods import register
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.numerics.factorize import Metric
from paredown.compress.numerics.moments import InputStats


@register("svd")
@dataclass(frozen=True)
class SVD(Factorized):
    # not read by the factors: it weighs the error that the report tells
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment_diagonal"})

    def metric(self, stats: InputStats) -> Metric:
        return Metric()
