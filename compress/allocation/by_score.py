"""Allocations that follow from one number for each block of the dense model: a new one says how it is measured, and what
share of the budget it is worth.

@ALLOCATIONS.register("mine")
@dataclass(frozen=True)
class Mine(ByScore):
    needs = frozenset({Need.SECOND_MOMENT})    # the statistics that `score` reads

    def score(self, layers): ...
    def shares(self, scores, budget): ...
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from paredown.compress.allocation.base import Allocation, Budget, Options
from paredown.compress.allocation.shares import options_for
from paredown.compress.numerics.moments import Stats


@dataclass(frozen=True)
class ByScore(Allocation):
    """All layers of a block get the same share; or each its own, with `per: layer`."""

    per: Literal["block", "layer"] = "block"

    reads = "scores"

    @abstractmethod
    def score(self, layers: Sequence[tuple[Tensor, Stats]]) -> float:
        """Of the layers that get one share: each weight (out, in) of the dense model, with its statistics."""

    @abstractmethod
    def shares(self, scores: Mapping[str, float], budget: Budget) -> Mapping[str, float]:
        """The share that each layer keeps, by the scores of all layers. Together they should spend the budget."""

    def allocate(self, budget: Budget) -> Options:
        scores = {layer.name: budget.scores[layer.name] for layer in budget.layers}
        return options_for(budget, self.shares(scores, budget))


def scaled(scores: Mapping[str, float]) -> dict[str, float]:
    """Between 0 for the lowest and 1 for the highest; all 0 where they do not differ."""
    low, high = min(scores.values()), max(scores.values())
    return {name: (score - low) / (high - low) if high > low else 0.0 for name, score in scores.items()}
