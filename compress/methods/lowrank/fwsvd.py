"""FWSVD: rows weighed by the Fisher information of their weights, summed over a row. Hsu et al. 2022 (arXiv 2207.00112)."""

from dataclasses import dataclass
from typing import Literal

from paredown.compress.methods import register
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.numerics.factorize import Metric
from paredown.compress.numerics.moments import InputStats


@register("fwsvd")
@dataclass(frozen=True)
class FWSVD(Factorized):
    # whose gradient is squared: that of each sequence, as the paper's of a batch, or that of each token
    gradient: Literal["per_sequence", "per_token"] = "per_sequence"
    labels: Literal["data", "sampled"] = "data"  # empirical Fisher, or the true one by the model's own draws

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"second_moment_diagonal", self._rows})

    def metric(self, stats: InputStats) -> Metric:
        return Metric(output=stats.gradient(self._rows))

    @property
    def _rows(self) -> str:
        return "fisher_rows" if self.gradient == "per_sequence" else "fisher_rows_per_token"
