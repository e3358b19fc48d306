"""Who gets which rank: one budget for all layers, spent by shapes alone or by what each layer is predicted to lose.

A curve holds a layer's predicted loss at every rank. With the two-sided metric all curves are in one currency, second
order in nats per token, so that layers can be weighed against each other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from heapq import heapify, heappop, heappush
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from paredown.compress.errors import PareError
from paredown.compress.numerics.factorize import rank_step

Strategy = Literal["uniform", "per_type", "theoretical_loss", "sensitivity", "global"]
DATA_DRIVEN = ("theoretical_loss", "sensitivity", "global")  # need a survey of the dense model first


class AllocationSpec(BaseModel):
    """The recipe's key `allocation`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Strategy
    # per_type: glob on the last part of a layer's name -> its share relative to the others', which count 1
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}


@dataclass(frozen=True)
class Curve:
    """What is known of one layer: its size, what each rank costs, and the squared singular values of its metric."""

    name: str
    shape: tuple[int, int]
    losses: Sequence[float] = ()  # (min(out, in),), largest first; empty where only the shape is known

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def loss(self, rank: int | None) -> float:
        """Predicted loss at a rank; None is the dense weight."""
        return 0.0 if rank is None else math.fsum(self.losses[rank:])


Ranks = dict[str, int | None]  # None: stays dense
Cost = Callable[[tuple[int, int], int], int]  # numbers stored of a weight (shape, rank)
LargestRank = Callable[[tuple[int, int], float], int]  # under so many numbers


def by_share(
    curves: Sequence[Curve], kept: float, weights: Mapping[str, float], largest: LargestRank, cost: Cost
) -> Ranks:
    """Each layer keeps a share of its size proportional to its weight; what a full layer cannot use goes to the rest."""
    wanted = {c.name: _weight(c.name, weights) for c in curves}
    shares = _capped(curves, wanted, kept * sum(c.size for c in curves))
    return {c.name: _rank(c, shares[c.name], largest, cost) for c in curves}


def by_theoretical_loss(curves: Sequence[Curve], kept: float, largest: LargestRank, cost: Cost, tokens: int) -> Ranks:
    """Within each type of layer, what is removed is proportional to 1 / log(loss at the common ratio).

    The loss is the norm of the output's error over all `tokens` of the calibration; logarithms count at least 1, and a
    twentieth of a layer stays. Wang et al. 2025, SVD-LLM v2, algorithm 1 (arXiv 2503.12340).
    """
    types: dict[str, list[Curve]] = {}
    for curve in curves:
        types.setdefault(curve.name.rpartition(".")[2], []).append(curve)
    ranks: Ranks = {}
    for members in types.values():
        losses = [(tokens * c.loss(largest(c.shape, kept * c.size))) ** 0.5 for c in members]
        scale = [1 / math.log(max(loss, math.e)) for loss in losses]
        removed = {
            c.name: (1 - kept) * len(members) * s / math.fsum(scale) for c, s in zip(members, scale, strict=True)
        }
        wanted = {name: max(0.05, 1 - share) for name, share in removed.items()}
        shares = _capped(members, wanted, kept * sum(c.size for c in members))
        ranks |= {c.name: _rank(c, shares[c.name], largest, cost) for c in members}
    return ranks


def by_sensitivity(
    curves: Sequence[Curve],
    losses: Mapping[str, Mapping[float, float]],
    kept: float,
    largest: LargestRank,
    cost: Cost,
) -> Ranks:
    """One loss that no layer alone may raise the model above: each takes its smallest measured share that stays below.

    `losses` of the model by layer and share. The threshold is the lowest under which the budget holds, so a little of
    the budget may be left. Yuan et al. 2023, section 3.3 (arXiv 2312.05821). Raises PareError if no threshold does.
    """
    budget = kept * sum(c.size for c in curves)
    ranks: Ranks = {}
    for threshold in sorted({loss for found in losses.values() for loss in found.values()}):
        shares = {
            c.name: min((s for s, loss in losses.get(c.name, {}).items() if loss <= threshold), default=1.0)
            for c in curves
        }
        ranks = {c.name: _rank(c, shares[c.name], largest, cost) for c in curves}
        if sum(c.size if (rank := ranks[c.name]) is None else cost(c.shape, rank) for c in curves) <= budget:
            return ranks
    raise PareError(f"no measured share of the layers leaves only {kept:g} of them: ask for more with kept.")


