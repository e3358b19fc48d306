"""One budget for all layers, spent on the choices that the method offers for each.

An allocation is a frozen dataclass whose fields are further keys of the recipe's `allocation`; a new one is one file.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Choice
from paredown.compress.registry import Registry

Options = dict[str, Any]  # layer -> its option; None: it stays dense
Sensitivities = Mapping[str, Mapping[float, float]]  # layer -> share kept -> loss per token of the model


class AllocationSpec(BaseModel):
    """The recipe's key `allocation`: a strategy and the strategy's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    strategy: str

    def build(self) -> "Allocation":
        """Raises PareError listing every fault."""
        return ALLOCATIONS.build(self.strategy, self.model_extra or {})


@dataclass(frozen=True)
class Layer:
    """One layer as an allocation sees it. The first of its choices is a weight of zeros."""

    name: str
    size: int  # numbers of the dense weight
    choices: Sequence[Choice]  # smallest first

    def within(self, numbers: float) -> Choice:
        """The largest choice that stores at most so many numbers."""
        numbers += 1e-6  # shares are decimal fractions: 0.29 of 100 is 29
        return self.choices[max(bisect_right(self.choices, numbers, key=lambda choice: choice.numbers), 1) - 1]


@dataclass(frozen=True)
class Budget:
    """All layers, the share of their numbers that may stay, and what was measured."""

    layers: Sequence[Layer]
    kept: float
    tokens: int = 0  # of the calibration
    sensitivities: Sensitivities = field(default_factory=dict)

    @property
    def numbers(self) -> float:
        """How many numbers may stay."""
        return self.kept * sum(layer.size for layer in self.layers)


class Allocation(ABC):
    """Chooses each layer's option under one budget."""

    reads: ClassVar[Literal["shapes", "losses", "sensitivities"]] = "shapes"  # what must be measured first

    @abstractmethod
    def allocate(self, budget: Budget) -> Options:
        """Raises PareError if the budget cannot be met."""

    def check(self, names: Sequence[str], asked: bool) -> None:
        """Raises PareError for options that name no layer. names: the last parts of all layers' names.

        asked: the recipe itself names this allocation, not the method by default.
        """
        return


def _check(name: str, cls: type) -> None:
    if not issubclass(cls, Allocation):
        raise PareError(f"{name}: {cls.__qualname__} is no allocation. Derive it from Allocation.")


ALLOCATIONS: Registry[Allocation] = Registry("allocation", "paredown.compress.allocation", _check)


def capped(layers: Sequence[Layer], wanted: Mapping[str, float], numbers: float) -> dict[str, float]:
    """Shares proportional to `wanted`, none above 1, which together take so many numbers."""
    shares: dict[str, float] = {}
    rest = list(layers)
    while rest:
        scale = numbers / fsum(wanted[layer.name] * layer.size for layer in rest)
        full = [layer for layer in rest if wanted[layer.name] * scale >= 1]
        if not full:
            return shares | {layer.name: wanted[layer.name] * scale for layer in rest}
        shares |= {layer.name: 1.0 for layer in full}
        numbers -= sum(layer.size for layer in full)
        rest = [layer for layer in rest if layer.name not in shares]
    return shares


def option_for(layer: Layer, share: float) -> Any:
    """The option of the largest choice within a share of the layer; None (dense) for all of it.

    Raises PareError if not even the smallest choice fits.
    """
    if share >= 1:
        return None
    choice = layer.within(share * layer.size)
    if not choice.numbers:
        raise PareError(f"{layer.name}: not even rank 1 fits into {share:.3g} of it: raise kept, or skip the layer.")
    return choice.option
