"""Ours: two-sided Fisher, affine, reduced-rank regression towards the dense output, ranks by one budget, PIFA storage.

Each part can be switched off by its option: evaluation/BENCHMARKS.md shows what it is worth.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from paredown.compress.factorized import Factorized, affine_shift, centred
from paredown.compress.lowrank import Metric, Target, regression
from paredown.compress.methods import Damping, register
from paredown.compress.statistics import InputStats


@register("paredown_lowrank")
@dataclass(frozen=True)
class ParedownLowRank(Factorized):
    storage: Literal["factors", "pifa"] = "pifa"
    two_sided: bool = True  # weigh the output side by the gradient of the loss
    affine: bool = True  # keep the mean output by a bias
    regression: bool = True  # aim at the dense model's output, from the compressed model's input
    damping: Damping = 0.01  # of the regression, as a share of the mean diagonal of the input's moment
    labels: Literal["data", "sampled"] = "data"  # empirical Fisher, or the true one by the model's own draws

    allocation: ClassVar[str] = "global"

    @property
    def needs(self) -> frozenset[str]:
        asked = {"gram": True, "mean": self.affine, "cross": self.regression, "output_gradient": self.two_sided}
        return frozenset(name for name, wanted in asked.items() if wanted)

    @property
    def adds_bias(self) -> bool:
        return self.affine

    def metric(self, stats: InputStats) -> Metric:
        moment = centred(stats) if self.affine else stats.gram
        if not self.two_sided:
            return Metric(moment)
        return Metric(moment, stats.gradient("output_gradient"), stats.gradient("output_gradient_diagonal"))

    def target(self, weight: Tensor, stats: InputStats) -> Target:
        if "cross" not in stats.needs:  # a survey of the dense model: both streams are one
            return Target(weight.double())
        gram, cross = stats.gram, stats.cross
        if self.affine:
            gram, cross = centred(stats), cross.addr_(stats.dense_mean, stats.mean, alpha=-1.0)
        return Target(weight.double(), regression(gram, cross, self.damping))

    def shift(self, weight: Tensor, made: Tensor, stats: InputStats) -> Tensor | None:
        return affine_shift(weight, made, stats) if self.affine else None
