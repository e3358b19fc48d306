"""The least sum of predicted losses under one budget: on each layer's lower convex hull, the steepest step first.

The losses of masks are the rise of the model's loss to second order, `tr(G D H D^T) / 2` in nats per token for a change D,
with H the moment of the layer's input and G the diagonal of its output gradient's: so layers can be compared. A low-rank
method weighs its losses itself; with the two-sided metric they have that unit too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Annotated

from pydantic import Field

from paredown.compress.allocation.base import ALLOCATIONS, Allocation, Budget, Layer, Options, smallest
from paredown.compress.allocation.shares import options_for
from paredown.compress.errors import PareError
from paredown.compress.methods.base import Choice
from paredown.compress.numerics.moments import Need

SECOND_ORDER = frozenset({Need.GRAM, Need.OUTPUT_GRADIENT_DIAGONAL})


@ALLOCATIONS.register("global")
@dataclass(frozen=True)
class Global(Allocation):
    """Each layer's hull includes the dense weight: where the last ranks gain little, it goes to dense in one step.

    Optimal for each budget at which a step ends; in between the loss exceeds the optimum by less than one step. Where any
    share can be kept, the last step is taken in part, and what is predicted between measured shares is optimal too.
    `shrink` of the way is gone back to the same share of every layer: what costs least on one text does not on all.
    """

    shrink: Annotated[float, Field(ge=0, le=1)] = 0.0

    reads = "losses"
    needs = SECOND_ORDER
    picks = True

    def allocate(self, budget: Budget) -> Options:
        """Raises PareError if not even the smallest choices fit the budget."""
        chosen = steepest(budget, {layer.name: points(layer)[0] for layer in budget.layers})
        if not self.shrink:
            return settled(budget, chosen)
        own = {layer.name: chosen[layer.name].numbers / layer.size for layer in budget.layers}
        return options_for(
            budget, {n: (1 - self.shrink) * share + self.shrink * budget.kept for n, share in own.items()}
        )


def steepest(budget: Budget, start: Mapping[str, Choice]) -> dict[str, Choice]:
    """From a choice of each layer, one of its `points`, on to larger ones until the budget is spent.

    Raises PareError if the choices to start from exceed it.
    """
    hulls = {y.name: hull([p for p in points(y) if p.numbers >= start[y.name].numbers]) for y in budget.layers}
    layers = {layer.name: layer for layer in budget.layers}
    chosen = {name: h[0] for name, h in hulls.items()}
    left = budget.room - sum(choice.numbers for choice in chosen.values())
    if left < 0:
        least = smallest(budget.layers[0]) if budget.layers[0].grain is None else f"sparsity {_sparsest(budget):g}"
        raise PareError(
            f"{least} in every layer takes {budget.room - left:,} parameters, and {budget.room:,} are asked for: "
            "raise kept, or skip layers."
        )
    place = dict.fromkeys(hulls, 0)
    steps = [step for name in hulls if (step := _next_step(hulls[name], 0, name))]
    heapify(steps)
    while steps:
        _, name = heappop(steps)
        after = hulls[name][place[name] + 1]
        more = after.numbers - chosen[name].numbers
        if more > left:
            if layers[name].grain is None:
                continue  # a cheaper step of another layer may still fit
            chosen[name] = _partly(chosen[name], after, left)
            break
        left -= more
        chosen[name] = after
        place[name] += 1
        if step := _next_step(hulls[name], place[name], name):
            heappush(steps, step)
    return chosen


def settled(budget: Budget, chosen: Mapping[str, Choice]) -> Options:
    """The options of these choices; where any share can be kept, those that spend the budget exactly."""
    if any(layer.grain is None for layer in budget.layers):
        return {layer.name: chosen[layer.name].option for layer in budget.layers}
    return options_for(budget, {layer.name: chosen[layer.name].numbers / layer.size for layer in budget.layers})


def _sparsest(budget: Budget) -> float:
    return max(points(layer)[0].option or 0.0 for layer in budget.layers)


def _partly(before: Choice, after: Choice, numbers: int) -> Choice:
    """So many numbers on the way from one choice to the next."""
    return Choice(before.numbers + numbers, before.loss + numbers * _slope(before, after), None)


def points(layer: Layer) -> list[Choice]:
    """The layer's choices without that of zeros, and, as the last, the dense weight (option None)."""
    return [*layer.choices[1:], Choice(layer.size, 0.0, None)]


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of choices sorted by numbers: Andrew's monotone chain."""
    kept: list[Choice] = []
    for choice in choices:
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], choice):
            kept.pop()
        kept.append(choice)
    return kept


def _slope(a: Choice, b: Choice) -> float:
    return (b.loss - a.loss) / (b.numbers - a.numbers)


def _next_step(h: list[Choice], at: int, name: str) -> tuple[float, str] | None:
    return (_slope(h[at], h[at + 1]), name) if at + 1 < len(h) else None
