"""A recipe's plain data: from a file or a shipped recipe, and changed by what the command line says."""

from collections.abc import Collection, Sequence
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.recipe.yaml import oddity, parse_yaml, shown

MOST_BYTES = 1 << 18  # of a recipe's file


def shipped_names() -> list[str]:
    """The names of the recipes that come with the package, sorted."""
    names = (f.name for f in files("paredown.recipes").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def read(name_or_path: str) -> dict[str, Any]:
    """The plain data of a shipped recipe, by name, or of a file. Raises PareError."""
    try:
        text = _text_of(name_or_path)
    except OSError as fault:
        raise PareError(f"the recipe {name_or_path} cannot be read: {fault.strerror}.") from fault
    except UnicodeDecodeError as fault:
        raise PareError(f"{name_or_path} is no UTF-8 text: {fault}. Save it as UTF-8.") from fault
    try:
        raw = parse_yaml(text)
    except PareError as fault:
        raise PareError(f"{name_or_path} is no valid YAML: {fault}") from fault
    if not isinstance(raw, dict):
        raise PareError(f"{name_or_path}: a recipe is a mapping with at least the key 'method'; found {shown(raw)}.")
    if odd := oddity(raw):
        raise PareError(f"{name_or_path}: {odd}")
    return raw


def _text_of(name_or_path: str) -> str:
    """The YAML of a shipped recipe or of a file."""
    path = Path(name_or_path)
    if not path.suffix and not path.is_file():  # a folder may well be called as a recipe is
        known = shipped_names()
        if name_or_path not in known:
            raise PareError(
                f"no recipe is called {shown(name_or_path)}, and no such file exists."
                f"{did_you_mean(name_or_path, known)} List them with: paredown recipes"
            )
        return (files("paredown.recipes") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    if path.is_dir():
        raise PareError(f"the recipe {name_or_path} is a folder. Name a YAML file in it, or a shipped recipe.")
    if not path.exists():
        raise PareError(f"the recipe file {name_or_path} does not exist. List shipped recipes with: paredown recipes")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise PareError(f"{name_or_path} is no recipe: it has more than {MOST_BYTES:,} bytes. Name a short YAML file.")
    return content.decode("utf-8")


def changed(raw: Any, origin: str, overrides: Sequence[str], keys: Collection[str]) -> dict[str, Any]:
    """A raw recipe with the `overrides` in it: a bare name that is none of a recipe's `keys` is an option.

    Raises PareError if it is no recipe, or holds what no recipe needs.
    """
    if not isinstance(raw, dict):
        raise PareError(f"{origin}: a recipe is a mapping with at least the key 'method'; found {shown(raw)}.")
    copy: dict[str, Any] = deepcopy(raw) if overrides else raw
    for override in overrides:
        _override(copy, override, keys)
    if odd := oddity(copy):
        raise PareError(f"{origin}: {odd}")
    return copy


def _override(raw: dict[str, Any], override: str, keys: Collection[str]) -> None:
    """Apply one `key.sub=value` to the raw recipe, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise PareError(f"--set {shown(override)} must look like key=value, as in --set calibration.sequences=64.")
    path = key.split(".")
    if len(path) == 1 and path[0] not in keys:
        path = ["options", *path]
    node: Any = raw
    for part in path[:-1]:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):  # a stage
            node = node[int(part)]
        else:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict | list):
            raise PareError(f"--set {shown(override)}: {part!r} holds a value, not keys.")
    if not isinstance(node, dict):
        raise PareError(f"--set {shown(override)}: name a stage by its number, as in stages.0.options.kept=0.8.")
    # on the command line nobody quotes 2:4, which YAML would read as a number to the base of 60
    pattern = text.replace(":", "").strip().isdigit() and ":" in text
    try:
        value = text.strip() if pattern else parse_yaml(text)
    except PareError as fault:
        told = f"--set {shown(override)}: {shown(text)} is no valid YAML"
        raise PareError(f"{told} ({fault}). Close its brackets and quotes.") from fault
    if odd := oddity(value, key):
        raise PareError(f"--set {shown(override)}: {odd}")
    node[path[-1]] = value
    for one, other in (("source", "sources"), ("sources", "source")):
        if path == ["calibration", one]:
            node.pop(other, None)


def listed(origin: str, faults: Sequence[str]) -> PareError:
    """One error of all these faults."""
    return PareError(f"{origin}: " + ("\n  ".join(["", *faults]) if len(faults) > 1 else faults[0]))
