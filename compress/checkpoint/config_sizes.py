"""Numbers in a config.json that the files contradict so far that a model must not be built: it would take all memory."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paredown.compress.checkpoint.tensor_files import Entry
from paredown.compress.errors import PareError

MOST = 1 << 63  # no number in a config is so large
LAYERS, EXPERTS = re.compile(r"(^|_)(n_?)?layers?$|^depth$"), re.compile(r"experts?$")
SIZES = re.compile(r"(size|dim|heads?|width|rank|embd|d_model|d_ff|inner|channels|groups?)$")
# sizes of windows, images and the like, which no tensor has as a dimension
NO_DIMENSION = re.compile(r"window|chunk|image|patch|position|block|batch|kernel|context|sample|crop|max")
NUMBERED = re.compile(r"\.([0-9]{1,9})\.")


def check_sizes(path: Path, settings: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Raises PareError naming a number of the config.json `path` that is far beyond what the tensors `entries` allow."""
    numbered = 1 + max((int(n) for name in entries for n in NUMBERED.findall(name)), default=0)
    widest = max((size for entry in entries.values() for size in entry.shape), default=1)
    stacked = max((entry.shape[0] for entry in entries.values() if len(entry.shape) > 2), default=1)
    limits = (  # a few more are an ordinary fault, which is told with the names of the missing tensors
        (LAYERS, 64 + 8 * numbered, f"the files hold tensors of {numbered} layers"),
        (EXPERTS, max(4096, 8 * numbered, 8 * stacked), f"the files hold tensors of at most {max(numbered, stacked)}"),
        (SIZES, max(1 << 20, 16 * widest), f"the largest dimension of a tensor in the files is {widest}"),
        (re.compile(r"labels$"), 1 << 14, "no language model has so many"),
        (re.compile(""), MOST, "no model has so many"),
    )
    for key, value in _numbers(settings):
        leaf = key.rpartition(".")[2]
        pattern, most, held = next(limit for limit in limits if limit[0].search(leaf))
        if pattern is SIZES and NO_DIMENSION.search(leaf):
            most, held = MOST, limits[-1][2]
        if abs(value) > most:
            shown = str(value) if abs(value) < MOST else "a number of more than 18 digits"
            raise PareError(
                f"{path} says {key}: {shown}, and {held}. The weights and the config are not of the same model."
            )


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """All whole numbers inside nested mappings and lists, by where they stand."""
    stack: list[tuple[str, Any]] = [("", settings)]
    while stack:
        place, value = stack.pop()
        if isinstance(value, dict):
            stack.extend((f"{place}.{key}" if place else str(key), inner) for key, inner in value.items())
        elif isinstance(value, list):
            stack.extend((place, inner) for inner in value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield place, value
