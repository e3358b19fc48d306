"""FWSVD: rows weighed by the Fisher information of their weights, summed over a row. Hsu et al. 2022 (arXiv 2207.00112)."""

from dataclasses import dataclass
from typing import Literal

from paredown.compress.methods.base import register
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.numerics.metric import Metric
from paredown.compress.numerics.moments import Labels, Need, Stats


@register("fwsvd")
@dataclass(frozen=True)
class FWSVD(Factorized):
    # which gradient is squared: that of each sequence, as the paper squares that of each batch, or that of each token
    gradient: Literal["per_sequence", "per_token"] = "per_sequence"
    labels: Labels = "data"  # empirical Fisher, or the true one with tokens drawn from the model

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.SECOND_MOMENT, self._rows})

    def metric(self, stats: Stats) -> Metric:
        return Metric(output=stats.gradient(self._rows))

    @property
    def _rows(self) -> Need:
        return Need.FISHER_ROWS if self.gradient == "per_sequence" else Need.FISHER_ROWS_PER_TOKEN
