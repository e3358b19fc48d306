"""Ours: two-sided Fisher, reduced-rank regression towards the dense output, ranks by one budget, PIFA storage.

Each part can be switched off by its option, and biases on; evaluation/BENCHMARKS.md shows what each is worth.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from paredown.compress.methods.base import Damping, register
from paredown.compress.methods.lowrank.base import Factorized, affine_shift, rounded
from paredown.compress.numerics.edits import Factored
from paredown.compress.numerics.factorize import factorize, largest_rank, spectrum, steps
from paredown.compress.numerics.least_squares import regressed
from paredown.compress.numerics.metric import OUTPUT_DAMPING, Metric, Target, measured
from paredown.compress.numerics.moments import Labels, Need, Residual, Stats

STEADY = 0.1  # damping from which on float32 will do


@register("paredown_lowrank")
@dataclass(frozen=True)
class ParedownLowRank(Factorized):
    storage: Literal["factors", "pifa"] = "pifa"
    two_sided: bool = True  # weigh the output side by the moment of the loss's gradient
    affine: bool = False  # keep the mean output with a bias where that loses less
    regression: bool = True  # approximate the dense model's output from the compressed model's input
    residual: bool = True  # layers that write to the residual stream make up for its error; needs regression
    damping: Damping = 0.3  # the cost of changing a weight, relative to the moment of its input
    output_damping: Damping = 0.5  # likewise for the gradient's moment, an average of a curvature that varies by token
    gradient_windows: Annotated[int, Field(ge=1)] = 64  # of the calibration text, on which gradients are taken
    labels: Labels = "data"  # empirical Fisher, or the true one with tokens drawn from the model
    # what ranks are chosen by: the second-order loss of each token by itself, or of averages over tokens (K-FAC), which
    # prices a token with huge activations and a small gradient, an attention sink, far too high
    curves: Literal["direct", "kfac"] = "direct"

    strategy = "global"

    @property
    def needs(self) -> frozenset[Need]:
        asked = {
            Need.GRAM: True,
            Need.MEAN: self.affine,
            Need.CROSS: self.regression,
            Need.RESIDUAL: self.regression and self.residual,
            Need.OUTPUT_GRADIENT: self.two_sided,
        }
        return frozenset(need for need, wanted in asked.items() if wanted)

    @property
    def precision(self) -> torch.dtype:
        """float32 where damping bounds how ill-conditioned moments are; a covariance loses digits with its mean."""
        dampings = [self.damping, *([self.output_damping] if self.two_sided else [])]
        steady = self.regression and not self.affine and min(dampings) >= STEADY
        return torch.float32 if steady else torch.float64

    @property
    def reads_pairs(self) -> bool:
        return self.two_sided and self.curves == "direct"

    def without_bias(self) -> "ParedownLowRank":
        return replace(self, affine=False)

    def for_experts(self) -> "ParedownLowRank":
        return replace(self, affine=False)

    def metric(self, stats: Stats, gram: Tensor | None = None) -> Metric:
        """gram (in, in), here and below: that of `stats`, if the caller has it already, to save a large copy."""
        gram = stats.inputs.gram if gram is None else gram
        mean = stats.inputs.mean if self.affine else None
        metric = Metric(
            gram, mean=mean, input_damping=self.damping if self.regression else 0.0, output_damping=self.output_damping
        )
        if not self.two_sided:
            return metric
        output, diagonal = stats.gradient(Need.OUTPUT_GRADIENT), stats.gradient(Need.OUTPUT_GRADIENT_DIAGONAL)
        return replace(metric, output=output, output_diagonal=diagonal)

    def losses(self, weight: Tensor, stats: Stats) -> Tensor:
        """Without a bias, which few layers get. In nats per token, from tokens themselves where `stats` holds some.

        By averages over tokens they are hardly damped: the budget compares second-order losses of the model.
        """
        if stats.pairs:
            plain = replace(self, affine=False, regression=False)
            stats = stats.at(self.precision)
            metric = replace(plain.metric(stats), input_damping=self.damping)
            return steps(factorize(plain.target(weight, stats), metric, len), stats.pairs)
        plain = replace(self, affine=False, damping=0.0, output_damping=OUTPUT_DAMPING)
        return spectrum(plain.target(weight, stats), plain.metric(stats)) / 2

    def target(self, weight: Tensor, stats: Stats, gram: Tensor | None = None) -> Target:
        """Towards the dense output: a correction of the input for a tall weight, a change of the weight for a wide one."""
        inputs, residual = stats.inputs, self._residual(stats)
        if not self.regression or not (residual or Need.CROSS in inputs.needs):
            return super().target(weight, stats)  # a survey of the dense model follows one stream only
        gram, mean = inputs.gram if gram is None else gram, inputs.mean if self.affine else None
        if residual:
            wanted = residual.missing  # (out, in)
            if mean is not None:
                wanted = wanted.addr(residual.missing_mean, mean, alpha=-1.0)
        else:
            change = inputs.cross.sub_(gram)  # (in, in)
            if mean is not None:
                change.addr_(inputs.dense_mean - mean, mean, alpha=-1.0)
            if weight.shape[0] > weight.shape[1]:
                return Target(weight.to(gram.dtype), correction=regressed(change, gram, self.damping, mean, each=True))
            wanted = weight.to(gram.dtype) @ change
            del change
        added = regressed(wanted, gram, self.damping, mean, each=True)
        return Target(weight.to(gram.dtype), added=added)

    def shift(self, weight: Tensor, low: Tensor, stats: Stats) -> Tensor | None:
        if not self.affine:
            return None
        if residual := self._residual(stats):
            return (weight.double() - low) @ stats.inputs.mean + residual.missing_mean
        return affine_shift(weight, low, stats.inputs)

    def compress(self, weight: Tensor, stats: Stats) -> Factored | None:
        """With a bias only if less is lost so than with a few more components for the same numbers."""
        shape = (weight.shape[0], weight.shape[1])
        if not self.affine or self.planned_rank(shape) == 0:
            return super().compress(weight, stats)
        plain, gram = replace(self, affine=False), stats.inputs.gram
        target, metric = plain.target(weight, stats, gram), plain.metric(stats, gram)
        without = plain.approximate(target, metric, weight.dtype)
        if without is None:
            return None
        low = rounded(without, weight.dtype).double()  # (out, in)
        projected, shift = target.projected(low, metric), self.shift(weight, low, stats)
        without_loss = target.error_of(projected, metric) / max(target.error_of_zero(metric), 1e-300)
        without = replace(without, loss=without_loss, aim=target.aim)
        rank = largest_rank(self.kind, shape, plain.numbers(shape, without.rank), True, self.rank_multiple)
        if not rank:
            return without
        del low, target
        target, metric = self.target(weight, stats, gram), self.metric(stats, gram)
        shifted = self.at(rank).approximate(target, metric, weight.dtype)
        if shifted is None or shift is None:
            return without
        # the two forms differ in what varies and, without a bias, in the mean output
        means = target.projected(shift[:, None], metric)
        error = target.error_of(projected, metric) + measured(means, replace(metric, input=None, mean=None))
        del projected
        low = rounded(shifted, weight.dtype).double()
        varying = target.error_of(target.projected(low, metric), metric)
        if error <= varying:
            return without
        loss = varying / max(target.error_of_zero(metric), 1e-300)
        return replace(shifted, shift=self.shift(weight, low, stats), loss=loss, aim=target.aim)

    def _residual(self, stats: Stats) -> Residual | None:
        """The error of the residual stream, if the layer writes to it and the options ask for it."""
        return stats.residual if self.regression and self.residual else None
