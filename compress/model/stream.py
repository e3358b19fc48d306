"""Windows of tokens on their way through a model's blocks, with one block in memory at a time.

Each block is called with the arguments that the model itself would pass. They are recorded once, from the model's own
forward (see `calls`): masks and rotary tables come from the model class, and no architecture is rewritten here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from paredown.compress.checkpoint.configs import first_line
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import all_finite
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block
from paredown.compress.model.calls import (
    AllRecorded,
    Call,
    OfText,
    Recorder,
    calls_of,
    interned,
    recorders,
    unsupported,
)
from paredown.compress.model.carried import Carried, FromBlock, Shared, from_json, moved, to_json
from paredown.compress.model.rest import imitated_rest, materialised_rest, names_outside
from paredown.compress.model.transfer import Transfer
from paredown.compress.numerics.perplexity import target_nll

# Tokens in one batch, by type of device: limits the memory that activations inside a block take.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
HEAD_TOKENS = 512  # positions whose logits are in memory at once


@dataclass
class Stream:
    """Hidden states of all windows before some block, in host memory: a list of batches `(batch, length, hidden)`."""

    hidden: list[Tensor]
    calls: list[list[Call]]  # of each batch: the call of each block
    ids: list[Tensor]  # the tokens of each batch (batch, length)
    device: torch.device  # where blocks run
    head_tokens: int = HEAD_TOKENS  # positions that the output head takes at once
    seconds: float = 0.0  # time in forward passes of blocks and head
    carried: list[Carried] = field(default_factory=list)  # of each batch, beside the hidden states, in host memory
    handed: Carried = field(default_factory=dict)  # by the block that ran last, on the device

    def __post_init__(self) -> None:
        self.carried = self.carried or [{} for _ in self.calls]

    @property
    def hands_on(self) -> bool:
        """Whether blocks take more from earlier ones than hidden states."""
        return any(isinstance(leaf, FromBlock | Shared) for call in self.calls[0] for leaf in call.leaves())

    def copy(self) -> "Stream":
        """A second stream that starts from the same hidden states.

        Both share the tensors: a stream replaces a batch, and never changes it in place.
        """
        carried = [dict(batch) for batch in self.carried]
        return Stream(list(self.hidden), self.calls, self.ids, self.device, self.head_tokens, carried=carried)

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """What `restore` needs: tensors by name, which may share memory, and JSON."""
        tensors: list[Tensor] = []
        structure = to_json(self.carried, tensors)
        named = {str(i): hidden for i, hidden in enumerate(self.hidden)}
        return named | {f"carried-{n}": tensor for n, tensor in enumerate(tensors)}, structure

    def restore(self, tensors: Mapping[str, Tensor], structure: Any) -> None:
        """Stand where another stream of the same windows stood at its `state`."""
        self.hidden = [tensors[str(i)] for i in range(len(self.ids))]
        carried = [tensors[f"carried-{n}"] for n in range(len(tensors) - len(self.ids))]
        self.carried = from_json(structure, carried)

    def outputs(self, block: Block, transfer: Transfer | None = None) -> Iterator[Tensor]:
        """The block's output for each batch (batch, length, hidden), on the device. The stream does not move."""
        transfer = transfer or Transfer(self.device)
        for i in range(len(self.hidden)):
            yield self.output(block, i, transfer)

    def output(self, block: Block, i: int, transfer: Transfer | None = None) -> Tensor:
        """The block's output for batch `i` (batch, length, hidden), on the device.

        With a `transfer` the next batch is uploaded meanwhile. The time is added to `seconds` even if an exception stops
        the block on the way.
        """
        began = perf_counter()
        try:
            hidden = self.hidden[i].to(self.device, copy=True) if transfer is None else transfer.upload(self.hidden[i])
            if transfer is not None and i + 1 < len(self.hidden):
                transfer.prefetch(self.hidden[i + 1])
            return self.call(block, i, hidden)
        finally:
            if self.device.type == "cuda":  # the block's own work, and not the copies beside it
                torch.cuda.current_stream(self.device).synchronize()
            self.seconds += perf_counter() - began

    def call(self, block: Block, i: int, hidden: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """Call the block as the model does for batch `i`, on `hidden` (batch, length, hidden) on the device.

        `parameters`, by name within the block, are used in place of the block's own.
        """
        shared: dict[int, Any] = {}
        call = self.calls[i][block.index].mapped(lambda leaf: self._argument(leaf, self.carried[i], shared))
        try:
            if parameters is None:
                result = block.module(hidden, *call.args, **call.kwargs)
            else:
                result = torch.func.functional_call(block.module, parameters, (hidden, *call.args), call.kwargs)
        except (RuntimeError, TypeError, IndexError) as fault:  # of the model's class, in this dtype or on this device
            raise PareError(
                f"{block.name} cannot be run: {type(fault).__name__}: {first_line(fault)} If its dtype or the device is "
                "the reason, try --dtype float32 or --device cpu."
            ) from fault
        outputs = result if isinstance(result, tuple | list) else (result,)
        self.handed = {FromBlock(block.index, k): outputs[k] for k in range(1, len(outputs))} | shared
        output: Tensor = outputs[0]
        return output

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Replace each batch by the block's output. Raises PareError if an output is not finite."""
        for _ in self.advancing(block):
            pass

    def advancing(self, block: Block) -> Iterator[None]:
        """As `advance`, batch by batch: each is replaced before it is yielded."""
        transfer = Transfer(self.device)
        for i, output in enumerate(self.outputs(block, transfer)):
            if not all_finite(output):
                raise PareError(
                    f"non-finite activations leave {block.name}. In float16 large models overflow: "
                    "try --dtype bfloat16 or float32; otherwise the checkpoint itself is damaged."
                )
            self.hidden[i] = transfer.download(output)
            self._carry(i, block.index)
            yield
        transfer.wait()

    @torch.no_grad()
    def nll(self, source: ModelSource) -> Tensor:  # (windows, length - 1)
        """Negative log likelihood in nats of each next token, by the model's own final norm and head."""
        losses = []
        with materialised_rest(source, embedding=False), recorders(source) as layers:
            for hidden, ids in zip(self.hidden, self.ids, strict=True):
                layers[-1].output = hidden.to(self.device, copy=True)
                began = perf_counter()
                losses.append(next_token_nll(source.model, ids.to(self.device), self.head_tokens).cpu())
                self.seconds += perf_counter() - began
        return torch.cat(losses)

    def _argument(self, leaf: Any, carried: Carried, shared: dict[int, Any]) -> Any:
        """What a block is given for a leaf of its call; `shared` gains a copy of each container, which it may write to."""
        if isinstance(leaf, OfText):
            return leaf.tensor.to(self.device)
        if isinstance(leaf, FromBlock):
            return moved(carried[leaf], self.device)
        if isinstance(leaf, Shared):
            if leaf.number not in shared:
                content = moved(carried.get(leaf.number, leaf.content), self.device)
                shared[leaf.number] = leaf.filled(content)
            return shared[leaf.number]
        return leaf

    def _carry(self, i: int, done: int) -> None:
        """Keep what block number `done` handed on of batch `i`, and forget what no later block takes."""
        taken = {
            leaf.number if isinstance(leaf, Shared) else leaf
            for call in self.calls[i][done + 1 :]
            for leaf in call.leaves()
            if isinstance(leaf, FromBlock | Shared)
        }
        known = {**self.carried[i], **self.handed}
        self.carried[i] = {key: moved(value, torch.device("cpu")) for key, value in known.items() if key in taken}
        self.handed = {}


@torch.no_grad()
def start(source: ModelSource, ids: Tensor, batch_tokens: int | None = None, head_tokens: int = HEAD_TOKENS) -> Stream:
    """The stream before the first block: embed all windows `ids` (windows, length) and record the calls of the blocks.

    A batch holds about `batch_tokens` tokens, by default BATCH_TOKENS of the source's device; the output head takes about
    `head_tokens` positions at once. Raises PareError for a model that cannot be run block after block.
    """
    per_batch = max(1, (batch_tokens or BATCH_TOKENS[source.device.type]) // ids.shape[1])
    stream = Stream([], [], list(ids.split(per_batch)), source.device, head_tokens)
    check_walkable(source)
    first: dict[int, list[Call]] = {}  # by batch size
    with materialised_rest(source, head=False), recorders(source) as layers:
        layers[-1].stop = True
        for batch in stream.ids:
            calls = _recorded(source, layers, batch)
            known = first.setdefault(len(batch), calls)
            stream.calls.append(calls if known is calls else interned(calls, known))
            assert layers[0].hidden is not None
            stream.hidden.append(layers[0].hidden.to("cpu"))
    stream.carried = [{} for _ in stream.calls]
    return stream


@torch.no_grad()
def visited(
    source: ModelSource, stream: Stream, all_blocks: Sequence[Block], wanted: Callable[[Block], bool]
) -> Iterator[Block]:
    """Those of the blocks, from the first on, that are `wanted`, each in memory until the next one is asked for.

    The `stream` stays where it is, but for a model whose blocks take what earlier ones hand on: there it stands before the
    block.
    """
    hands_on = stream.hands_on
    for block in all_blocks:
        now = wanted(block)
        if now or hands_on:
            with source.loaded(block):
                if now:
                    yield block
                if hands_on:
                    stream.advance(block)


def check_walkable(source: ModelSource) -> int:
    """Run the model's own forward once around imitated blocks and weights, without reading any.

    Returns how many numbers a stream holds for each token: hidden states, and what else depends on the text.
    Raises PareError for a model that cannot be run block after block, or whose head reads more than the last block's output.
    """
    ids = torch.arange(4)[None]
    with imitated_rest(source) as embedding, recorders(source) as layers:
        calls = _recorded(source, layers, ids)
        embedding.value = torch.nan
        hidden = layers[-1].hidden
        assert hidden is not None
        tensors = [leaf for call in calls for leaf in call.leaves() if isinstance(leaf, Tensor)]
        of_tokens = {t.data_ptr(): t.numel() for t in tensors if t.is_floating_point() and t.shape[:2] == ids.shape}
        layers[-1].output = torch.zeros_like(hidden)
        logits = source.model(ids.to(source.device), use_cache=False).logits
    if not all_finite(logits):
        raise unsupported(source, "their output head reads more than the last block's output")
    return (hidden.numel() + sum(of_tokens.values())) // ids.numel()


def _recorded(source: ModelSource, layers: list[Recorder], ids: Tensor) -> list[Call]:
    """The calls of all blocks for one batch of tokens (batch, length)."""
    layers[0].order.clear()
    try:
        with suppress(AllRecorded):
            source.model(ids.to(source.device), use_cache=False)
    except PareError:
        raise
    except Exception as fault:  # its code takes blocks for something else than functions of hidden states
        why = (
            f"its forward pass fails if its blocks are run by themselves ({type(fault).__name__}: {first_line(fault)})"
        )
        raise unsupported(source, why) from fault
    return calls_of(layers, source)


def next_token_nll(model: Any, ids: Tensor, head_tokens: int = HEAD_TOKENS) -> Tensor:  # (batch, length - 1)
    """Negative log likelihood in nats of each next token of `ids` (batch, length).

    The output head takes about `head_tokens` positions at once, so that logits stay small.
    """
    losses = [target_nll(logits, ids[:, positions + 1]) for positions, logits in head_logits(model, ids, head_tokens)]
    return torch.cat(losses, 1)


def head_logits(model: Any, ids: Tensor, head_tokens: int = HEAD_TOKENS) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions (n,) of `ids` (batch, length) that have a next token, and the logits (batch, n, vocabulary) there."""
    parts = head_positions(ids, head_tokens)
    for positions in parts:
        logits = model(ids, use_cache=False, logits_to_keep=positions).logits  # (batch, n, vocabulary)
        if logits.shape[1] != len(positions):  # a class that gives all of them
            yield from ((some, logits[:, some]) for some in parts)
            return
        yield positions, logits


def head_positions(ids: Tensor, head_tokens: int) -> tuple[Tensor, ...]:
    """The positions of `ids` (batch, length) that have a next token, in parts of about `head_tokens` positions a batch."""
    positions = torch.arange(ids.shape[1] - 1, device=ids.device)
    parts: tuple[Tensor, ...] = positions.split(max(1, head_tokens // len(ids)))
    return parts


def hidden_size(source: ModelSource) -> int:
    """Numbers in one token's hidden state."""
    return max(int(getattr(source.config.get_text_config(), "hidden_size", 0)), 1)


def hidden_bytes(source: ModelSource, tokens: int) -> int:
    """Bytes of the hidden states of so many tokens, and of what else blocks take that depends on the text."""
    return element_size(source) * check_walkable(source) * tokens


def batch_bytes(source: ModelSource, widest: int) -> int:
    """Bytes that one batch takes inside a block whose widest layer has `widest` outputs."""
    return element_size(source) * BATCH_TOKENS[source.device.type] * (4 * hidden_size(source) + 3 * widest)


def outside_bytes(source: ModelSource, backward: bool = False) -> int:
    """Bytes of the largest weight outside the blocks and of the logits of HEAD_TOKENS positions, and of their gradients."""
    rest = [source.parameters[name].numel() for name in names_outside(source)]
    vocabulary = int(source.config.get_text_config().vocab_size)
    return element_size(source) * max(rest, default=0) + (20 if backward else 12) * HEAD_TOKENS * vocabulary


def element_size(source: ModelSource) -> int:
    """Bytes of one number of the model's weights."""
    return source.dtype.itemsize if source.dtype else 2
