"""Windows of tokens on their way through a model's blocks, with one block in memory at a time.

Each block is called with the arguments that the model itself would pass. They are recorded once, from the model's own
forward (see `calls`): masks and rotary tables come from the model class, and no architecture is rewritten here.
"""

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
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.model.calls import AllRecorded, Call, call_of, recorders
from paredown.compress.model.transfer import Transfer
from paredown.compress.numerics.perplexity import target_nll

# Tokens in one batch, by type of device: limits the memory that activations inside a block take.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
HEAD_TOKENS = 512  # positions whose logits are in memory at once


@dataclass
class Stream:
    """Hidden states of all windows before some block, in host memory: a list of batches `(batch, length, hidden)`."""

    hidden: list[Tensor]
    calls: dict[int, list[Call]]  # by batch size: the call of each block
    ids: list[Tensor]  # the tokens of each batch (batch, length)
    device: torch.device  # where blocks run
    head_tokens: int = HEAD_TOKENS  # positions that the output head takes at once
    seconds: float = 0.0  # time in forward passes of blocks and head

    def copy(self) -> "Stream":
        """A second stream that starts from the same hidden states.

        Both share the tensors: a stream replaces a batch, and never changes it in place.
        """
        return Stream(list(self.hidden), self.calls, self.ids, self.device, self.head_tokens)

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
            return self.call(block, hidden)
        finally:
            if self.device.type == "cuda":  # the block's own work, and not the copies beside it
                torch.cuda.current_stream(self.device).synchronize()
            self.seconds += perf_counter() - began

    def call(self, block: Block, hidden: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """Call the block as the model does, on `hidden` (batch, length, hidden) on the device.

        `parameters`, by name within the block, are used in place of the block's own.
        """
        call = self.calls[len(hidden)][block.index]
        if parameters is None:
            result = block.module(hidden, *call.args, **call.kwargs)
        else:
            result = torch.func.functional_call(block.module, parameters, (hidden, *call.args), call.kwargs)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Replace each batch by the block's output. Raises PareError if an output is not finite."""
        transfer = Transfer(self.device)
        for i, output in enumerate(self.outputs(block, transfer)):
            if not all_finite(output):
                raise PareError(
                    f"non-finite activations leave {block.name}. In float16 large models overflow: "
                    "try --dtype bfloat16 or float32; otherwise the checkpoint itself is damaged."
                )
            self.hidden[i] = transfer.download(output)
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


@torch.no_grad()
def start(source: ModelSource, ids: Tensor, batch_tokens: int | None = None, head_tokens: int = HEAD_TOKENS) -> Stream:
    """The stream before the first block: embed all windows `ids` (windows, length) and record the calls of the blocks.

    A batch holds about `batch_tokens` tokens, by default BATCH_TOKENS of the source's device; the output head takes about
    `head_tokens` positions at once. Raises PareError for a model whose blocks are not called once per forward pass, or
    with other arguments for another text.
    """
    per_batch = max(1, (batch_tokens or BATCH_TOKENS[source.device.type]) // ids.shape[1])
    batches = list(ids.split(per_batch))
    stream = Stream([], {}, batches, source.device, head_tokens)
    with materialised_rest(source, head=False), recorders(source) as layers:
        layers[-1].stop = True
        for batch in batches:
            for layer in layers:
                layer.call = None
            with suppress(AllRecorded):
                source.model(batch.to(source.device), use_cache=False)
            calls = [call_of(layer, source) for layer in layers]
            first = stream.calls.setdefault(len(batch), calls)
            if not all(a.same(b) for a, b in zip(first, calls, strict=True)):
                raise PareError(
                    f"{source.id}: beside the hidden states its blocks take arguments that depend on the text "
                    f"({source.config.model_type}); such models are not supported yet."
                )
            assert layers[0].hidden is not None
            stream.hidden.append(layers[0].hidden.to("cpu"))
    return stream


def next_token_nll(model: Any, ids: Tensor, head_tokens: int = HEAD_TOKENS) -> Tensor:  # (batch, length - 1)
    """Negative log likelihood in nats of each next token of `ids` (batch, length).

    The output head takes about `head_tokens` positions at once, so that logits stay small.
    """
    parts = []
    for positions in head_positions(ids, head_tokens):
        logits = model(ids, use_cache=False, logits_to_keep=positions).logits  # (batch, positions, vocabulary)
        parts.append(target_nll(logits, ids[:, positions + 1]))
    return torch.cat(parts, 1)


def head_positions(ids: Tensor, head_tokens: int) -> tuple[Tensor, ...]:
    """The positions of `ids` (batch, length) that have a next token, in parts of about `head_tokens` positions a batch."""
    positions = torch.arange(ids.shape[1] - 1, device=ids.device)
    parts: tuple[Tensor, ...] = positions.split(max(1, head_tokens // len(ids)))
    return parts


@contextmanager
def materialised_rest(source: ModelSource, embedding: bool = True, head: bool = True) -> Iterator[None]:
    """Inside the `with` block all weights outside the decoder blocks are in memory.

    `embedding` and `head` say whether these two, the large ones, are needed.
    """
    inside = tuple(block.prefix for block in blocks(source))
    left_out = [name_of(source.model, "get_input_embeddings")] * (not embedding)
    left_out += [name_of(source.model, "get_output_embeddings")] * (not head)
    left_out = [] if source.tied else left_out  # tied weights are one tensor, which is needed in both cases
    names = [n for n in source.parameters if not n.startswith(inside) and n.rpartition(".")[0] not in left_out]
    source.materialise("", names)
    _tie(source)
    original = source.model.get_input_embeddings()
    if not embedding and not source.tied:
        source.model.set_input_embeddings(_Zeros(original.weight.shape[1], source.dtype))
    try:
        yield
    finally:
        source.model.set_input_embeddings(original)
        source.release("", names)
        _tie(source)


def _tie(source: ModelSource) -> None:
    """Let tied parameters be one tensor again."""
    for copy, original in source.tied.items():
        path, _, leaf = copy.rpartition(".")
        source.model.get_submodule(path)._parameters[leaf] = source.model.get_parameter(original)


def name_of(model: Any, getter: str) -> str:
    """The dotted name of the module that `model.get_input_embeddings()` (or output) returns."""
    wanted = getattr(model, getter)()
    return next((name for name, module in model.named_modules() if module is wanted), "lm_head")


class _Zeros(nn.Module):
    """Takes the place of an embedding whose output is never used."""

    def __init__(self, width: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.width, dtype=self.dtype, device=ids.device)


def hidden_size(source: ModelSource) -> int:
    """Numbers in one token's hidden state."""
    return max(int(getattr(source.config.get_text_config(), "hidden_size", 0)), 1)


def hidden_bytes(source: ModelSource, tokens: int) -> int:
    """Bytes of the hidden states of so many tokens."""
    return element_size(source) * hidden_size(source) * tokens


def batch_bytes(source: ModelSource, widest: int) -> int:
    """Bytes that one batch takes inside a block whose widest layer has `widest` outputs."""
    return element_size(source) * BATCH_TOKENS[source.device.type] * (4 * hidden_size(source) + 3 * widest)


def outside_bytes(source: ModelSource) -> int:
    """Bytes of the largest weight outside the blocks and of the logits of HEAD_TOKENS positions."""
    inside = tuple(block.prefix for block in blocks(source))
    rest = [t.numel() for name, t in source.parameters.items() if not name.startswith(inside)]
    vocabulary = int(source.config.get_text_config().vocab_size)
    return element_size(source) * max(rest, default=0) + 12 * HEAD_TOKENS * vocabulary


def element_size(source: ModelSource) -> int:
    """Bytes of one number of the model's weights."""
    return source.dtype.itemsize if source.dtype else 2
