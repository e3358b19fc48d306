"""The trials of a sweep: a grid of recipes and values, or a list in a YAML file."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from paredown.compress.errors import PareError
from paredown.compress.recipe.yaml import parse_yaml

OPENING, CLOSING, QUOTES = "[{(", "]})", "'\""
FORM = "[{recipe: wanda-50, set: [sparsity=0.4]}, {name: ours, recipe: mine.yaml}]"


@dataclass(frozen=True)
class Trial:
    """One recipe with its changes; `name` is the folder of its output."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    name: str | None = None
    set: tuple[str, ...] = ()


def grid(recipes: Sequence[str], overrides: Sequence[str]) -> list[Trial]:
    """Each recipe with each combination of values; several of one key are separated by commas, as in sparsity=0.4,0.5.

    Raises PareError for none, and for two trials of one name.
    """
    axes = [list(_values(override)) for override in overrides]
    varied = [len(axis) > 1 for axis in axes]
    trials = []
    for recipe in recipes:
        for changes in itertools.product(*axes):
            told = [change for change, several in zip(changes, varied, strict=True) if several]
            trials.append(Trial(_name(recipe, told), recipe, changes))
    return _checked(trials)


def read_trials(path: Path, overrides: Sequence[str] = ()) -> list[Trial]:
    """The trials of a YAML file, a list such as `FORM`; `overrides` come before each one's own. Raises PareError."""
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
        entries = TypeAdapter(list[_Entry]).validate_python(raw)
    except (OSError, UnicodeDecodeError) as fault:
        raise PareError(f"--runs {path} cannot be read: {fault}.") from fault
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise PareError(f"--runs {path}: {place}: {first['msg']}. Wanted a list such as {FORM}") from fault
    return _checked([
        Trial(_name(entry.name or entry.recipe, [] if entry.name else entry.set), entry.recipe, (*overrides, *entry.set))
        for entry in entries
    ])  # fmt: skip


def _values(override: str) -> Iterator[str]:
    """`key=a`, `key=b` of `key=a,b`; a comma within brackets or quotes divides nothing."""
    key, _, text = override.partition("=")
    depth, quote, begin = 0, "", 0
    for place, character in enumerate(f"{text},"):
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES:
            quote = character
        elif character in OPENING + CLOSING:
            depth += 1 if character in OPENING else -1
        elif character == "," and not depth:
            yield f"{key}={text[begin:place].strip()}"
            begin = place + 1
    if begin <= len(text):
        yield f"{key}={text[begin:]}"  # a bracket or a quote that is never closed: the recipe tells


def _name(recipe: str, changes: Sequence[str]) -> str:
    """A name for a folder that says what a trial is: `wanda-50_sparsity-2of4`."""
    parts = [Path(recipe).stem, *map(_short, changes)]
    return "_".join(re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in parts)


def _short(change: str) -> str:
    key, _, value = change.partition("=")
    return f"{key.split('.')[-1]}-{value.replace(':', 'of')}"


def _checked(trials: list[Trial]) -> list[Trial]:
    if not trials:
        raise PareError(f"there is nothing to run: name recipes, as in -r wanda-50,sparsegpt-50, or --runs with {FORM}")
    names: set[Any] = set()
    for trial in trials:
        if trial.name.lower() in names:
            raise PareError(f"two trials are called {trial.name}: name them in a file for --runs, such as {FORM}")
        names.add(trial.name.lower())
    return trials
