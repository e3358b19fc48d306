"""LLM-ROM: principal components of the layer's output, here of its covariance, with a bias that keeps the mean.

Chavan et al. 2023 (arXiv 2312.07046) take the second moment; with the bias the error is never larger.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from paredown.compress.methods.base import register
from paredown.compress.methods.lowrank.base import Factorized, affine_shift, centred
from paredown.compress.numerics.metric import Metric
from paredown.compress.numerics.moments import Need, Stats


@register("rom")
@dataclass(frozen=True)
class ROM(Factorized):
    affine: bool = True

    needs = frozenset({Need.GRAM, Need.MEAN})

    @property
    def adds_bias(self) -> bool:
        return self.affine

    def without_bias(self) -> "ROM | None":
        return None if self.affine else self

    def for_experts(self) -> "ROM":
        return replace(self, affine=False)

    def metric(self, stats: Stats) -> Metric:
        return Metric(input=centred(stats.inputs) if self.affine else stats.inputs.gram)

    def shift(self, weight: Tensor, low: Tensor, stats: Stats) -> Tensor | None:
        return affine_shift(weight, low, stats.inputs) if self.affine else None
