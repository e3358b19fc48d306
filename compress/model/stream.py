"""Windows of tokens on their way through a model's blocks, one block in memory at a time.

A block is called with its own arguments: every decoder layer is replaced by a recorder and the model's own forward runs
once, so masks and rotary tables come from the model class and no architecture is written again here.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import all_finite
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, blocks, decoder_list
from paredown.compress.numerics.perplexity import target_nll

# tokens that pass through a block at once: bounds the memory of a block's inner activations
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
HEAD_TOKENS = 512  # positions whose logits are in memory at once


class _Stop(Exception):
    """All recorders have seen their call."""


@dataclass
class Call:
    """What a decoder layer was called with, beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def same(self, other: "Call") -> bool:
        mine, theirs = _leaves((self.args, self.kwargs)), _leaves((other.args, other.kwargs))
        return len(mine) == len(theirs) and all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
            for a, b in zip(mine, theirs, strict=True)
        )


@dataclass
class Stream:
    """Hidden states of all windows before some block, on the host: a list of batches `(batch, length, hidden)`."""

    hidden: list[Tensor]
    calls: dict[int, list[Call]]  # by batch size, one per block
    ids: list[Tensor]  # the tokens of each batch (batch, length)
    device: torch.device
    seconds: float = 0.0  # spent in the blocks' own forward passes

    def copy(self) -> "Stream":
        """A second stream from the same point (batches are replaced, never changed in place, so they are shared)."""
        return Stream(list(self.hidden), self.calls, self.ids, self.device)

    def outputs(self, block: Block) -> Iterator[Tensor]:
        """Run the block over all batches; yields its output on the device, batch by batch."""
        for i in range(len(self.hidden)):
            yield self.output(block, i)

    def output(self, block: Block, i: int) -> Tensor:
        """The block's output for batch i, on the device. Time counts even where something stops the block half-way."""
        began = perf_counter()
        try:
            return self.call(block, self.hidden[i].to(self.device, copy=True))
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds += perf_counter() - began

    def call(self, block: Block, hidden: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """The block called as the model calls it; hidden (batch, length, hidden) on the device.

        `parameters` stand in for the block's own, by name.
        """
        call = self.calls[len(hidden)][block.index]
        if parameters is None:
            made = block.module(hidden, *call.args, **call.kwargs)
        else:
            made = torch.func.functional_call(block.module, parameters, (hidden, *call.args), call.kwargs)
        out: Tensor = made[0] if isinstance(made, tuple) else made
        return out

    @torch.no_grad()
    def observe(self, block: Block) -> None:
        """Run the block for what is collected on the way; its outputs are dropped."""
        for _ in self.outputs(block):
            pass

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Replace each batch by the block's output. Raises PareError if it is not finite."""
        for i, made in enumerate(self.outputs(block)):
            if not all_finite(made):
                raise PareError(
                    f"non-finite activations leave {block.prefix.rstrip('.')}. In float16 large models overflow: "
                    "try --dtype bfloat16 or float32; otherwise the checkpoint itself is damaged."
                )
            self.hidden[i] = made.to("cpu")

    @torch.no_grad()
    def nll(self, source: ModelSource) -> Tensor:  # (windows, length - 1)
        """Negative log likelihood in nats of each next token, by the model's own final norm and head."""
        found = []
        with materialised_rest(source, embedding=False), recorders(source) as layers:
            for hidden, ids in zip(self.hidden, self.ids, strict=True):
                layers[-1].returns = hidden.to(self.device, copy=True)
                began = perf_counter()
                found.append(next_token_nll(source.model, ids.to(self.device)).cpu())
                self.seconds += perf_counter() - began
        return torch.cat(found)


@torch.no_grad()
def start(source: ModelSource, ids: Tensor) -> Stream:
    """Embed all windows `(windows, length)` and record how the model calls its blocks."""
    per_batch = max(1, BATCH_TOKENS[source.device.type] // ids.shape[1])
    batches = list(ids.split(per_batch))
    stream = Stream([], {}, batches, source.device)
    with materialised_rest(source, head=False), recorders(source) as layers:
        layers[-1].stop = True
        for batch in batches:
            for layer in layers:
                layer.call = None
            with suppress(_Stop):
                source.model(batch.to(source.device), use_cache=False)
            calls = [_recorded(layer, source) for layer in layers]
            first = stream.calls.setdefault(len(batch), calls)
            if not all(a.same(b) for a, b in zip(first, calls, strict=True)):
                raise PareError(
                    f"{source.id}: its blocks take inputs that depend on the text beside the hidden states "
                    f"({source.config.model_type}); such models are not supported yet."
                )
            assert layers[0].hidden is not None
            stream.hidden.append(layers[0].hidden.to("cpu"))
    return stream


def next_token_nll(model: Any, ids: Tensor) -> Tensor:  # (batch, length - 1)
    """Loss per token, with the head run on HEAD_TOKENS at a time, so that logits stay small."""
    step = max(1, HEAD_TOKENS // len(ids))
    parts = []
    for keep in torch.arange(ids.shape[1] - 1, device=ids.device).split(step):
        logits = model(ids, use_cache=False, logits_to_keep=keep).logits  # (batch, positions, vocabulary)
        parts.append(target_nll(logits, ids[:, keep + 1]))
    return torch.cat(parts, 1)


@contextmanager
def materialised_rest(source: ModelSource, embedding: bool = True, head: bool = True) -> Iterator[None]:
    """All weights outside the blocks in memory; of the two big ones, embedding and head, only what is asked for."""
    inside = tuple(block.prefix for block in blocks(source))
    left_out = [name_of(source.model, "get_input_embeddings")] * (not embedding)
    left_out += [name_of(source.model, "get_output_embeddings")] * (not head)
    left_out = [] if source.tied else left_out  # tied weights are one tensor: it is needed either way
    names = [n for n in source.parameters if not n.startswith(inside) and n.rpartition(".")[0] not in left_out]
    source.materialise("", names)
    _tie(source)
    looked_up = source.model.get_input_embeddings()
    if not embedding and not source.tied:
        source.model.set_input_embeddings(_Zeros(looked_up.weight.shape[1], source.dtype))
    try:
        yield
    finally:
        source.model.set_input_embeddings(looked_up)
        source.release("", names)
        _tie(source)


def _tie(source: ModelSource) -> None:
    for copy, original in source.tied.items():
        path, _, leaf = copy.rpartition(".")
        source.model.get_submodule(path)._parameters[leaf] = source.model.get_parameter(original)


def name_of(model: Any, getter: str) -> str:
    """The dotted name of the module that `model.get_input_embeddings()` (or output) returns."""
    wanted = getattr(model, getter)()
    return next((name for name, module in model.named_modules() if module is wanted), "lm_head")


class _Zeros(nn.Module):
    """In place of an embedding whose output is never used."""

    def __init__(self, width: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.width, dtype=self.dtype, device=ids.device)


class _Recorder(nn.Module):
    """Stands for a decoder layer while the model's own forward runs: keeps the call, and hands on what it is told."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: the skeleton's names stay as they are
        self.returns_tuple = returns_tuple
        self.call: Call | None = None
        self.hidden: Tensor | None = None
        self.returns: Tensor | None = None
        self.stop = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their layers for `attention_type` and the like
            return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        args = args[1:] if args and args[0] is hidden else args
        self.hidden, self.call = hidden, Call(args, kwargs)
        if self.stop:
            raise _Stop
        made = hidden if self.returns is None else self.returns
        return (made, None) if self.returns_tuple else made


@contextmanager
def recorders(source: ModelSource) -> Iterator[list[_Recorder]]:
    """Every decoder layer replaced by a recorder."""
    layers = decoder_list(source)
    originals = list(layers)
    made = [_Recorder(layer, _returns_tuple(layer)) for layer in originals]
    for i, recorder in enumerate(made):
        layers[i] = recorder
    try:
        yield made
    finally:
        for i, layer in enumerate(originals):
            layers[i] = layer


def _returns_tuple(layer: nn.Module) -> bool:
    """Whether the layer returns a tuple, read off its last return statement (annotations are often out of date)."""
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


def _recorded(recorder: _Recorder, source: ModelSource) -> Call:
    if recorder.call is None:
        raise PareError(
            f"{source.id}: not every block of a {source.config.model_type} model is called once per forward pass; "
            "such models are not supported yet."
        )
    return recorder.call


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, list | tuple):
        return [leaf for branch in tree for leaf in _leaves(branch)]
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in _leaves(tree[key])]
    return [tree]
