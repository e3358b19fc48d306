"""Ridge regression from moments."""

import torch
from torch import Tensor

from paredown.compress.numerics.spectral import cholesky_in_place


def regressed(cross: Tensor, gram: Tensor, damping: float, mean: Tensor | None = None) -> Tensor:  # (rows, in)
    """The linear map from y that predicts z best: `cross (A + damping * mean(diag A) I)^-1`, float64.

    cross = E[z y^T] (rows, in) and gram A = E[y y^T] (in, in). Where x is the dense input and y the compressed one,
    z = x - y gives the correction E with which W (I + E) y is nearest to W x. With `mean` = E[y] (in,), A is the
    covariance. Raises PareError if A cannot be factored.
    """
    damped = gram.clone() if mean is None else gram.addr(mean, mean, alpha=-1.0)  # (in, in)
    damped.diagonal().add_(damping * damped.diagonal().mean().clamp_min(1e-12))  # inputs may be constant
    lower = cholesky_in_place(damped)
    solved: Tensor = torch.linalg.solve_triangular(lower.T, cross, upper=True, left=False)  # (rows, in)
    torch.linalg.solve_triangular(lower, solved, upper=False, left=False, out=solved)
    return solved
