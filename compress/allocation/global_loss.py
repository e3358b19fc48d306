"""The least sum of predicted losses under one budget: on each layer's lower convex hull, the steepest step first.

With the two-sided metric all losses have one unit, the model's loss to second order in nats per token, so that layers
can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from paredown.compress.allocation.base import ALLOCATIONS, Allocation, Budget, Layer, Options
from paredown.compress.errors import PareError
from paredown.compress.methods.base import Choice


@ALLOCATIONS.register("global")
@dataclass(frozen=True)
class Global(Allocation):
    """Each layer's hull includes the dense weight: where the last ranks gain little, it goes to dense in one step.

    Optimal for each budget at which a step ends; in between the loss exceeds the optimum by less than one step.
    """

    reads = "losses"

    def allocate(self, budget: Budget) -> Options:
        """Raises PareError if not even the smallest choices fit the budget."""
        room = int(budget.numbers)
        hulls = {layer.name: hull(points(layer)) for layer in budget.layers}
        place = dict.fromkeys(hulls, 0)  # of each layer on its hull
        spent = sum(h[0].numbers for h in hulls.values())
        if spent > room:
            raise PareError(
                f"rank 1 in every layer takes {spent:,} parameters, and {room:,} are asked for: raise kept, or skip layers."
            )
        steps = [step for name in hulls if (step := _next_step(hulls[name], 0, name))]
        heapify(steps)
        while steps:
            _, name = heappop(steps)
            at, h = place[name], hulls[name]
            more = h[at + 1].numbers - h[at].numbers
            if spent + more > room:
                continue  # a cheaper step of another layer may still fit
            spent += more
            place[name] = at + 1
            if step := _next_step(h, at + 1, name):
                heappush(steps, step)
        return {name: hulls[name][at].option for name, at in place.items()}


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
