"""The factorizer: minimise |L (B - W') R| over matrices W' of rank k, for any two weightings. In float64; eigenvectors
on a GPU begin in float32.

L^T L = G weighs the output side, R R^T = A the input side; each may be a full moment, a diagonal, or nothing. B is the
weight, or what regression towards the dense model's output asks for instead. Which weightings make which paper: methods/.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.storage.kinds import stored_numbers

FLOOR = 1e-10  # eigenvalues of an input moment below this share of the largest count as this much: it may be singular
LARGE = 512  # of a weight's smaller side: steps of 16 ranks are then at most 3% of it
UNFACTORED = "a moment of its data cannot be factored: raise damping, or calibrate on more text."
OUTPUT_DAMPING = 1e-3  # of the mean diagonal of G: output directions that no gradient saw still count a little


@dataclass(frozen=True)
class Metric:
    """What weighs an error D (out, in): `tr(G D A D^T)`. None means the identity.

    input A: (in, in), or (in,) for a diagonal; a full one counts from `mean` (in,), as A - mean mean^T, if that is given.
    output G: (out, out) where out <= in, and (in, in) holding W^T G W where out > in, which then comes with diag G in
    `output_diagonal`; or (out,) for a diagonal. A solver adds `input_damping` and `output_damping` times the mean of
    their diagonal to full ones; errors are told without.
    """

    input: Tensor | None = None
    output: Tensor | None = None
    output_diagonal: Tensor | None = None
    mean: Tensor | None = None
    output_damping: float = OUTPUT_DAMPING
    input_damping: float = 0.0

    @cached_property
    def ridge(self) -> float:
        """What a solver adds to the diagonal of a full A."""
        if not self.input_damping or self.input is None:
            return 0.0
        diagonal = self.input.diagonal() if self.mean is None else self.input.diagonal() - self.mean.square()
        return self.input_damping * float(diagonal.mean())

    def folded(self, shape: tuple[int, ...]) -> bool:
        """Whether G of a weight of this shape (out, in) is only known as W^T G W."""
        return self.output is not None and self.output.dim() == 2 and shape[0] > shape[1]


@dataclass(frozen=True)
class Target:
    """What is approximated: `weight @ (I + correction) + added`, (out, in) float64."""

    weight: Tensor
    correction: Tensor | None = None  # (in, in)
    added: Tensor | None = None  # (out, in); only where out <= in

    @property
    def value(self) -> Tensor:  # (out, in)
        value = self.weight if self.correction is None else torch.addmm(self.weight, self.weight, self.correction)
        return value if self.added is None else value + self.added

    @cached_property
    def square(self) -> Tensor:  # (in, in)
        return self.weight.T @ self.weight

    def within(self, made: Tensor) -> Tensor:  # (in, in)
        """E of `weight @ E`, the part of a matrix (out, in) that lies within the weight's columns."""
        return torch.cholesky_solve(self.weight.T @ made, _cholesky(_damped(self.square)))

    def seen(self, made: Tensor, metric: Metric) -> Tensor:
        """What the metric sees of what was made (out, in) of the target; to be measured by `lost`."""
        return self.within(made) if metric.folded(self.weight.shape) else made

    def lost(self, seen: Tensor, metric: Metric) -> float:
        """The error, towards the target, of what is `seen` of a matrix."""
        if not metric.folded(self.weight.shape):
            return measured(self.value - seen, metric)
        wrong = -seen if self.correction is None else self.correction - seen  # (in, in)
        wrong.diagonal().add_(1.0)
        return measured(wrong, metric)

    def dropped(self, metric: Metric) -> float:
        """The error of nothing in place of the weight."""
        if not metric.folded(self.weight.shape) or metric.input is None or metric.input.dim() == 1:
            return error(self.weight, metric, self.weight)
        assert metric.output is not None  # and E is the identity
        total = (metric.output * metric.input).sum()
        return float(total if metric.mean is None else total - metric.mean @ metric.output @ metric.mean)


@dataclass(frozen=True)
class Factors:
    """`left @ right`, (out, k) and (k, in); `losses` are all squared singular values, largest first."""

    left: Tensor
    right: Tensor
    losses: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]


def regressed(cross: Tensor, gram: Tensor, damping: float, mean: Tensor | None = None) -> Tensor:  # (rows, in)
    """Ridge regression on y of z, by their moments `cross` E[z y^T] (rows, in) and `gram` A = E[y y^T].

    `cross (A + damping * mean(diag A) I)^-1`. With x the dense input and y the compressed one, z = x - y gives the
    correction E of the linear map W (I + E) from y that is nearest to W x. With `mean` of y, A counts from it.
    """
    damped = gram.clone() if mean is None else gram.addr(mean, mean, alpha=-1.0)  # (in, in)
    damped.diagonal().add_(damping * damped.diagonal().mean().clamp_min(1e-12))  # inputs may never vary
    lower = _cholesky_(damped)
    solved: Tensor = torch.linalg.solve_triangular(lower.T, cross, upper=True, left=False)  # (rows, in)
    torch.linalg.solve_triangular(lower, solved, upper=False, left=False, out=solved)
    return solved


