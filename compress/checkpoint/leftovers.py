"""Tensors of the files that the model class does not know: those that go along, and those that belong to nothing."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

INDEX = re.compile("[0-9]{1,9}")
EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")


@dataclass
class Leftovers:
    """Names in the checkpoint."""

    copied: list[str] = field(default_factory=list)  # extra heads, old buffers
    cut: dict[str, list[str]] = field(default_factory=dict)  # by layer: ordinary ones that config.json leaves out

    def remarks(self, model: Any) -> Iterator[str]:
        """What a user should know of them, in sentences."""
        if self.cut:
            count = sum(len(keys) for keys in self.cut.values())
            yield (
                f"{count} tensors of layers that config.json leaves out ({_some(self.cut)}) are not part of the model "
                "and are not copied"
            )
        if self.copied:
            yield (
                f"{len(self.copied)} tensors that {type(model).__name__} does not know are copied as they are "
                f"({_some(self.copied)})"
            )


def find_leftovers(model: Any, unknown: Mapping[str, str]) -> Leftovers:
    """Sort the keys that the class of `model` does not know; `unknown` says what the class would call them.

    A layer beyond the last of its list is cut if it looks like the others. One with tensors of its own, such as those of
    multi-token prediction, goes along, and so do those that the config counts apart.
    """
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    places = {key: _place(name, lists) for key, name in unknown.items()}
    ordinary: dict[str, set[str]] = defaultdict(set)  # by list: names inside its layers
    inside = [place for name in model.state_dict() if (place := _place(name, lists))]
    for place in inside + [place for place in places.values() if place]:
        if place.index < lists[place.within]:
            ordinary[place.within].add(place.rest)
    extra = max((_count(model.config, key) for key in EXTRA_LAYERS), default=0)
    layers: dict[str, list[str]] = defaultdict(list)
    kept: set[str] = set()
    for key, place in places.items():
        if place and place.index >= lists[place.within]:
            layers[place.layer].append(key)
            if place.rest not in ordinary[place.within] or place.index < lists[place.within] + extra:
                kept.add(place.layer)
    cut = {layer: keys for layer, keys in layers.items() if layer not in kept}
    gone = {key for keys in cut.values() for key in keys}
    return Leftovers(sorted(set(unknown) - gone), cut)


@dataclass(frozen=True)
class _Place:
    within: str  # the name of a list of layers
    index: int
    rest: str  # the name inside the layer

    @property
    def layer(self) -> str:
        return f"{self.within}.{self.index}"


def _place(name: str, lists: Mapping[str, int]) -> _Place | None:
    """Where a tensor lies: in the outermost list of layers that holds it."""
    parts = name.split(".")
    for i, part in enumerate(parts[1:], 1):
        if INDEX.fullmatch(part) and (within := ".".join(parts[:i])) in lists:
            return _Place(within, int(part), ".".join(parts[i + 1 :]))
    return None


def _count(config: Any, key: str) -> int:
    value = getattr(config.get_text_config(), key, None)
    return value if isinstance(value, int) else 0


def _some(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first}, ..." if others else first
