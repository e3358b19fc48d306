"""The keys of a config that say how many units groups have; whether they say that and nothing else is tried."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from paredown.compress.checkpoint.configs import first_line
from paredown.compress.checkpoint.skeleton import skeleton
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.methods.base import Group, Part

Shapes = Mapping[str, torch.Size]
Numbers = Mapping[str, float]  # that modules hold, by name
Value = int | list[int]  # of a key: a number, or one for each block
# names of keys that may be None, which then stands for a multiple of the hidden size
INNER = re.compile(r"inner|intermediate|ffn|ff(_|$)|mlp|feed_?forward")
# names of keys that may count heads or what they have, and of those that say how large one is where the hidden size does not
HEADS = re.compile(r"(^|_)(heads?|groups|d_ssm)($|_per_layer)")
HEAD_SIZES = ("head_dim", "attention_head_size")
TOGETHER = 2  # at most so many keys change with the one that says how many units there are


@dataclass(frozen=True)
class _Keys:
    """What may say how many units groups have."""

    key: str
    further: tuple[str, ...] = ()
    size: str = ""  # the key of how large a head is, where that must be said


def with_units(config: Any, key: str, units: Value) -> Any:
    """A copy of a model's config with `units` at a `key` of its text model; a list is as long as before."""
    changed = deepcopy(config)
    text = changed.get_text_config()
    before = getattr(text, key, None)
    if isinstance(before, list | tuple):
        setattr(text, key, type(before)(units if isinstance(units, list) else [units] * len(before)))
    else:
        setattr(text, key, units)
    return changed


def smaller_values(config: Any, groups: Iterable[Group], units: Mapping[str, int]) -> dict[str, Value]:
    """What each key of a config's text model is with `units` left in each group, by the group's key."""
    values: dict[str, Value] = dict(units)
    for group in groups:
        text, count = config.get_text_config(), units[group.config_key]
        for key, each in group.further:
            before = getattr(text, key)
            several = isinstance(before, list | tuple)
            values[key] = [entry * count // group.units for entry in before] if several else each * count
        values |= dict(group.fixed)
    return values


def check_accepted(source: ModelSource, values: Mapping[str, Value]) -> None:
    """Raises PareError if the class of the model's config refuses one with these values, such as heads of an odd number."""
    changed = source.config
    for key, value in values.items():
        changed = with_units(changed, key, value)
    try:
        type(changed).from_dict(changed._decode_special_floats(json.loads(changed.to_json_string(use_diff=True))))
    except Exception as fault:  # whatever a class does with a value that it did not expect
        form = " and ".join(f"{key} {value}" for key, value in values.items())
        raise PareError(
            f"{source.id}: the config of a {source.family} model refuses {form} ({first_line(fault)}). Ask for another kept "
            "or units."
        ) from fault


def with_keys(source: ModelSource, groups: Mapping[int, Sequence[Group]]) -> dict[int, list[Group]]:
    """The groups of a model, by block, with the keys of the text model's config that say how many units they have.

    Keys are right if the model of a config in which they are smaller has smaller groups, and is the same otherwise: all its
    groups must be given. Groups without such keys get "".
    """
    config, before = source.config, _built(source.config)
    text = config.get_text_config()
    named: dict[tuple[Part, ...], Group] = {}
    for units, kind in sorted({(group.units, group.kind) for found in groups.values() for group in found}):
        alike = [(i, g) for i, found in groups.items() for g in found if (g.units, g.kind) == (units, kind)]
        for keys in _candidates(text, alike[0][1]):
            left = [_named(text, keys, i, g) for i, g in alike if g.parts not in named]
            named |= {group.parts: group for group in _sized(config, left, before)}
    return {index: [named.get(group.parts, group) for group in found] for index, found in groups.items()}


def _named(text: Any, keys: _Keys, index: int, group: Group) -> Group:
    """A group of block number `index` with these keys."""
    values = {key: getattr(text, key) for key in keys.further}
    own = {key: value[index] if isinstance(value, list | tuple) else value for key, value in values.items()}
    each = tuple((key, value // group.units) for key, value in own.items())
    named = replace(group, config_key=keys.key, further=each)
    return replace(named, fixed=((keys.size, named.vector),)) if keys.size else named


def _sized(config: Any, groups: Sequence[Group], before: tuple[Shapes, Numbers]) -> list[Group]:
    """Those of the groups, which are alike in size, that their keys make smaller; [] if these change anything else.

    Two sizes are tried: a class may round. Keys that count heads belong together: no number that a module holds may change
    but in proportion, such as how many query heads share a key, or as a parameter's size does.
    """
    shapes_before, numbers_before = before
    members = list(groups)
    for fewer in sorted({max(group.units // parts, 1) for group in groups for parts in (2, 8)}):
        if not members:
            return []
        changed = config
        for key, value in smaller_values(config, members, {members[0].config_key: fewer}).items():
            changed = with_units(changed, key, value)
        try:
            after, numbers = _built(changed)
        except PareError:  # its class makes nothing of such a config
            return []
        expected = {group: _smaller(group, fewer, shapes_before) for group in members}
        members = [g for g, shapes in expected.items() if all(after.get(n) == shape for n, shape in shapes.items())]
        if {**shapes_before, **{n: shape for group in members for n, shape in expected[group].items()}} != after:
            return []
        sizes = {(shapes_before[n][d], shape[d]) for n, shape in after.items() for d in range(len(shape))}
        if groups[0].are_heads and not all(
            numbers.get(name) in (was, was * fewer / groups[0].units) or (was, numbers.get(name)) in sizes
            for name, was in numbers_before.items()
        ):
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


def _candidates(text: Any, group: Group) -> Iterator[_Keys]:
    """Keys that may say that something has so many units.

    Of heads further ones may count what each has of query heads, and one may have to say how large a head is: else it gets
    larger the fewer there are.
    """
    settings = text.to_dict()
    numbers = {key: value if isinstance(value, list | tuple) else [value] for key, value in settings.items()}
    numbers = {key: own for key, own in numbers.items() if own and all(type(n) is int and n > 0 for n in own)}
    found = [key for key, own in numbers.items() if set(own) == {group.units}]
    if not group.are_heads:
        untold = [key for key, value in settings.items() if value is None and INNER.search(key)]
        yield from (_Keys(key) for key in settings if key in found or key in untold)
        return
    heads = [key for key, own in numbers.items() if HEADS.search(key) and not any(n % group.units for n in own)]
    sizes = [size for size in HEAD_SIZES if not hasattr(type(text), size) or settings.get(size, 0) is None]
    for key in found:
        others = [other for other in heads if other != key] if key in heads else []
        for count in range(min(len(others), TOGETHER) + 1):
            for further in combinations(others, count):
                yield from (_Keys(key, further, size) for size in ("", *sizes))


def _built(config: Any) -> tuple[Shapes, Numbers]:
    """The parameters of a config's model, and the numbers that its modules hold."""
    model = skeleton(config, {}, torch.float32)
    numbers = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) in (int, float)
    }
    return {name: tensor.shape for name, tensor in model.state_dict().items()}, numbers
