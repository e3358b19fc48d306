"""The factorizer: minimise |L (B - W') R| over matrices W' of rank k, for any weightings L and R.

B is the weight, or the one that regression towards the dense model's output puts in its place. The papers differ in L
and R: see methods/lowrank/. In the precision of the metric; on a GPU eigenvectors are computed in float32 first.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.compress.numerics.metric import Metric, Target, times_moment
from paredown.compress.numerics.precision import rounded_product
from paredown.compress.numerics.spectral import cholesky, damped, decomposed, eigh, eigh_by_float32, floored, root_of
from paredown.compress.storage.kinds import stored_numbers
from paredown.compress.storage.spec import Spec

AT_ONCE = 2048  # tokens
OUTLINE = 24  # points at most that a report keeps of a spectrum
LARGE = 512  # the smaller side of a weight from which ranks go in steps
STEP = 16  # ranks whose factors kernels load in whole vectors: at most 3% of the smaller side


@dataclass(frozen=True)
class Factors:
    """`left @ right`, (out, k) and (k, in); `losses` (min(out, in),) are all squared singular values, largest first."""

    left: Tensor
    right: Tensor
    losses: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]


def factorize(target: Target, metric: Metric, choose: Callable[[Tensor], int]) -> Factors:
    """The best W' of the rank that `choose(losses)` returns; the loss at rank k is `losses[k:].sum()`.

    Moments may be singular. Raises PareError if a decomposition fails.
    """
    product, factors = _problem(target, metric)
    losses, vectors = eigh_by_float32(product) if _in_float32(product) else eigh(product)
    return Factors(*factors(vectors[:, : choose(losses)]), losses)


def spectrum(target: Target, metric: Metric) -> Tensor:
    """The losses of `factorize`, (min(out, in),), for less work than the factors take."""
    product = _problem(target, metric)[0]
    if _in_float32(product):
        return eigh_by_float32(product)[0]
    values: Tensor = decomposed(torch.linalg.eigvalsh, product)
    return values.flip(0).clamp_min(0)


def _in_float32(product: Tensor) -> bool:
    return product.is_cuda or product.dtype == torch.float32


# the symmetric matrix whose eigenvalues are the losses, and a function from its first eigenvectors (size, k) to factors
Problem = tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]


def _problem(target: Target, metric: Metric) -> Problem:
    wide = target.weight.shape[0] <= target.weight.shape[1]
    return _wide(target, metric) if wide else _tall(target, metric)


def _wide(target: Target, metric: Metric) -> Problem:
    """P = eigenvectors of S A S^T with S = L B; W' = L^-1 P P^T S: A need not be inverted."""
    if metric.output is None:
        scaled, unscale = target.value, None
    elif metric.output.dim() == 1:
        root = floored(metric.output).sqrt()  # (out,)
        scaled, unscale = root[:, None] * target.value, root
    else:
        damping = metric.output_damping * metric.output.diagonal().mean()
        unscale = cholesky(damped(metric.output, damping))  # (out, out)
        scaled = unscale.T @ target.value

    def factors(top: Tensor) -> tuple[Tensor, Tensor]:
        right = top.T @ scaled  # (k, in)
        if unscale is None:
            return top, right
        if unscale.dim() == 1:
            return top / unscale[:, None], right
        return torch.linalg.solve_triangular(unscale.T, top, upper=True), right

    return times_moment(scaled, metric, metric.ridge) @ scaled.T, factors


def _tall(target: Target, metric: Metric) -> Problem:
    """V = eigenvectors of R^T B^T G B R, (in, in); W' = B R V V^T R^-1: no matrix is (out, out)."""
    if metric.output is None or metric.output.dim() == 1:
        value = target.value
        scaled = value if metric.output is None else metric.output[:, None] * value
        product = value.T @ scaled  # (in, in)

        def times_value(right: Tensor) -> Tensor:  # (out, k)
            return value @ right
    else:
        assert metric.output_diagonal is not None
        assert target.added is None
        correction = target.correction
        product = metric.output + metric.output_damping * metric.output_diagonal.mean() * target.square
        if correction is not None:
            product = torch.addmm(product, product, correction)
            product = torch.addmm(product, correction.T, product)

        def times_value(right: Tensor) -> Tensor:  # (out, k)
            return target.weight @ (right if correction is None else torch.addmm(right, correction, right))

    moment = metric.input
    if moment is None:
        return product, lambda top: (times_value(top), top.T)
    if moment.dim() == 1:
        root = floored(moment).sqrt()  # (in,)
        return root[:, None] * product * root, lambda top: (times_value(root[:, None] * top), top.T / root)
    if metric.mean is not None:
        moment = moment.addr(metric.mean, metric.mean, alpha=-1.0)
    root, unroot = root_of(moment if metric.ridge is None else damped(moment, metric.ridge))
    return root.T @ product @ root, lambda top: (times_value(root @ top), unroot(top.T))


