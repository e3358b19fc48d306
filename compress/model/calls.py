"""How a model calls its decoder blocks: recorded while the model's own forward runs, so no architecture is rewritten here."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import decoder_list


class AllRecorded(Exception):
    """Stops the model's forward once every recorder was called."""


@dataclass
class Call:
    """The arguments of one call of a decoder layer, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def same(self, other: "Call") -> bool:
        """Whether both calls have equal arguments."""
        mine, theirs = _leaves((self.args, self.kwargs)), _leaves((other.args, other.kwargs))
        return len(mine) == len(theirs) and all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
            for a, b in zip(mine, theirs, strict=True)
        )


class Recorder(nn.Module):
    """Takes the place of a decoder layer while the model's own forward runs, and records how it is called."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule, so that the model's parameter names do not change
        self.returns_tuple = returns_tuple
        self.call: Call | None = None  # the last call
        self.hidden: Tensor | None = None  # the hidden states (batch, length, hidden) of that call
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
        if self.stop:
            raise AllRecorded
        output = hidden if self.output is None else self.output
        return (output, None) if self.returns_tuple else output


@contextmanager
def recorders(source: ModelSource) -> Iterator[list[Recorder]]:
    """Inside the `with` block a recorder stands in the place of every decoder layer; yields the recorders in order."""
    layers = decoder_list(source)
    originals = list(layers)
    replacements = [Recorder(layer, _returns_tuple(layer)) for layer in originals]
    for i, recorder in enumerate(replacements):
        layers[i] = recorder
    try:
        yield replacements
    finally:
        for i, layer in enumerate(originals):
            layers[i] = layer


def call_of(recorder: Recorder, source: ModelSource) -> Call:
    """The call that was recorded. Raises PareError if the layer was not called."""
    if recorder.call is None:
        raise PareError(
            f"{source.id}: not every block of a {source.config.model_type} model is called once per forward pass; "
            "such models are not supported yet."
        )
    return recorder.call


def _returns_tuple(layer: nn.Module) -> bool:
    """Whether the layer returns a tuple, read from its last return statement (annotations are often out of date)."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(type(layer).forward)))
    nodes = list(ast.walk(tree))
    tuples = {
        name.id
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        for name in node.targets
        if isinstance(name, ast.Name)
    }
    returned = max((n for n in nodes if isinstance(n, ast.Return)), key=lambda node: node.lineno).value
    return isinstance(returned, ast.Tuple) or (isinstance(returned, ast.Name) and returned.id in tuples)


def _leaves(tree: Any) -> list[Any]:
    """All values inside nested lists, tuples and dicts."""
    if isinstance(tree, list | tuple):
        return [leaf for branch in tree for leaf in _leaves(branch)]
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in _leaves(tree[key])]
    return [tree]
