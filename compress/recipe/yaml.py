"""YAML that strangers wrote, read as plain data: what no recipe needs ends in one sentence, however it is nested."""

import math
from datetime import date
from typing import Any

import yaml

from paredown.compress.errors import PareError

MOST_VALUES = 10_000  # those counted again that an alias repeats
MOST_DEPTH = 32  # of lists and mappings in each other
MOST_CHARACTERS = 10_000  # of one value
TOO_MANY = f"there are more than {MOST_VALUES:,} values, those that an alias repeats counted each time."
TOO_DEEP = f"lists or mappings lie more than {MOST_DEPTH} deep in each other."
SHOWN = 120  # characters of a value in a message


def parse_yaml(text: str) -> Any:
    """What a YAML text holds. Raises PareError with the reason if it cannot be read."""
    try:
        _check_events(text)
        return yaml.load(text, Loader=_Loader)  # a safe loader that refuses more
    except PareError:
        raise
    except yaml.YAMLError as fault:
        raise PareError(str(fault)) from fault
    except Exception as fault:  # a number of 5,000 digits, a 13th month, an empty !!int: each raises its own kind
        raise PareError(f"a value cannot be read ({type(fault).__name__}: {shown(str(fault))}).") from fault


def oddity(value: Any, name: str = "") -> str | None:
    """The first thing in `value` that no recipe needs, as a sentence; None if there is nothing odd.

    Values without end, dates, numbers that are none or far too large, characters that no text has.
    """
    waiting, seen = [(name, value, 0)], 0
    while waiting:
        name, value, depth = waiting.pop()
        seen += 1
        if seen > MOST_VALUES:
            return TOO_MANY
        if depth > MOST_DEPTH:
            return TOO_DEEP
        if isinstance(value, dict):
            waiting += [part for key in value for part in _parts(key, value[key], name, depth + 1)]
        elif isinstance(value, list | tuple):
            waiting += [(name, one, depth + 1) for one in value]
        elif fault := _odd_scalar(value):
            return f"{name}: {fault}"
    return None


def shown(value: Any) -> str:
    """A value as a message shows it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python converts
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _check_events(text: str) -> None:
    """Raise PareError for what would take long to build, or more depth than Python's stack has."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise PareError(TOO_DEEP)
        if count > 2 * MOST_VALUES:  # a value has two at most
            raise PareError(TOO_MANY)


def _parts(key: Any, value: Any, name: str, depth: int) -> list[tuple[str, Any, int]]:
    """A key of a mapping and its value, each with its path and depth."""
    word = key if isinstance(key, str) and key.isidentifier() and len(key) <= SHOWN else shown(key)
    path = f"{name}.{word}" if name else word
    return [(path, value, depth), (path, key, depth)]


def _odd_scalar(value: Any) -> str | None:
    if isinstance(value, int) and value.bit_length() > 63:
        return f"a number of {value.bit_length():,} bits is too large."
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no finite number."
    if isinstance(value, date | bytes | set):
        return f"{shown(value)} is neither a word nor a number. Quote it if it is a word."
    return _odd_word(value) if isinstance(value, str) else None


def _odd_word(word: str) -> str | None:
    if len(word) > MOST_CHARACTERS:
        return f"a value of {len(word):,} characters is too long; {MOST_CHARACTERS:,} are allowed."
    if word.strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return f"{word} is no finite number."
    if "\0" in word or any("\ud800" <= character <= "\udfff" for character in word):
        return f"{shown(word)} holds a character that no text has."
    return None


class _Loader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win without a word; here they are a fault, as are lists and mappings as keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a list or mapping is no key", key.start_mark)
            name = self.construct_object(key, deep=True)
            if name in seen:
                told = f"the key {shown(name)} stands twice"
                raise yaml.constructor.ConstructorError(None, None, told, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
