"""From which blocks' caches transformers reads how much text came before: their attention must stay."""

from collections.abc import Iterable
from inspect import signature
from typing import Any

from torch import nn
from transformers import DynamicCache

from paredown.compress.errors import PareError

CACHES = {"past_key_values", "past_key_value", "layer_past", "cache_params", "cache"}  # arguments of what has one


def check_caches(config: Any, model: nn.Module, within: str, absent: Iterable[str]) -> None:
    """Raises PareError if one of the modules `absent`, by full name in `model`, is one whose cache is read for all blocks.

    `within` is the name of the list of blocks. `model` is as it was before they were removed.
    """
    read = _read(config)
    for name in absent:
        number = name.removeprefix(f"{within}.").partition(".")[0]
        if number.isdecimal() and int(number) in read and CACHES & _arguments(model, name):
            raise PareError(
                f"{name} cannot be left out: {read[int(number)]}, and transformers reads from its cache how much text came "
                "before. Leave out that of another block."
            )


def _arguments(model: nn.Module, name: str) -> set[str]:
    return set(signature(model.get_submodule(name).forward).parameters)


def _read(config: Any) -> dict[int, str]:
    """The first block of each kind, and the last with a linear cache: their numbers, and why."""
    try:
        cache = DynamicCache(config=config.get_text_config())
        kinds = list(zip(cache.is_sliding, cache.is_linear, strict=True))
    except Exception:  # of a class whose layers have no such cache
        kinds = []
    linear = [i for i, (_, is_linear) in enumerate(kinds) if is_linear]
    last = {linear[-1]: "it lies in the last block of its kind"} if linear else {}
    first = {kinds.index(kind): "it lies in the first block of its kind" for kind in kinds}
    return last | first | {0: "it lies in the first block"}
