"""The key of a config that says how many units groups have; whether it says that and nothing else is tried."""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from paredown.compress.checkpoint.skeleton import skeleton
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.methods.base import Group

Shapes = Mapping[str, torch.Size]
# names of keys that may be None, which then stands for a multiple of the hidden size
INNER = re.compile(r"inner|intermediate|ffn|ff(_|$)|mlp|feed_?forward")


def with_units(config: Any, key: str, units: int) -> Any:
    """A copy of a model's config with `units` at a `key` of its text model; a list is as long as before."""
    changed = deepcopy(config)
    text = changed.get_text_config()
    before = getattr(text, key)
    setattr(text, key, type(before)([units] * len(before)) if isinstance(before, list | tuple) else units)
    return changed


def with_keys(source: ModelSource, groups: Mapping[int, Sequence[Group]]) -> dict[int, list[Group]]:
    """The groups of a model, by block, with the key of the text model's config that says how many units they have.

    A key is right if the model of a config in which it is smaller has smaller groups, and is the same otherwise: all its
    groups must be given. Groups without such a key get "".
    """
    unnamed = [group for found in groups.values() for group in found]
    before, keys = _shapes(source.config), dict[Group, str]()
    for units in sorted({group.units for group in unnamed}):
        for key in _candidates(source.config.get_text_config(), units):
            members = [g for g in unnamed if g.units == units and g not in keys]
            keys |= dict.fromkeys(_sized(source.config, key, members, before), key)
    return {
        index: [replace(group, config_key=keys.get(group, "")) for group in found] for index, found in groups.items()
    }


def _sized(config: Any, key: str, groups: Sequence[Group], before: Shapes) -> list[Group]:
    """Those of the groups, which are alike in size, that a key makes smaller; [] if it changes anything else or nothing.

    Two sizes are tried: a class may round.
    """
    members = list(groups)
    for fewer in sorted({max(group.units // parts, 1) for group in groups for parts in (2, 8)}):
        try:
            after = _shapes(with_units(config, key, fewer))
        except PareError:  # its class makes nothing of such a config
            return []
        expected = {group: _smaller(group, fewer, before) for group in members}
        members = [g for g, shapes in expected.items() if all(after.get(n) == shape for n, shape in shapes.items())]
        if {**before, **{n: shape for group in members for n, shape in expected[group].items()}} != after:
            return []
    return members


def _smaller(group: Group, units: int, before: Shapes) -> dict[str, torch.Size]:
    """The shapes of a group's parameters with `units` left."""
    shapes: dict[str, torch.Size] = {}
    for part in group.parts:
        sizes = list(shapes.get(part.name, before[part.name]))
        sizes[part.dim] -= part.width * (group.units - units)
        shapes[part.name] = torch.Size(sizes)
    return shapes


def _candidates(text: Any, units: int) -> Iterator[str]:
    """Keys that may say that something has so many units."""
    for key, value in text.to_dict().items():
        entries = value if isinstance(value, list | tuple) else [value]
        same = bool(entries) and all(type(entry) is int and entry == units for entry in entries)
        if same or (value is None and INNER.search(key)):
            yield key


def _shapes(config: Any) -> Shapes:
    return {name: tensor.shape for name, tensor in skeleton(config, {}, torch.float32).state_dict().items()}
