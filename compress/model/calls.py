"""How a model calls its decoder blocks: recorded while the model's own forward runs, so no architecture is rewritten here.

Beside the hidden states a block may take what is the same for every text (masks, rotary tables), what depends on the text,
further outputs of blocks before it (`FromBlock`), and a dictionary or list that blocks write to (`Shared`).
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import decoder_list
from paredown.compress.model.carried import FromBlock, Shared, mapped
from paredown.compress.storage.returns import returned

PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.Size, Enum, PretrainedConfig, type(None))


class AllRecorded(Exception):
    """Stops the model's forward once every recorder was called."""


@dataclass(frozen=True)
class OfText:
    """A tensor, in host memory, that another text has with other values."""

    tensor: Tensor


@dataclass
class Call:
    """The arguments of one call of a decoder layer, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def mapped(self, change: Callable[[Any], Any]) -> "Call":
        """The call with `change` made to everything in it that is no tuple, list or dictionary."""
        return Call(mapped(self.args, change), mapped(self.kwargs, change))

    def leaves(self) -> list[Any]:
        """Everything in the call that is no tuple, list or dictionary, in a fixed order."""
        found: list[Any] = []
        self.mapped(found.append)
        return found


class Recorder(nn.Module):
    """Takes the place of a decoder layer while the model's own forward runs, and records how it is called."""

    def __init__(self, index: int, layer: nn.Module, order: list[int]) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule, so that the model's parameter names do not change
        self.outputs = returned(layer)
        self.index = index
        self.order = order  # of all recorders: their indices as they are called
        self.call: Call | None = None  # the last one
        self.hidden: Tensor | None = None  # the hidden states (batch, length, hidden) of the last call
        self.output: Tensor | None = None  # what to return (batch, length, hidden); None: the hidden states of the call
        self.stop = False  # raise AllRecorded instead of returning

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models read attributes of their layers, such as `attention_type`
            return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        args = args[1:] if args and args[0] is hidden else args
        self.hidden, self.call = hidden, Call(args, kwargs)
        self.order.append(self.index)
        if self.stop:
            raise AllRecorded
        output = hidden if self.output is None else self.output
        if self.outputs is None:
            return output
        return (output, *(FromBlock(self.index, i) for i in range(1, self.outputs)))


@contextmanager
def recorders(source: ModelSource) -> Iterator[list[Recorder]]:
    """Inside the `with` block a recorder stands in the place of every decoder layer; yields the recorders in order."""
    layers = decoder_list(source)
    originals = list(layers)
    order: list[int] = []
    replacements = [Recorder(i, layer, order) for i, layer in enumerate(originals)]
    for i, recorder in enumerate(replacements):
        layers[i] = recorder
    try:
        yield replacements
    finally:
        for i, layer in enumerate(originals):
            layers[i] = layer


def calls_of(layers: list[Recorder], source: ModelSource) -> list[Call]:
    """The calls that were recorded of one batch, in the order of the blocks, with `Shared` in the place of what is shared.

    Raises PareError for a model that cannot be run block after block.
    """
    if (order := layers[0].order) != list(range(len(layers))):
        raise unsupported(source, f"one forward pass does not call block after block, each once, but {_listed(order)}")
    for before, after in pairwise(layers):
        assert before.hidden is not None and after.hidden is not None
        if before.hidden is not after.hidden and not torch.equal(before.hidden, after.hidden):
            raise unsupported(
                source, f"the hidden states are changed between block {before.index} and block {after.index}"
            )
    calls = _with_shared([layer.call for layer in layers if layer.call is not None])
    for leaf in (leaf for call in calls for leaf in call.leaves()):
        if not isinstance(leaf, (Tensor, FromBlock, Shared, *PLAIN)):
            raise unsupported(source, f"its blocks are given a {type(leaf).__name__}, which is no plain data")
    return calls


def unsupported(source: ModelSource, why: str) -> PareError:
    """The refusal of a model whose blocks cannot be run one after another."""
    return PareError(f"{source.id}: {source.config.model_type} models cannot be compressed block by block: {why}.")


def _listed(order: list[int]) -> str:
    return ", ".join(map(str, order[:20])) + ", ..." * (len(order) > 20) if order else "none of them"


def interned(calls: list[Call], first: list[Call]) -> list[Call]:
    """The calls of a batch, with the tensors of the `first` batch of its size wherever they are equal, else OfText."""
    known: dict[tuple[int, int], Any] = {}  # models give most tensors to every block

    def same(mine: Any, theirs: Any) -> Any:
        if not isinstance(mine, Tensor):
            return mine
        key = (id(mine), id(theirs))
        if key not in known:
            equal = isinstance(theirs, Tensor) and mine.shape == theirs.shape and torch.equal(mine, theirs)
            known[key] = theirs if equal else OfText(mine.to("cpu"))
        return known[key]

    result = []
    for call, other in zip(calls, first, strict=True):
        theirs = other.leaves()
        if len(theirs) != len(call.leaves()):
            theirs = [None] * len(call.leaves())
        remaining = iter(theirs)
        result.append(call.mapped(lambda leaf, remaining=remaining: same(leaf, next(remaining))))  # type: ignore[misc]
    return result


def _with_shared(calls: list[Call]) -> list[Call]:
    """The calls with Shared in the place of each dictionary or list that more than one of them holds as an argument."""
    holders: dict[int, list[int]] = {}
    containers: dict[int, Any] = {}
    for i, call in enumerate(calls):
        for value in (*call.args, *call.kwargs.values()):
            if isinstance(value, MutableMapping | list):
                containers[id(value)] = value
                holders.setdefault(id(value), []).append(i)
    shared = [key for key, blocks in holders.items() if len(set(blocks)) > 1]
    stands = {key: Shared(number, containers[key]) for number, key in enumerate(shared)}
    return [
        Call(tuple(stands.get(id(v), v) for v in c.args), {k: stands.get(id(v), v) for k, v in c.kwargs.items()})
        for c in calls
    ]