def factorize(target: Target, metric: Metric, choose: Callable[[Tensor], int]) -> Factors:
    """The best W' of the rank that `choose(losses)` names; the loss at rank k is `losses[k:].sum()`.

    Singular moments are ordinary input. Raises PareError if a decomposition fails.
    """
    product, factors = _problem(target, metric)
    losses, vectors = _eigh_by_float32(product) if product.is_cuda else _eigh(product)
    return Factors(*factors(vectors[:, : choose(losses)]), losses)


def spectrum(target: Target, metric: Metric) -> Tensor:
    """The losses that `factorize` finds, without what else it needs to make factors."""
    product = _problem(target, metric)[0]
    if product.is_cuda:
        return _eigh_by_float32(product)[0]
    values: Tensor = _decomposed(torch.linalg.eigvalsh, product)
    return values.flip(0).clamp_min(0)


# the symmetric matrix whose eigenvalues are the losses, and what makes factors of its leading eigenvectors (size, k)
Problem = tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]


def _problem(target: Target, metric: Metric) -> Problem:
    wide = target.weight.shape[0] <= target.weight.shape[1]
    return _wide(target, metric) if wide else _tall(target, metric)


def _wide(target: Target, metric: Metric) -> Problem:
    """P = eigenvectors of S A S^T with S = L B; W' = L^-1 P P^T S: no inverse of the input's moment."""
    if metric.output is None:
        scaled, unscale = target.value, None
    elif metric.output.dim() == 1:
        root = _floored(metric.output).sqrt()  # (out,)
        scaled, unscale = root[:, None] * target.value, root
    else:
        damping = metric.output_damping * metric.output.diagonal().mean()
        unscale = _cholesky(_damped(metric.output, damping))  # (out, out)
        scaled = unscale.T @ target.value

    def factors(top: Tensor) -> tuple[Tensor, Tensor]:
        right = top.T @ scaled  # (k, in)
        if unscale is None:
            return top, right
        if unscale.dim() == 1:
            return top / unscale[:, None], right
        return torch.linalg.solve_triangular(unscale.T, top, upper=True), right

    return _weighed(scaled, metric, metric.ridge) @ scaled.T, factors


def _tall(target: Target, metric: Metric) -> Problem:
    """V = eigenvectors of R^T B^T G B R, (in, in); W' = B R V V^T R^-1: nothing of size (out, out)."""
    if metric.output is None or metric.output.dim() == 1:
        value = target.value
        scaled = value if metric.output is None else metric.output[:, None] * value
        product = value.T @ scaled  # (in, in)

        def reached(right: Tensor) -> Tensor:  # (out, k)
            return value @ right
    else:
        assert metric.output_diagonal is not None
        assert target.added is None
        correction = target.correction
        product = metric.output + metric.output_damping * metric.output_diagonal.mean() * target.square
        if correction is not None:
            product = torch.addmm(product, product, correction)
            product = torch.addmm(product, correction.T, product)

        def reached(right: Tensor) -> Tensor:  # (out, k)
            return target.weight @ (right if correction is None else torch.addmm(right, correction, right))

    moment = metric.input
    if moment is None:
        return product, lambda top: (reached(top), top.T)
    if moment.dim() == 1:
        root = _floored(moment).sqrt()  # (in,)
        return root[:, None] * product * root, lambda top: (reached(root[:, None] * top), top.T / root)
    if metric.mean is not None:
        moment = moment.addr(metric.mean, metric.mean, alpha=-1.0)
    root, unroot = _root(_damped(moment, metric.ridge) if metric.ridge else moment)
    return root.T @ product @ root, lambda top: (reached(root @ top), unroot(top.T))


def error(difference: Tensor, metric: Metric, weight: Tensor) -> float:
    """`tr(G D A D^T)` of D (out, in), float64; where G is only known as W^T G W, of the part of D within W's columns."""
    return measured(Target(weight).seen(difference, metric), metric)


def measured(wrong: Tensor, metric: Metric) -> float:
    """`tr(G D A D^T)` of what a metric sees of D."""
    weighed = _weighed(wrong, metric)
    if metric.output is not None:
        weighed = metric.output[:, None] * weighed if metric.output.dim() == 1 else metric.output @ weighed
    return float(weighed.flatten().dot(wrong.flatten()))


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
    rank = factors.rank
    permutation, exact = _pivot_rows(factors.left)
    rows = factors.left[permutation[:rank]] @ factors.right  # (k, in)
    pivots = rows.to(dtype)
    stored = pivots.to(rows.dtype)
    lost = rows - stored  # by rounding
    del rows
    weighed = _weighed(stored, metric, metric.ridge)  # (k, in)
    inner = weighed @ stored.T  # (k, k)
    del stored
    coefficients = torch.addmm(exact, exact, _divided(lost @ weighed.T, inner))
    return {"pivots": pivots, "coefficients": coefficients.to(dtype), "order": permutation.argsort().int()}


