"""How an error D of a weight is measured, `tr(G D A D^T)`, and which matrix is approximated.

G = L^T L weighs the output side and A = R R^T the input side; each may be a full moment, a diagonal, or the identity.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from paredown.compress.numerics.spectral import cholesky, damped, ridge_of

OUTPUT_DAMPING = 1e-3  # of the mean diagonal of G: output directions without any gradient still count a little


@dataclass(frozen=True)
class Metric:
    """How an error D (out, in) is weighed: `tr(G D A D^T)`; None means the identity. All in one precision.

    input: A (in, in), or its diagonal (in,); with `mean` (in,), A - mean mean^T.
    output: G (out, out), or its diagonal (out,); where out > in it is "folded", W^T G W (in, in), and comes with diag G
    (out,) in `output_diagonal`.
    A solver adds `input_damping` times its own diagonal to a full A, and `output_damping` times its mean diagonal to a full
    G; errors are measured without.
    """

    input: Tensor | None = None
    output: Tensor | None = None
    output_diagonal: Tensor | None = None
    mean: Tensor | None = None
    output_damping: float = OUTPUT_DAMPING
    input_damping: float = 0.0

    @cached_property
    def ridge(self) -> Tensor | None:  # (in,)
        """What a solver adds to the diagonal of a full A."""
        if not self.input_damping or self.input is None:
            return None
        diagonal = self.input.diagonal() if self.mean is None else self.input.diagonal() - self.mean.square()
        return ridge_of(diagonal, self.input_damping)

    def folded(self, shape: tuple[int, ...]) -> bool:
        """Whether only W^T G W is known of the G of a weight of this shape (out, in)."""
        return self.output is not None and self.output.dim() == 2 and shape[0] > shape[1]


@dataclass(frozen=True)
class Target:
    """The matrix to approximate: `weight @ (I + correction) + added`, (out, in), in the precision of the metric."""

    weight: Tensor
    correction: Tensor | None = None  # (in, in)
    added: Tensor | None = None  # (out, in); only where out <= in

    @property
    def value(self) -> Tensor:  # (out, in)
        value = self.weight if self.correction is None else torch.addmm(self.weight, self.weight, self.correction)
        return value if self.added is None else value + self.added

    @property
    def aim(self) -> Tensor | None:  # (out, in) float32
        """The matrix itself, where it is not the weight."""
        return None if self.correction is None and self.added is None else self.value.float()

    @cached_property
    def square(self) -> Tensor:  # (in, in)
        return self.weight.T @ self.weight

    def within_columns(self, matrix: Tensor) -> Tensor:  # (in, in)
        """E for which `weight @ E` is nearest to a matrix (out, in): its projection on the span of the weight's columns."""
        return torch.cholesky_solve(self.weight.T @ matrix, cholesky(damped(self.square)))

    def projected(self, matrix: Tensor, metric: Metric) -> Tensor:
        """All that the metric measures of an approximation (out, in), for `error_of`: E (in, in) where G is folded."""
        return self.within_columns(matrix) if metric.folded(self.weight.shape) else matrix

    def error_of(self, projected: Tensor, metric: Metric) -> float:
        """The error of an approximation, given what `projected` returns for it."""
        if not metric.folded(self.weight.shape):
            return measured(self.value - projected, metric)
        wrong = -projected if self.correction is None else self.correction - projected  # (in, in)
        wrong.diagonal().add_(1.0)
        return measured(wrong, metric)

    def error_of_zero(self, metric: Metric) -> float:
        """The error of a weight of zeros."""
        if not metric.folded(self.weight.shape) or metric.input is None or metric.input.dim() == 1:
            return error(self.weight, metric, self.weight)
        assert metric.output is not None  # and E is the identity
        total = (metric.output * metric.input).sum(dtype=torch.float64)
        return float(total if metric.mean is None else total - metric.mean @ metric.output @ metric.mean)


def error(difference: Tensor, metric: Metric, weight: Tensor) -> float:
    """`tr(G D A D^T)` of D (out, in); where G is folded, of the projection of D on the span of W's columns."""
    return measured(Target(weight).projected(difference, metric), metric)


def measured(wrong: Tensor, metric: Metric) -> float:
    """`tr(G D A D^T)` of D as `Target.projected` returns it, summed in float64."""
    weighed = times_moment(wrong, metric)
    if metric.output is not None:
        weighed = metric.output[:, None] * weighed if metric.output.dim() == 1 else metric.output @ weighed
    return float((weighed * wrong).sum(dtype=torch.float64))


def share_lost(aim: Tensor, result: Tensor, metric: Metric, weight: Tensor) -> float:
    """The error of `result` towards `aim`, both (out, in) float64, relative to that of a weight of zeros."""
    return error(aim - result, metric, weight) / max(error(weight, metric, weight), 1e-300)


def times_moment(rows: Tensor, metric: Metric, ridge: Tensor | None = None) -> Tensor:
    """`rows @ (A + diag(ridge))`, (rows, in)."""
    moment, mean = metric.input, metric.mean
    if moment is None:
        return rows
    if moment.dim() == 1:
        return rows * moment
    weighed = rows @ moment
    if ridge is not None:
        weighed.addcmul_(rows, ridge)
    return weighed if mean is None else weighed.addr_(rows @ mean, mean, alpha=-1.0)