def by_global_loss(curves: Sequence[Curve], budget: int, cost: Cost) -> Ranks:
    """Least sum of predicted losses under one budget of numbers: the steepest descent first, on lower convex hulls.

    The hull of a layer's points (numbers, loss) includes the dense weight, so a layer whose last ranks are dear jumps to
    dense. Optimal for each budget at which a step ends; in between the loss exceeds the optimum by less than one step.
    Raises PareError if the budget does not even hold rank 1 everywhere.
    """
    hulls = {c.name: hull(points(c, cost)) for c in curves}
    place = dict.fromkeys(hulls, 0)
    spent = sum(h[0][0] for h in hulls.values())
    if spent > budget:
        raise PareError(
            f"rank 1 in every layer takes {spent:,} parameters, and {budget:,} are asked for: raise kept, or skip layers."
        )
    steps = [step for name in hulls if (step := _next_step(hulls[name], 0, name))]
    heapify(steps)
    while steps:
        _, name = heappop(steps)
        at, h = place[name], hulls[name]
        if spent + h[at + 1][0] - h[at][0] > budget:
            continue  # a cheaper step of another layer may still fit
        spent += h[at + 1][0] - h[at][0]
        place[name] = at + 1
        if step := _next_step(h, at + 1, name):
            heappush(steps, step)
    return {name: hulls[name][at][2] for name, at in place.items()}


Point = tuple[int, float, int | None]  # numbers, loss, rank


def points(curve: Curve, cost: Cost) -> list[Point]:
    """Every rank of whole steps that stores less than the dense weight, and the dense weight itself."""
    tail = math.fsum(curve.losses)
    found: list[Point] = []
    for rank, loss in enumerate(curve.losses, 1):
        tail = max(tail - loss, 0.0)
        if rank % rank_step(curve.shape):
            continue
        numbers = cost(curve.shape, rank)
        if numbers >= curve.size:
            break
        found.append((numbers, tail, rank))
    return [*found, (curve.size, 0.0, None)]


def hull(found: list[Point]) -> list[Point]:
    """The lower convex hull of points sorted by numbers: Andrew's monotone chain."""
    kept: list[Point] = []
    for point in found:
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def by_dynamic_program(curves: Sequence[Curve], budget: int, cost: Cost) -> float:
    """The least possible sum of predicted losses, exactly: what `by_global_loss` is checked against on small cases."""
    best = [0.0] * (budget + 1)
    for curve in curves:
        options = points(curve, cost)
        best = [
            min((best[room - numbers] + loss for numbers, loss, _ in options if numbers <= room), default=math.inf)
            for room in range(budget + 1)
        ]
    return best[budget]


def _slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _next_step(h: list[Point], at: int, name: str) -> tuple[float, str] | None:
    return (_slope(h[at], h[at + 1]), name) if at + 1 < len(h) else None


def _weight(name: str, weights: Mapping[str, float]) -> float:
    last = name.rpartition(".")[2]
    return next((weight for pattern, weight in weights.items() if fnmatch(last, pattern)), 1.0)


def _capped(curves: Sequence[Curve], wanted: Mapping[str, float], budget: float) -> dict[str, float]:
    """Shares proportional to `wanted` that use the budget, none above 1."""
    shares: dict[str, float] = {}
    rest = list(curves)
    while rest:
        scale = budget / math.fsum(wanted[c.name] * c.size for c in rest)
        full = [c for c in rest if wanted[c.name] * scale >= 1]
        if not full:
            return shares | {c.name: wanted[c.name] * scale for c in rest}
        shares |= {c.name: 1.0 for c in full}
        budget -= sum(c.size for c in full)
        rest = [c for c in rest if c.name not in shares]
    return shares


def _rank(curve: Curve, share: float, largest: LargestRank, cost: Cost) -> int | None:
    if share >= 1:
        return None
    rank = largest(curve.shape, share * curve.size)
    if not rank:
        raise PareError(f"{curve.name}: not even rank 1 fits into {share:.3g} of it: raise kept, or skip the layer.")
    return rank if cost(curve.shape, rank) < curve.size else None