def largest_rank(kind: str, shape: tuple[int, int], numbers: float, bias: bool = False) -> int:
    """The largest rank of whole steps whose storage takes at most so many numbers, 0 if there is none."""
    numbers += 1e-6  # shares are decimal fractions: 0.29 of 100 is 29
    ranks = range(rank_step(shape), min(shape) + 1, rank_step(shape))
    return rank_step(shape) * bisect_right(ranks, numbers, key=lambda rank: cost(kind, shape, rank, bias))


def rank_step(shape: tuple[int, int]) -> int:
    """Ranks that a large weight is given are multiples of 16, so that kernels load whole vectors of its factors."""
    return 16 if min(shape) >= LARGE else 1


def cost(kind: str, shape: tuple[int, int], rank: int, bias: bool = False, kept: int = 0) -> int:
    """Numbers that a weight of this kind, shape and rank stores."""
    spec: Mapping[str, object] = {"kind": kind, "shape": shape, "rank": rank, "bias": bias, "kept": kept}
    return stored_numbers(spec)


def _pivot_rows(left: Tensor) -> tuple[Tensor, Tensor]:
    """Which row of (out, k) stands at each place (out,), and what the last ones are made of the first k (out - k, k)."""
    lower, swaps = torch.linalg.lu_factor(left)  # (out, k), (k,)
    rows, rank = list(range(len(left))), left.shape[1]
    for place, other in enumerate(swaps.tolist()):  # LAPACK counts from 1
        rows[place], rows[other - 1] = rows[other - 1], rows[place]
    # left = L U in this order, so that the others are L2 U = (L2 L1^-1) L1 U
    made_of = torch.linalg.solve_triangular(lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True)
    return torch.tensor(rows, device=left.device), made_of


def _weighed(rows: Tensor, metric: Metric, ridge: float = 0.0) -> Tensor:
    """`rows @ (A + ridge I)`, (rows, in)."""
    moment, mean = metric.input, metric.mean
    if moment is None:
        return rows
    if moment.dim() == 1:
        return rows * moment
    weighed = rows @ moment
    if ridge:
        weighed.add_(rows, alpha=ridge)
    return weighed if mean is None else weighed.addr_(rows @ mean, mean, alpha=-1.0)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first and not below zero, with their vectors as columns."""
    values, vectors = _decomposed(torch.linalg.eigh, matrix)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _eigh_by_float32(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As `_eigh`, with float32 vectors made orthonormal again and their values taken in float64.

    GPUs multiply in float64 far faster than they decompose in it. A subspace that is off by an angle e loses e^2 more, so
    only losses below some 1e-7 of the whole are larger than they need be.
    """
    scaled = matrix / matrix.diagonal().mean().clamp_min(1e-300)  # within float32's range
    vectors = _eigh(scaled.float())[1].to(matrix.dtype)
    inner = vectors.T @ vectors
    vectors = torch.addmm(vectors, vectors, inner, beta=1.5, alpha=-0.5)  # Newton and Schulz: 1e-6 becomes 1e-12
    values = (vectors * (matrix @ vectors)).sum(0).clamp_min(0)
    values, order = values.sort(descending=True)
    return values, vectors[:, order]


def _decomposed(by: Callable[[Tensor], Any], matrix: Tensor) -> Any:
    try:
        return by((matrix + matrix.T) / 2)
    except RuntimeError as fault:
        raise PareError(f"its eigenvalue decomposition failed ({fault}). Calibrate on more text.") from fault


def _root(moment: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """R (in, in) with R R^T = A, and `rows @ R^-1`: by Cholesky, or by the eigenvalues, floored, where A is singular."""
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(moment)
    pivots = lower.diagonal()
    if not bool(failed) and bool(pivots.min() > FLOOR**0.5 * pivots.max()):
        return lower, lambda rows: torch.linalg.solve_triangular(lower, rows, upper=False, left=False)
    values, basis = _eigh(moment)
    sizes = _floored(values).sqrt()  # (in,)
    return basis * sizes, lambda rows: rows / sizes @ basis.T


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        raise PareError(UNFACTORED)
    return factor


def _divided(rows: Tensor, moment: Tensor) -> Tensor:  # (rows, k)
    """`rows @ M^-1` of a moment (k, k) with directions that no data reached: float32 sums leave those slightly negative."""
    for share in (FLOOR, 1e-8, 1e-6, 1e-4, 1e-2):
        factor, failed = torch.linalg.cholesky_ex(_damped(moment, share * moment.diagonal().mean()))
        if not bool(failed):
            return torch.cholesky_solve(rows.T, factor).T
    raise PareError(UNFACTORED)


def _cholesky_(matrix: Tensor) -> Tensor:
    """The lower factor of a symmetric matrix, in its memory: transposed, because LAPACK works on columns."""
    lower, failed = matrix.T, torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if bool(failed):
        raise PareError(UNFACTORED)
    return lower


def _damped(matrix: Tensor, added: Tensor | float | None = None) -> Tensor:
    damped = matrix.clone()
    damped.diagonal().add_((FLOOR * matrix.diagonal().mean() if added is None else added) + 1e-300)
    return damped


def _floored(values: Tensor) -> Tensor:
    largest = values.max()
    return values.clamp_min(float(FLOOR * largest) if largest > 0 else 1.0)
