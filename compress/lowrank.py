"""The factorizer: minimise |L (B - W') R| over matrices W' of rank k, for any two weightings. Everything in float64.

L^T L = G weighs the output side, R R^T = A the input side; each may be a full moment, a diagonal, or nothing. B is the
weight, or what regression towards the dense model's output asks for instead. Which weightings make which paper: methods/.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.kinds import stored_numbers

FLOOR = 1e-10  # eigenvalues of an input moment below this share of the largest count as this much: it may be singular
OUTPUT_DAMPING = 1e-3  # of the mean diagonal of G: output directions that no gradient saw still count a little


@dataclass(frozen=True)
class Metric:
    """What weighs an error D (out, in): `tr(G D A D^T)`. None means the identity.

    input A: (in, in), or (in,) for a diagonal. output G: (out, out) where out <= in, and (in, in) holding W^T G W where
    out > in, which then comes with diag G in `output_diagonal`; or (out,) for a diagonal.
    """

    input: Tensor | None = None
    output: Tensor | None = None
    output_diagonal: Tensor | None = None


@dataclass(frozen=True)
class Target:
    """What is approximated: `weight @ (I + correction) + added`, (out, in) float64."""

    weight: Tensor
    correction: Tensor | None = None  # (in, in)
    added: Tensor | None = None  # (out, in); only where out <= in

    @property
    def value(self) -> Tensor:  # (out, in)
        value = self.weight if self.correction is None else self.weight + self.weight @ self.correction
        return value if self.added is None else value + self.added


@dataclass(frozen=True)
class Factors:
    """`left @ right`, (out, k) and (k, in); `losses` are all squared singular values, largest first."""

    left: Tensor
    right: Tensor
    losses: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]


def regressed(cross: Tensor, gram: Tensor, damping: float) -> Tensor:  # (rows, in)
    """Ridge regression on y of z, by their moments `cross` E[z y^T] (rows, in) and `gram` A = E[y y^T].

    `cross (A + damping * mean(diag A) I)^-1`. With x the dense input and y the compressed one, z = x - y gives the
    correction E of the linear map W (I + E) from y that is nearest to W x.
    """
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean().clamp_min(1e-12))  # inputs may never vary
    return torch.cholesky_solve(cross.T, _cholesky(damped)).T


def factorize(target: Target, metric: Metric, choose: Callable[[Tensor], int]) -> Factors:
    """The best W' of the rank that `choose(losses)` names; the loss at rank k is `losses[k:].sum()`.

    Singular moments are ordinary input. Raises PareError if a decomposition fails.
    """
    wide = target.weight.shape[0] <= target.weight.shape[1]
    return _wide(target, metric, choose) if wide else _tall(target, metric, choose)


def _wide(target: Target, metric: Metric, choose: Callable[[Tensor], int]) -> Factors:
    """P = eigenvectors of S A S^T with S = L B; W' = L^-1 P P^T S: no inverse of the input's moment."""
    value = target.value
    if metric.output is None:
        scaled, unscale = value, None
    elif metric.output.dim() == 1:
        root = _floored(metric.output).sqrt()  # (out,)
        scaled, unscale = root[:, None] * value, root
    else:
        unscale = _cholesky(_damped(metric.output, OUTPUT_DAMPING * metric.output.diagonal().mean()))  # (out, out)
        scaled = unscale.T @ value
    losses, vectors = _eigh(_weighed(scaled, metric.input) @ scaled.T)
    top = vectors[:, : choose(losses)]  # (out, k)
    right = top.T @ scaled  # (k, in)
    if unscale is None:
        left = top
    elif unscale.dim() == 1:
        left = top / unscale[:, None]
    else:
        left = torch.linalg.solve_triangular(unscale.T, top, upper=True)
    return Factors(left, right, losses)


def _tall(target: Target, metric: Metric, choose: Callable[[Tensor], int]) -> Factors:
    """V = eigenvectors of R^T B^T G B R, (in, in); W' = B R V V^T R^-1: nothing of size (out, out)."""
    value, moment = target.value, metric.input
    if metric.output is None:
        product = value.T @ value  # (in, in)
    elif metric.output.dim() == 1:
        product = value.T @ (metric.output[:, None] * value)
    else:
        assert metric.output_diagonal is not None
        assert target.added is None
        product, correction = metric.output, target.correction
        if correction is not None:
            product = product + product @ correction
            product = product + correction.T @ product
        product = product + OUTPUT_DAMPING * metric.output_diagonal.mean() * (value.T @ value)
    if moment is None:
        losses, vectors = _eigh(product)
        top = vectors[:, : choose(losses)]
        return Factors(value @ top, top.T, losses)
    if moment.dim() == 1:
        root = _floored(moment).sqrt()  # (in,)
        losses, vectors = _eigh(root[:, None] * product * root)
        top = vectors[:, : choose(losses)]
        return Factors(value @ (root[:, None] * top), top.T / root, losses)
    root = _root(moment)
    losses, vectors = _eigh(root.T @ product @ root)
    top = vectors[:, : choose(losses)]
    return Factors(value @ (root @ top), torch.linalg.solve(root.T, top).T, losses)


