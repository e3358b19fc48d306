"""Ours: two-sided Fisher, affine, reduced-rank regression towards the dense output, ranks by one budget, PIFA storage.

Each part can be switched off by its option: evaluation/BENCHMARKS.md shows what it is worth.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from paredown.compress.methods import Damping, register
from paredown.compress.methods.lowrank.base import Factorized, affine_shift, dense64
from paredown.compress.numerics.edits import LowRank
from paredown.compress.numerics.factorize import (
    OUTPUT_DAMPING,
    Metric,
    Target,
    largest_rank,
    measured,
    regressed,
    spectrum,
)
from paredown.compress.numerics.moments import InputStats


@register("paredown_lowrank")
@dataclass(frozen=True)
class ParedownLowRank(Factorized):
    storage: Literal["factors", "pifa"] = "pifa"
    two_sided: bool = True  # weigh the output side by the gradient of the loss
    affine: bool = True  # keep the mean output by a bias
    regression: bool = True  # aim at the dense model's output, from the compressed model's input
    residual: bool = True  # let layers that write to the residual stream make up for what it has lost; with regression
    damping: Damping = 0.3  # what a change of the weight itself costs, as a share of the input's mean moment
    output_damping: Damping = 0.5  # of the gradient's moment, likewise: one average of a curvature that varies by token
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

    def metric(self, stats: InputStats, gram: Tensor | None = None) -> Metric:
        """`gram`, here and below: that of `stats`, where it is at hand; each one made is a large copy."""
        gram = stats.gram if gram is None else gram
        mean = stats.mean if self.affine else None
        metric = Metric(
            gram, mean=mean, input_damping=self.damping if self.regression else 0.0, output_damping=self.output_damping
        )
        if not self.two_sided:
            return metric
        output, diagonal = stats.gradient("output_gradient"), stats.gradient("output_gradient_diagonal")
        return replace(metric, output=output, output_diagonal=diagonal)

    def losses(self, weight: Tensor, stats: InputStats) -> Tensor:
        """Without a bias, which few layers get; hardly damped, as the budget weighs the second order of the model's loss."""
        plain = replace(self, affine=False, damping=0.0, output_damping=OUTPUT_DAMPING)
        return spectrum(plain.target(weight, stats), plain.metric(stats))

    def target(self, weight: Tensor, stats: InputStats, gram: Tensor | None = None) -> Target:
        """Towards the dense output: the correction of the input for a tall weight, for a wide one what it adds up to."""
        makes_up = self._makes_up(stats)
        if not self.regression or not (makes_up or "cross" in stats.needs):
            return Target(weight.double())  # a survey of the dense model has one stream
        gram, mean = stats.gram if gram is None else gram, stats.mean if self.affine else None
        if makes_up:
            wanted = stats.gradient("missing")  # (out, in)
            if mean is not None:
                wanted = wanted.addr(stats.gradient("missing_mean"), mean, alpha=-1.0)
        else:
            change = stats.cross.sub_(gram)  # (in, in)
            if mean is not None:
                change.addr_(stats.dense_mean - mean, mean, alpha=-1.0)
            if weight.shape[0] > weight.shape[1]:
                return Target(weight.double(), correction=regressed(change, gram, self.damping, mean))
            wanted = weight.double() @ change
            del change
        added = regressed(wanted, gram, self.damping, mean)
        return Target(weight.double(), added=added)

    def shift(self, weight: Tensor, made: Tensor, stats: InputStats) -> Tensor | None:
        if not self.affine:
            return None
        if self._makes_up(stats):
            return (weight.double() - made) @ stats.mean + stats.gradient("missing_mean")
        return affine_shift(weight, made, stats)

    def compress(self, weight: Tensor, stats: InputStats) -> LowRank | None:
        """With a bias only where that loses less than a few more components for the same numbers."""
        shape = (weight.shape[0], weight.shape[1])
        if not self.affine or self.planned_rank(shape) == 0:
            return super().compress(weight, stats)
        plain, gram = replace(self, affine=False), stats.gram
        target, metric = plain.target(weight, stats, gram), plain.metric(stats, gram)
        without = plain.approximate(target, metric, weight.dtype)
        if without is None:
            return None
        made = dense64(without, weight.dtype)  # (out, in)
        seen, missed = target.seen(made, metric), self.shift(weight, made, stats)
        without = replace(without, loss=target.lost(seen, metric) / max(target.dropped(metric), 1e-300))
        rank = largest_rank(self.kind, shape, plain.numbers(shape, without.rank), bias=True)
        if not rank:
            return without
        del made, target
        target, metric = self.target(weight, stats, gram), self.metric(stats, gram)
        shifted = self.with_rank(rank).approximate(target, metric, weight.dtype)
        if shifted is None or missed is None:
            return without
        # the two forms differ in what varies and, without a bias, in the mean output
        means = target.seen(missed[:, None], metric)
        lost = target.lost(seen, metric) + measured(means, replace(metric, input=None, mean=None))
        del seen
        made = dense64(shifted, weight.dtype)
        varying = target.lost(target.seen(made, metric), metric)
        if lost <= varying:
            return without
        loss = varying / max(target.dropped(metric), 1e-300)
        return replace(shifted, shift=self.shift(weight, made, stats), loss=loss)

    def _makes_up(self, stats: InputStats) -> bool:
        return self.regression and self.residual and stats.has("missing")
