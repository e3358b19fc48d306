"""SVD-LLM v2: within each type of layer, those that lose more keep more. Wang et al. 2025, alg. 1 (arXiv 2503.12340)."""

import math
from dataclasses import dataclass

from paredown.compress.allocation.base import ALLOCATIONS, Allocation, Budget, Layer, Options
from paredown.compress.allocation.shares import capped, options_for
from paredown.compress.numerics.moments import Need


@ALLOCATIONS.register("theoretical_loss")
@dataclass(frozen=True)
class TheoreticalLoss(Allocation):
    """The share removed from a layer is proportional to 1 / log(its loss at the common share).

    The loss is the norm of the output's error over all calibration tokens; logarithms below 1 count as 1. Shares below
    a twentieth are raised to it before all are scaled to the budget.
    """

    reads = "losses"
    needs = frozenset({Need.GRAM})

    def allocate(self, budget: Budget) -> Options:
        types: dict[str, list[Layer]] = {}
        for layer in budget.layers:
            types.setdefault(layer.name.rpartition(".")[2], []).append(layer)
        shares: dict[str, float] = {}
        for members in types.values():
            shares |= _shares(members, budget)
        return options_for(budget, shares)


def _shares(members: list[Layer], budget: Budget) -> dict[str, float]:
    kept = budget.kept
    losses = [(budget.tokens * layer.within(kept * layer.size).loss) ** 0.5 for layer in members]
    scale = [1 / math.log(max(loss, math.e)) for loss in losses]
    removed = [(1 - kept) * len(members) * s / math.fsum(scale) for s in scale]
    wanted = {layer.name: max(0.05, 1 - share) for layer, share in zip(members, removed, strict=True)}
    return capped(members, wanted, kept * sum(layer.size for layer in members))