def outlined(losses: Tensor, rank: int) -> dict[str, list[float]]:
    """A spectrum in few points: `ranks`, the one of the cut among them, and the share of all `energy` that each holds.

    losses (n,) are squared singular values, largest first. Nothing of a matrix that is zero.
    """
    size, total = len(losses), float(losses.sum())
    if not total:
        return {}
    spread = torch.linspace(0, 1, OUTLINE - 1, dtype=torch.float64).square()  # closer where the spectrum is steep
    ranks = sorted({rank, *(1 + (size - 1) * spread).round().int().tolist()} - {0})
    shares = (losses.cpu()[[k - 1 for k in ranks]] / total).tolist()
    return {"ranks": ranks, "energy": [float(f"{share:.4g}") for share in shares]}


def steps(factors: Factors, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:  # (k,) float64
    """By how much each component, the first one first, lowers the loss that is left at its rank, in nats per token.

    That loss is E[(g . (W - W_k) x)^2] / 2 over `pairs` of an input x (tokens, in) and the gradient g (tokens, out) of the
    loss at the output: the rise of the loss to second order, where the Hessian is the gradients' own second moment. A
    component that would raise it counts nothing, and what follows is counted from the least loss so far.
    """
    left, right = factors.left.float(), factors.right.float()
    total, count = torch.zeros(factors.rank + 1, dtype=torch.float64, device=left.device), 0
    for x, g in pairs:
        for some_x, some_g in zip(x.split(AT_ONCE), g.split(AT_ONCE), strict=True):
            # (tokens, k): of each component in g . W x, and of the first ones together
            shares = rounded_product(some_g, left).float() * rounded_product(some_x, right.T)
            first = shares.cumsum(1)
            whole = first[:, -1:].clone()
            total[0] += whole.square().sum()
            total[1:] += first.sub_(whole).square_().sum(0)
            count += len(some_x)
    least = (total / (2 * max(count, 1))).cummin(0).values
    return least[:-1] - least[1:]


def balanced(factors: Factors) -> tuple[Tensor, Tensor]:
    """Both factors, each component scaled to the same norm in either, so that neither over- nor underflows in 16 bits.

    Components of a product that is zero become zeros.
    """
    left, right = factors.left, factors.right
    lefts, rights = left.norm(dim=0), right.norm(dim=1)  # (k,)
    alive = (lefts > 0) & (rights > 0)
    ratio = (rights / lefts).where(alive, 1.0).clamp(1e-30, 1e30).sqrt()  # (k,)
    return (left * ratio).where(alive, 0.0), (right / ratio[:, None]).where(alive[:, None], 0.0)


def largest_rank(kind: str, shape: tuple[int, int], numbers: float, bias: bool = False, multiple: int = STEP) -> int:
    """The largest multiple of `rank_step` at which at most so many numbers are stored; 0 if there is none."""
    numbers += 1e-6  # shares are decimal fractions: 0.29 of 100 is 29
    step = rank_step(shape, multiple)
    ranks = range(step, min(shape) + 1, step)
    return step * bisect_right(ranks, numbers, key=lambda rank: cost(kind, shape, rank, bias))


def rank_step(shape: tuple[int, int], multiple: int = STEP) -> int:
    """Ranks of a large weight (out, in) are multiples of `multiple`, and of a small one all that there are."""
    return multiple if min(shape) >= LARGE else 1


def cost(kind: str, shape: tuple[int, int], rank: int, bias: bool = False) -> int:
    """How many numbers a weight of this kind, shape and rank stores."""
    return stored_numbers(Spec(kind, shape, rank=rank, bias=bias))
