"""The least sum of predicted losses under one budget, exactly: dynamic programming over every layer's choices.

Frantar & Alistarh 2022, SPDY (arXiv 2201.13096), and Optimal Brain Compression (arXiv 2208.11580): each layer compressed
in several ways is a database, from which a budget is met afterwards. Losses are those that `global` spends by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, gcd, inf
from typing import Annotated

import torch
from pydantic import Field

from paredown.compress.allocation.base import ALLOCATIONS, Allocation, Budget, Layer, Options
from paredown.compress.allocation.global_loss import SECOND_ORDER, points, settled, steepest
from paredown.compress.methods.base import Choice


@ALLOCATIONS.register("database")
@dataclass(frozen=True)
class Database(Allocation):
    """The optimum even where curves are not convex; never more than the split of `global`.

    Numbers are counted in units of the budget's `resolution`-th part, rounded up; in whole numbers where all sizes have a
    common divisor that is no smaller. What is left then goes where the loss falls most.
    """

    resolution: Annotated[int, Field(ge=1, le=10**6)] = 20_000

    reads = "losses"
    needs = SECOND_ORDER
    picks = True

    def allocate(self, budget: Budget) -> Options:
        """Raises PareError if not even the smallest choices fit the budget."""
        chosen = steepest(budget, {layer.name: points(layer)[0] for layer in budget.layers})
        if best := least_loss(budget.layers, budget.room, self.resolution):
            filled = steepest(budget, best)
            chosen = min(filled, chosen, key=lambda found: fsum(choice.loss for choice in found.values()))
        return settled(budget, chosen)


def least_loss(layers: Sequence[Layer], room: int, resolution: int) -> dict[str, Choice] | None:
    """Of each layer's `points` one, with the least sum of losses in so many numbers; None where none fits, in whole units."""
    tables = [points(layer) for layer in layers]
    unit = max(gcd(*(choice.numbers for table in tables for choice in table)), -(-room // resolution))
    capacity = room // unit
    best = torch.zeros(capacity + 1, dtype=torch.float64)  # by units: the least loss of the layers so far
    taken = []
    for table in tables:
        losses, place = torch.full_like(best, inf), torch.zeros(capacity + 1, dtype=torch.int16)
        for at, choice in enumerate(table):
            units = -(-choice.numbers // unit)
            if units > capacity:
                break
            tried = best[: capacity + 1 - units] + choice.loss
            better = tried < losses[units:]
            losses[units:][better], place[units:][better] = tried[better], at
        best = losses
        taken.append(place)
    if best[capacity] == inf:
        return None
    chosen: dict[str, Choice] = {}
    for layer, table, place in zip(reversed(layers), reversed(tables), reversed(taken), strict=True):
        choice = table[int(place[capacity])]
        chosen[layer.name] = choice
        capacity -= -(-choice.numbers // unit)
    return chosen
