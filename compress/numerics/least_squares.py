"""Ridge regression from moments."""

import torch
from torch import Tensor

from paredown.compress.numerics.spectral import cholesky_in_place, ridge_of

ROUNDING = 1e-5  # of sums in float32, relative to the mean square of the inputs


def regressed(
    cross: Tensor, gram: Tensor, damping: float, mean: Tensor | None = None, each: bool = False
) -> Tensor:  # (rows, in)
    """The linear map from y that predicts z best: `cross (A + damping * mean(diag A) I)^-1`, float64.

    With `each` the damping is relative to each input's own moment: `cross (A + damping * diag A)^-1`.
    cross = E[z y^T] (rows, in) and gram A = E[y y^T] (in, in). Where x is the dense input and y the compressed one,
    z = x - y gives the correction E with which W (I + E) y is nearest to W x. With `mean` = E[y] (in,), A is the
    covariance. Raises PareError if A cannot be factored.
    """
    lower = _factored(gram, damping, mean, each)
    solved: Tensor = torch.linalg.solve_triangular(lower.T, cross, upper=True, left=False)  # (rows, in)
    torch.linalg.solve_triangular(lower, solved, upper=False, left=False, out=solved)
    return solved


def _factored(gram: Tensor, damping: float, mean: Tensor | None, each: bool) -> Tensor:
    """The lower factor of the damped A. The covariance of inputs that hardly vary is rounding, and that much is added."""
    damped = gram.clone() if mean is None else gram.addr(mean, mean, alpha=-1.0)  # (in, in)
    varying = damped.diagonal()  # (in,)
    added = ridge_of(varying, damping) if each else damping * varying.mean().clamp_min(1e-12)
    if mean is not None:
        rounding = ROUNDING * gram.diagonal()
        added = added + rounding.where(varying <= rounding, 0.0)
    damped.diagonal().add_(added)
    return cholesky_in_place(damped)
