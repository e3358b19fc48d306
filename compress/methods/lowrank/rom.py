"""LLM-ROM: principal components of the layer's output, here of its covariance, the mean kept by a bias.

Chavan et al. 2023 (arXiv 2312.07046), which takes the second moment; with the bias the error is never larger.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from paredown.compress.methods import register
from paredown.compress.methods.lowrank.base import Factorized, affine_shift, centred
from paredown.compress.numerics.factorize import Metric
from paredown.compress.numerics.moments import InputStats


@register("rom")
@dataclass(frozen=True)
class ROM(Factorized):
    affine: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "mean"})

    @property
    def adds_bias(self) -> bool:
        return self.affine

    def metric(self, stats: InputStats) -> Metric:
        return Metric(input=centred(stats) if self.affine else stats.gram)

    def shift(self, weight: Tensor, made: Tensor, stats: InputStats) -> Tensor | None:
        return affine_shift(weight, made, stats) if self.affine else None
