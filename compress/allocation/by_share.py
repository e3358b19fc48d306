"""The same share for every layer, or shares in proportion to a weight for each type of layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Annotated

from pydantic import Field

from paredown.compress.allocation.base import ALLOCATIONS, Allocation, Budget, Options
from paredown.compress.allocation.shares import capped, options_for
from paredown.compress.errors import PareError


@ALLOCATIONS.register("uniform")
@dataclass(frozen=True)
class Uniform(Allocation):
    """Each layer keeps the same share of its size."""

    def allocate(self, budget: Budget) -> Options:
        return options_for(budget, {layer.name: budget.kept for layer in budget.layers})


@ALLOCATIONS.register("per_type")
@dataclass(frozen=True)
class PerType(Allocation):
    """Each layer keeps a share of its size proportional to its weight; what a full layer cannot use goes to the rest."""

    # glob on the last part of a layer's name -> its share relative to the others, which count 1
    weights: dict[str, Annotated[float, Field(gt=0)]] = field(default_factory=dict)

    def allocate(self, budget: Budget) -> Options:
        wanted = {layer.name: self._weight(layer.name) for layer in budget.layers}
        return options_for(budget, capped(budget.layers, wanted, budget.numbers))

    def check(self, names: Sequence[str], asked: bool) -> None:
        """Each weight of a recipe must match a layer; of a method's default weights at least one."""
        unmatched = [pattern for pattern in self.weights if not any(fnmatch(name, pattern) for name in names)]
        if unmatched and (asked or len(unmatched) == len(self.weights)):
            raise PareError(
                f"allocation.weights {unmatched[0]!r} matches no layer: weights name the last part of layers: "
                f"{', '.join(names)}. For instance: --set 'allocation={{strategy: per_type, weights: {{{names[0]}: 2}}}}'"
            )

    def _weight(self, name: str) -> float:
        last = name.rpartition(".")[2]
        return next((weight for pattern, weight in self.weights.items() if fnmatch(last, pattern)), 1.0)
