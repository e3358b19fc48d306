"""PIFA: a matrix of low rank as some of its own rows, and coefficients that combine them into the other rows.

Zhao et al., ICML 2025 (arXiv 2501.19090).
"""

import torch
from torch import Tensor

from paredown.compress.numerics.factorize import Factors
from paredown.compress.numerics.metric import Metric, times_moment
from paredown.compress.numerics.spectral import divided


def pivoted(factors: Factors, metric: Metric, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the kind `pifa`: `pivots` (k, in), `coefficients` (out - k, k) and `order` (out,) int32.

    Rows are chosen by LU with partial pivoting, so that no entry of the triangular factor exceeds 1. The coefficients
    are then fitted, in the metric, to the rows after rounding to `dtype`. Zhao et al., ICML 2025 (arXiv 2501.19090).
    """
    rank = factors.rank
    permutation, exact = _pivot_rows(factors.left)
    rows = factors.left[permutation[:rank]] @ factors.right  # (k, in)
    pivots = rows.to(dtype)
    stored = pivots.to(rows.dtype)
    rounding = rows - stored  # (k, in)
    del rows
    weighed = times_moment(stored, metric, metric.ridge)  # (k, in)
    inner = weighed @ stored.T  # (k, k)
    del stored
    coefficients = torch.addmm(exact, exact, divided(rounding @ weighed.T, inner))
    return {"pivots": pivots, "coefficients": coefficients.to(dtype), "order": permutation.argsort().int()}


def _pivot_rows(left: Tensor) -> tuple[Tensor, Tensor]:
    """A permutation (out,) of the rows of (out, k) with the pivots first, and the coefficients (out - k, k) of the others."""
    # without a check: where columns depend on each other, the last pivots are zero, and rows of zeros are pivots
    lower, swaps, _ = torch.linalg.lu_factor_ex(left)  # (out, k), (k,)
    rows, rank = list(range(len(left))), left.shape[1]
    for place, other in enumerate(swaps.tolist()):  # LAPACK counts from 1
        rows[place], rows[other - 1] = rows[other - 1], rows[place]
    # left = L U in this order, so that the other rows are L2 U = (L2 L1^-1) L1 U
    others = torch.linalg.solve_triangular(lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True)
    return torch.tensor(rows, device=left.device), others
