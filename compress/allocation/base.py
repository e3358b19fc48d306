"""One budget for all layers, spent on the choices that the method offers for each.

An allocation is a frozen dataclass whose fields are further keys of the recipe's `allocation`; a new one is one file.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Choice, check_needs
from paredown.compress.numerics.moments import Need
from paredown.compress.registry import Registry

Options = dict[str, Any]  # layer -> its option; None: it stays dense
Sensitivities = Mapping[str, Mapping[float, float]]  # layer -> share kept -> loss per token of the model
Reads = Literal["shapes", "scores", "losses", "sensitivities"]


@dataclass(frozen=True)
class Grain:
    """By how many numbers a layer can keep more, where it may keep any share: its option is then the fraction removed."""

    even: int  # one more in each row
    least: int = 1  # one more in each weight that shares the option


@dataclass(frozen=True)
class Layer:
    """One layer as an allocation sees it. The first of its choices is a weight of zeros."""

    name: str
    size: int  # numbers of the dense weight
    choices: Sequence[Choice]  # smallest first
    block: int = 0  # the index of its block
    grain: Grain | None = None  # None: it keeps what one of its choices does, or everything

    def within(self, numbers: float) -> Choice:
        """The largest choice that stores at most so many numbers; with a grain, one between two of them."""
        numbers += 1e-6  # shares are decimal fractions: 0.29 of 100 is 29
        at = max(bisect_right(self.choices, numbers, key=lambda choice: choice.numbers), 1) - 1
        below = self.choices[at]
        if self.grain is None:
            return below
        above = self.choices[at + 1] if at + 1 < len(self.choices) else Choice(self.size, 0.0, None)
        count = min(int(numbers), self.size)
        part = (count - below.numbers) / (above.numbers - below.numbers)
        loss = below.loss + part * (above.loss - below.loss)
        return Choice(count, loss, None if count == self.size else (self.size - count) / self.size)


@dataclass(frozen=True)
class Budget:
    """All layers, the share of their numbers that may stay, and what was measured."""

    layers: Sequence[Layer]
    kept: float
    tokens: int = 0  # of the calibration
    sensitivities: Sensitivities = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)  # by layer, of an allocation that reads scores

    @property
    def numbers(self) -> float:
        """How many numbers may stay."""
        return self.kept * sum(layer.size for layer in self.layers)

    @property
    def room(self) -> int:
        """How many numbers may stay, whole: where layers keep any share, exactly so many stay."""
        if any(layer.grain is None for layer in self.layers):
            return int(self.numbers)
        size = sum(layer.size for layer in self.layers)
        return size - round(round(1 - self.kept, 12) * size)  # 1 - (1 - 0.3) is not quite 0.3


class Allocation(ABC):
    """Chooses each layer's option under one budget."""

    reads: ClassVar[Reads] = "shapes"  # what must be measured first
    # what is measured of the dense model beside the method's own needs; losses of masks are weighed by what is there
    needs: ClassVar[frozenset[Need]] = frozenset()
    picks: ClassVar[bool] = False  # it picks among a layer's choices, however few; others spread shares

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
    check_needs(name, cls)


ALLOCATIONS: Registry[Allocation] = Registry("allocation", "paredown.compress.allocation", _check)


def option_for(layer: Layer, share: float) -> Any:
    """The option of the largest choice within a share of the layer; None (dense) for all of it.

    Raises PareError if not even the smallest choice fits.
    """
    if share >= 1:
        return None
    choice = layer.within(share * layer.size)
    if not choice.numbers:
        raise PareError(
            f"{layer.name}: not even {smallest(layer)} fits into {share:.3g} of it: raise kept, or skip the layer."
        )
    return choice.option


def smallest(layer: Layer) -> str:
    """The least that a layer can keep, in words."""
    if layer.grain is not None:
        return "a single weight"
    option = layer.choices[1].option if len(layer.choices) > 1 else 1
    return f"rank {option}" if isinstance(option, int) else str(option)
