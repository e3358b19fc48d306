"""Ours: two-sided Fisher, affine, reduced-rank regression towards the dense output, ranks by one budget, PIFA storage.

Each part can be switched off by its option: evaluation/BENCHMARKS.md shows what it is worth.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from paredown.compress.edits import LowRank
from paredown.compress.factorized import Factorized, affine_shift, centred
from paredown.compress.lowrank import Metric, Target, error, largest_rank, regressed
from paredown.compress.methods import Damping, register
from paredown.compress.statistics import InputStats


@register("paredown_lowrank")
@dataclass(frozen=True)
class ParedownLowRank(Factorized):
    storage: Literal["factors", "pifa"] = "pifa"
    two_sided: bool = True  # weigh the output side by the gradient of the loss
    affine: bool = True  # keep the mean output by a bias
    regression: bool = True  # aim at the dense model's output, from the compressed model's input
    residual: bool = True  # let layers that write to the residual stream make up for what it has lost; with regression
    damping: Damping = 0.01  # of the regression, as a share of the mean diagonal of the input's moment
    labels: Literal["data", "sampled"] = "data"  # empirical Fisher, or the true one by the model's own draws

    allocation: ClassVar[str] = "global"

    @property
    def needs(self) -> frozenset[str]:
        asked = {
            "gram": True,
            "mean": self.affine,
            "cross": self.regression,
            "residual": self.regression and self.residual,
            "output_gradient": self.two_sided,
        }
        return frozenset(name for name, wanted in asked.items() if wanted)

    def metric(self, stats: InputStats) -> Metric:
        moment = centred(stats) if self.affine else stats.gram
        if not self.two_sided:
            return Metric(moment)
        return Metric(moment, stats.gradient("output_gradient"), stats.gradient("output_gradient_diagonal"))

    def target(self, weight: Tensor, stats: InputStats) -> Target:
        """Towards the dense output: the correction of the input for a tall weight, for a wide one what it adds up to."""
        wide = weight.double()
        if not self.regression or "cross" not in stats.needs:  # a survey of the dense model has one stream
            return Target(wide)
        gram, change = stats.gram, stats.cross
        if self.affine:
            gram, change = centred(stats), change.addr_(stats.dense_mean, stats.mean, alpha=-1.0)
        change -= gram
        if weight.shape[0] > weight.shape[1]:
            return Target(wide, correction=regressed(change, gram, self.damping))
        wanted = wide @ change  # (out, in)
        if self._makes_up(stats):
            wanted += stats.gradient("residual")
            if self.affine:
                wanted.addr_(stats.gradient("residual_mean"), stats.mean, alpha=-1.0)
        return Target(wide, added=regressed(wanted, gram, self.damping))

    def shift(self, weight: Tensor, made: Tensor, stats: InputStats) -> Tensor | None:
        if not self.affine:
            return None
        lost = stats.gradient("residual_mean") if self._makes_up(stats) else 0.0
        return affine_shift(weight, made, stats) + lost

    def compress(self, weight: Tensor, stats: InputStats) -> LowRank | None:
        """With a bias only where that loses less than a few more components for the same numbers."""
        if not self.affine:
            return super().compress(weight, stats)
        plain = replace(self, affine=False)
        without = plain.compress(weight, stats)
        if without is None:
            return None
        shape = (weight.shape[0], weight.shape[1])
        rank = largest_rank(self.kind, shape, plain.numbers(shape, without.rank), bias=True)
        shifted = Factorized.compress(self.with_rank(rank), weight, stats) if rank else None
        if shifted is None:
            return without
        aim, metric = self.target(weight, stats).value, self.metric(stats)
        return min(without, shifted, key=lambda edit: self._lost(edit, aim, metric, weight, stats))

    def _lost(self, edit: LowRank, aim: Tensor, metric: Metric, weight: Tensor, stats: InputStats) -> float:
        """Of what varies and, without a bias, of the mean output: the two forms differ in both."""
        wide, made = weight.double(), edit.dense().double()
        varying = error(aim - made, metric, wide)
        missed = self.shift(weight, made, stats) if edit.shift is None else None  # (out,)
        return varying if missed is None else varying + error(missed[:, None], replace(metric, input=None), wide)

    def _makes_up(self, stats: InputStats) -> bool:
        return self.regression and self.residual and stats.has("residual")
