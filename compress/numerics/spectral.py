"""Cholesky factors, roots and eigenvectors of moments (n, n) that may be singular."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paredown.compress.errors import PareError

# relative to the largest: smaller eigenvalues of an input moment, which may be singular, count as this much
FLOOR = 1e-10
LEADING, ITERATIONS = 16, 8  # directions that are looked for before the rest is decomposed in float32
SMALL = 256  # decomposed in float64 in no time
LEAST = 1e-6  # of the mean: what damping takes a smaller entry of a diagonal for
UNFACTORED = "a moment of its data cannot be factored: raise damping, or calibrate on more text."


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), largest first and not below zero, and eigenvectors as columns (n, n)."""
    values, vectors = decomposed(torch.linalg.eigh, matrix)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def eigh_by_float32(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As `eigh`, with the bulk decomposed in float32: GPUs are far slower at it in float64, CPUs half as fast.

    float32 misses vectors by what is 1e-7 of the largest eigenvalue, and beside an attention sink that is as large as those
    at the cut. So directions that stand out are found in float64 first, and the rest is decomposed without them.
    Vectors of a float64 matrix are made orthonormal in float64, and their values are those of the matrix.
    """
    wide = (matrix.double() + matrix.T) / 2
    if len(matrix) < SMALL:
        values, vectors = eigh(wide)
        return values.to(matrix.dtype), vectors.to(matrix.dtype)
    sizes, top = _outstanding(wide)  # (d,), (n, d)
    rest = wide.addmm(top * sizes, top.T, alpha=-1.0)
    scale = rest.diagonal().mean().clamp_min(1e-300)  # into float32's range
    rest = rest.div_(scale).addmm_(top, top.T, alpha=-1.0)  # `top` has the lowest values, and so comes first
    values, vectors = decomposed(torch.linalg.eigh, rest.float())
    values = torch.cat((values[len(sizes) :].double() * scale, sizes)).clamp_min(0)
    vectors = torch.cat((vectors[:, len(sizes) :].to(matrix.dtype), top.to(matrix.dtype)), dim=1)
    if matrix.dtype == torch.float64:
        # one Newton-Schulz step: an error of 1e-6 becomes 1e-12
        vectors = torch.addmm(vectors, vectors, vectors.T @ vectors, beta=1.5, alpha=-0.5)
        values = (vectors * (matrix @ vectors)).sum(0).clamp_min(0)
    values, order = values.sort(descending=True)
    return values.to(matrix.dtype), vectors[:, order]


def _outstanding(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (d,) of a float64 matrix and their vectors (n, d), as far as subspace iteration settles.

    Those are the ones far above the others; where none is, float32 needs no help.
    """
    start = torch.randn(len(matrix), LEADING, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    basis: Tensor = torch.linalg.qr(start.to(matrix.device))[0]
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis)[0]
    across = matrix @ basis  # (n, LEADING)
    sizes, turn = decomposed(torch.linalg.eigh, basis.T @ across)
    basis, across = basis @ turn, across @ turn
    found = (across - basis * sizes).norm(dim=0) <= 1e-7 * sizes
    return sizes[found], basis[:, found]


def decomposed(by: Callable[[Tensor], Any], matrix: Tensor) -> Any:
    """`by` of the symmetric part of a matrix. Raises PareError if LAPACK gives up."""
    try:
        return by((matrix + matrix.T) / 2)
    except RuntimeError as fault:
        raise PareError(f"its eigenvalue decomposition failed ({fault}). Calibrate on more text.") from fault


def root_of(moment: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """R (in, in) with R R^T = A, and a function `rows @ R^-1`: by Cholesky, or by floored eigenvalues if A is singular."""
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(moment)
    pivots = lower.diagonal()
    if not bool(failed) and bool(pivots.min() > FLOOR**0.5 * pivots.max()):
        return lower, lambda rows: torch.linalg.solve_triangular(lower, rows, upper=False, left=False)
    values, basis = eigh(moment)
    sizes = floored(values).sqrt()  # (in,)
    return basis * sizes, lambda rows: rows / sizes @ basis.T


def cholesky(matrix: Tensor) -> Tensor:
    """The lower factor. Raises PareError for a matrix that is not positive definite."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        raise PareError(UNFACTORED)
    return factor


def divided(rows: Tensor, moment: Tensor) -> Tensor:  # (rows, k)
    """`rows @ M^-1` of a moment (k, k) that may have directions without data, slightly negative from sums in float32.

    Zeros for a moment that is nothing but rounding, as of inputs that do not vary.
    """
    for share in (FLOOR, 1e-8, 1e-6, 1e-4, 1e-2):
        factor, failed = torch.linalg.cholesky_ex(damped(moment, share * moment.diagonal().mean()))
        if not bool(failed):
            return torch.cholesky_solve(rows.T, factor).T
    return torch.zeros_like(rows)


def cholesky_in_place(matrix: Tensor) -> Tensor:
    """The lower factor of a symmetric matrix, in its own memory: transposed, because LAPACK works on columns.

    Raises PareError for a matrix that is not positive definite.
    """
    lower, failed = matrix.T, torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if bool(failed):
        raise PareError(UNFACTORED)
    return lower


def damped(matrix: Tensor, added: Tensor | float | None = None) -> Tensor:
    """A copy with `added` on the diagonal, by default as little of the mean diagonal as lets the factor exist."""
    result, digits = matrix.clone(), torch.finfo(matrix.dtype)
    if added is None:
        added = max(FLOOR, 16 * digits.eps) * matrix.diagonal().mean()
    result.diagonal().add_(added + digits.tiny)
    return result


def ridge_of(diagonal: Tensor, damping: float) -> Tensor:  # (n,)
    """What is added to a moment with this diagonal (n,), `damping` times each entry: correlations shrink by 1 + damping.

    Relative to their mean it would drown all others where a single channel is huge, as in front of an attention sink.
    """
    return damping * diagonal.clamp_min(max(LEAST * float(diagonal.mean()), 1e-12))


def floored(values: Tensor) -> Tensor:
    """The values, none below FLOOR times the largest."""
    largest = values.max()
    return values.clamp_min(float(FLOOR * largest) if largest > 0 else 1.0)