def error(difference: Tensor, metric: Metric, weight: Tensor) -> float:
    """`tr(G D A D^T)` of D (out, in), float64; where G is only known as W^T G W, of the part of D within W's columns."""
    if metric.output is not None and metric.output.dim() == 2 and weight.shape[0] > weight.shape[1]:
        # D = W E
        small = torch.cholesky_solve(weight.T @ difference, _cholesky(_damped(weight.T @ weight)))  # (in, in)
        return float(((metric.output @ _weighed(small, metric.input)) * small).sum())
    weighed = _weighed(difference, metric.input)  # (out, in)
    if metric.output is not None:
        weighed = metric.output[:, None] * weighed if metric.output.dim() == 1 else metric.output @ weighed
    return float((weighed * difference).sum())


def share_lost(aim: Tensor, made: Tensor, metric: Metric, weight: Tensor) -> float:
    """The error of `made` towards `aim` (out, in), as a share of what dropping the whole weight would cost. float64."""
    return error(aim - made, metric, weight) / max(error(weight, metric, weight), 1e-300)


def balanced(factors: Factors) -> tuple[Tensor, Tensor]:
    """The two factors with each component's size split evenly, so that neither loses digits when it is narrowed."""
    left, right = factors.left, factors.right
    ratio = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-300)).clamp_min(1e-300).sqrt()  # (k,)
    return left * ratio, right / ratio[:, None]


def pivoted(factors: Factors, metric: Metric, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same matrix as some of its rows and what the others are made of them: the tensors of the kind `pifa`.

    Rows are chosen by LU with partial pivoting, so that no coefficient of the triangle exceeds 1; coefficients are then
    fitted to the rows as they are stored, in `dtype`. Zhao et al., ICML 2025 (arXiv 2501.19090).
    """
    left, right, rank = factors.left, factors.right, factors.rank
    permutation = _pivot_rows(left)  # (out,): which row stands at each place
    pivots = (left[permutation[:rank]] @ right).to(dtype)  # (k, in)
    chosen, others = left[permutation[:rank]], left[permutation[rank:]]
    exact = torch.linalg.solve(chosen.T, others.T).T  # (out - k, k): of the rows before they are rounded
    stored = pivots.to(left.dtype)
    weighed = _weighed(stored, metric.input)  # (k, in)
    inner = _damped(weighed @ stored.T, FLOOR * float((weighed * stored).sum()) / rank)
    missed = (others @ right - exact @ stored) @ weighed.T  # (out - k, k)
    coefficients = exact + torch.cholesky_solve(missed.T, _cholesky(inner)).T
    return {"pivots": pivots, "coefficients": coefficients.to(dtype), "order": permutation.argsort().int()}


def largest_rank(kind: str, shape: tuple[int, int], numbers: float, bias: bool = False) -> int:
    """The largest rank whose storage takes at most so many numbers, 0 if there is none."""
    numbers += 1e-6  # shares are decimal fractions: 0.29 of 100 is 29
    return bisect_right(range(1, min(shape) + 1), numbers, key=lambda rank: cost(kind, shape, rank, bias))


def cost(kind: str, shape: tuple[int, int], rank: int, bias: bool = False, kept: int = 0) -> int:
    """Numbers that a weight of this kind, shape and rank stores."""
    spec: Mapping[str, object] = {"kind": kind, "shape": shape, "rank": rank, "bias": bias, "kept": kept}
    return stored_numbers(spec)


def _pivot_rows(left: Tensor) -> Tensor:  # (out,) int64
    rows = list(range(len(left)))
    for place, other in enumerate(torch.linalg.lu_factor(left)[1].tolist()):  # LAPACK counts from 1
        rows[place], rows[other - 1] = rows[other - 1], rows[place]
    return torch.tensor(rows, device=left.device)


def _weighed(rows: Tensor, moment: Tensor | None) -> Tensor:
    """`rows @ A`, (rows, in)."""
    if moment is None:
        return rows
    return rows * moment if moment.dim() == 1 else rows @ moment


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first and not below zero, with their vectors as columns."""
    try:
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    except RuntimeError as fault:
        raise PareError(f"its eigenvalue decomposition failed ({fault}). Calibrate on more text.") from fault
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _root(moment: Tensor) -> Tensor:  # (in, in)
    """R with R R^T = A and an inverse: by Cholesky, and by the eigenvalues, floored, where A is singular."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(moment)
    pivots = root.diagonal()
    if not bool(failed) and bool(pivots.min() > FLOOR**0.5 * pivots.max()):
        return root
    values, basis = _eigh(moment)
    return basis * _floored(values).sqrt()


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        raise PareError("a moment of its data cannot be factored: raise damping, or calibrate on more text.")
    return factor


def _damped(matrix: Tensor, added: Tensor | float | None = None) -> Tensor:
    added = FLOOR * matrix.diagonal().mean() if added is None else added
    return matrix + (added + 1e-300) * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _floored(values: Tensor) -> Tensor:
    largest = values.max()
    return values.clamp_min(float(FLOOR * largest) if largest > 0 else 1.0)
