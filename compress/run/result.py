"""What a run measures, added up layer by layer; the report is made from it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from paredown.compress.model.reshape import Reshaped
from paredown.compress.storage.spec import Spec

T = TypeVar("T")

PRUNED = 0.1  # share of zeros above which a model has been pruned before

# fields with which a resumed run starts
SAVED = ("layers", "fallbacks", "reconstruction", "targeted", "numbers", "read", "zeros")


@dataclass(frozen=True)
class LayerResult:
    """The outcome for one layer."""

    weights: int = 0  # numbers of the dense weight; 0 if it was never called, and is not counted as targeted
    numbers: int = 0  # numbers that are stored of it
    record: dict[str, Any] | None = None  # its entry in the report; None if it stays dense
    fallbacks: tuple[str, ...] = ()


@dataclass
class Result:
    """The measurements of all blocks so far. The pipeline adds to it; nothing else does."""

    layers: list[dict[str, Any]] = field(default_factory=list)  # an entry for each compressed layer
    fallbacks: list[str] = field(default_factory=list)
    reconstruction: list[dict[str, Any]] = field(default_factory=list)  # an entry for each block that was tuned
    specs: dict[str, Spec] = field(default_factory=dict)  # of packed weights, for config.json
    evaluation: list[dict[str, Any]] = field(default_factory=list)  # an entry for each text
    targeted: int = 0  # numbers of the dense weights
    numbers: int = 0  # numbers that are stored of them
    read: int = 0  # numbers of the weights as the model has them
    zeros: int = 0  # how many of these are zero
    probe: dict[str, Any] = field(default_factory=dict)  # tokens and their losses, which `verify` compares
    seconds: dict[str, float] = field(default_factory=dict)  # by step of the run
    smaller: Reshaped | None = None  # the smaller model, where blocks or units were removed
    sizes: Mapping[str, int] = field(default_factory=dict)  # units of each group by name, where blocks differ
    merged: Sequence[Sequence[int]] = ()  # blocks that became one, first the one that stays

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds that the `with` block takes to `seconds[step]`."""
        began = perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + perf_counter() - began

    def timing(self, step: str, items: Iterator[T]) -> Iterator[T]:
        """The same items; the seconds that the iterator needs to produce each are added to `seconds[step]`."""
        while True:
            with self.timed(step):
                item = next(items, None)
            if item is None:
                return
            yield item
            del item  # it may be large: free it before the next one is produced

    def look_at(self, weight: Tensor) -> None:
        """Count the zeros of a weight as the model has it."""
        self.read += weight.numel()
        self.zeros += weight.numel() - int(torch.count_nonzero(weight))

    def pruned_before(self) -> list[str]:
        """A sentence if more than PRUNED of the weights were zeros before anything was compressed."""
        share = self.zeros / max(self.read, 1)
        if share <= PRUNED:
            return []
        return [
            f"{share:.1%} of the targeted weights were zeros already: the model was pruned before, and the figures compare "
            "with the pruned model, not with the one that it was made from"
        ]

    def add(self, layer: LayerResult) -> None:
        """Count one more layer."""
        self.targeted += layer.weights
        self.numbers += layer.numbers
        self.fallbacks += layer.fallbacks
        if layer.record is not None:
            self.layers.append(layer.record)

    def state(self) -> dict[str, Any]:
        """What `restore` reads, as plain data for JSON."""
        specs = {name: spec.to_json() for name, spec in self.specs.items()}
        return {**{name: getattr(self, name) for name in SAVED}, "specs": specs, "seconds": dict(self.seconds)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the `state` of an interrupted run."""
        for name in (*SAVED, "seconds"):
            setattr(self, name, state[name])
        self.specs = {name: Spec.from_json(name, raw) for name, raw in state["specs"].items()}
