"""Truncated SVD of the weight alone: the baseline of all weighted methods. Eckart & Young 1936."""

from dataclasses import dataclass

from paredown.compress.methods.base import register
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.numerics.metric import Metric
from paredown.compress.numerics.moments import Stats


@register("svd")
@dataclass(frozen=True)
class SVD(Factorized):
    def metric(self, stats: Stats) -> Metric:
        return Metric()
