"""The settings of a config that speak of its blocks one by one, and what they may be once some blocks are gone."""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from paredown.compress.checkpoint.leftovers import EXTRA_LAYERS

COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
NO_LAYERS = re.compile(r"token|languages|bos_|eos_|pad_")  # lists that are never about layers
OF_LAYERS = re.compile(r"layer|block|idx|indices|pattern")
FIRST = re.compile(r"first_k|dense_layers|window_layers|start_index|end_index|dense_sliding")  # count from the front
PERIODS = re.compile(
    r"layers?_(period|offset|interval|step|freq)|sparse_step|attention_interval|window_pattern|every_n|layer_group_size"
)
LONGEST = 8  # of the periods that are tried

Values = dict[str, Any]  # settings by key
Options = dict[str, list[Any]]  # for each setting what it may be, the likeliest first


def options(text: Any, kept: Sequence[int], count: int) -> Options:
    """For each setting of a text model's config that may speak of its `count` blocks what it may be for those that stay."""
    found: Options = {}
    for key, value in vars(text).items():
        if key.startswith("_") or NO_LAYERS.search(key):
            continue
        if isinstance(value, list | tuple | str) and (meant := list(_of_list(key, value, kept, count))):
            found[key] = [*meant, value]
        elif isinstance(value, float) and "depth" in key:  # a scale of 1 / sqrt(blocks)
            found[key] = [value * math.sqrt(len(kept) / count), value]
        elif type(value) is int and (meant := list(_of_number(key, value, kept, count))):
            found[key] = [*meant, value]
    return found | _of_count(text, kept, count, found)


def starts(found: Options) -> list[Values]:
    """Where to begin: what is likeliest, and the same with kinds that do not alternate, so that lists of blocks say all."""
    likeliest = {key: meant[0] for key, meant in found.items()}
    even = {key: 1 for key, value in likeliest.items() if PERIODS.search(key) and "offset" not in key}
    return [likeliest, {**likeliest, **even}]


def repairs(values: Mapping[str, Any], found: Options, wrong: Collection[int]) -> Iterator[Values]:
    """Other values to try where the blocks at the positions `wrong` of the smaller model are not what they were."""
    for key, value in values.items():
        if wrong and OF_LAYERS.search(key) and isinstance(value, list) and all(type(i) is int for i in value):
            yield {**values, key: sorted({*value} ^ {*wrong})}
    for key, meant in found.items():
        yield from ({**values, key: value} for value in meant if value != values[key])
    for key in (key for key in values if PERIODS.search(key)):
        offset = key.replace("period", "offset")
        shifted = offset != key and offset in values
        for period in range(1, LONGEST + 1):
            for shift in range(period if shifted else 1):
                yield {**values, key: period, **({offset: shift} if shifted else {})}


def _of_count(text: Any, kept: Sequence[int], count: int, found: Options) -> Options:
    """How many blocks there are; heads of multi-token prediction, which read the last block, go."""
    named = dict.fromkeys(text.attribute_map.get(key, key) for key in COUNTS)
    counts: Options = {key: [len(kept), count] for key in named if getattr(text, key, None) == count}
    for key in named:
        value = getattr(text, key, None)
        if key not in counts and "encoder" not in key and value == 2 * count:  # two sublayers a block
            counts[key] = [2 * len(kept), value]
    extra = {key: getattr(text, key, None) for key in EXTRA_LAYERS}
    return counts | {key: [0, value] for key, value in extra.items() if isinstance(value, int) and value > 0}


def _of_list(key: str, value: Any, kept: Sequence[int], count: int) -> Iterator[Any]:
    """What a list may become: of one entry for each block, or of the indices of some blocks."""
    if isinstance(value, str):
        if len(value) == count and OF_LAYERS.search(key):
            yield "".join(value[i] for i in kept)
        return
    position = {index: i for i, index in enumerate(kept)}
    indices = all(type(i) is int and 0 <= i < count for i in value) and len(set(value)) == len(value)
    renumbered = type(value)(position[i] for i in value if i in position) if indices else value
    if indices and OF_LAYERS.search(key) and len(value) != count:
        yield renumbered
    elif len(value) == count:
        yield type(value)(value[i] for i in kept)
        if indices:
            yield renumbered
    elif key == "attention_types" and (each := _expanded(value)) and len(each) == count:
        yield [[[each[i] for i in kept], 1]]


def _expanded(value: Any) -> list[Any]:
    """The entries of a list of patterns that say how often each is repeated (GPT-Neo)."""
    return [entry for pattern, times in value for _ in range(times) for entry in pattern]


def _of_number(key: str, value: int, kept: Sequence[int], count: int) -> Iterator[int]:
    """What a number may become that counts blocks from the front, or says where those that are meant begin or end."""
    if FIRST.search(key) and value <= count:
        yield sum(i < value for i in kept)
        yield sum(i <= value for i in kept) - 1
    elif PERIODS.search(key):
        yield value
