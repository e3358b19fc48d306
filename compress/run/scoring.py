"""Losses of texts by a model, and how far two models are apart on them, with one block in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import blocks
from paredown.compress.model.calls import recorders
from paredown.compress.model.rest import materialised_rest
from paredown.compress.model.stream import HEAD_TOKENS, Stream, head_logits, start
from paredown.compress.numerics.divergence import TokenDivergence, divergence, token_divergence
from paredown.compress.numerics.perplexity import paired_delta, perplexity, target_nll
from paredown.compress.run.streams import advance
from paredown.compress.text.windows import Windows

# Of one model's logits at a time, as float32: 392 positions of a vocabulary of 128k. A comparison holds both models' logits,
# and what the class makes of them on its way: less than four times as much.
LOGITS_BYTES = 192 << 20

# gives, for hidden states (batch, length, hidden) and ids (batch, length), positions and the logits there
Head = Callable[[Tensor, Tensor], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Compared:
    """Two models on the same tokens, each (windows, length - 1)."""

    before: Tensor  # losses of the dense model, in nats
    after: Tensor  # losses of the other model
    divergence: TokenDivergence

    @classmethod
    def joined(cls, parts: Sequence["Compared"], dim: int) -> "Compared":
        """Parts of the positions (dim 1) or of the windows (dim 0) as one."""
        apart = zip(*(part.divergence for part in parts), strict=True)
        return cls(
            torch.cat([part.before for part in parts], dim),
            torch.cat([part.after for part in parts], dim),
            TokenDivergence(*(torch.cat(each, dim) for each in apart)),
        )


@torch.no_grad()
def score(source: ModelSource, evaluations: Sequence[Windows], progress: Callable[[int, int], None]) -> list[Tensor]:
    """Loss per token of each text, in nats (windows, length - 1), with one block in memory at a time.

    `progress` is called with (blocks done, blocks).
    """
    return [stream.nll(source) for stream in walked(source, evaluations, progress)]


@torch.no_grad()
def walked(source: ModelSource, evaluations: Sequence[Windows], progress: Callable[[int, int], None]) -> list[Stream]:
    """Each text behind the model's last block. `progress` is called with (blocks done, blocks)."""
    streams = [start(source, windows.ids) for windows in evaluations]
    all_blocks = blocks(source)
    for block in all_blocks if streams else ():
        with source.loaded(block):
            advance(streams, block)
        progress(block.index + 1, len(all_blocks))
    return streams


@torch.no_grad()
def compare(before: Stream, after: Stream, dense: ModelSource, source: ModelSource) -> Compared:
    """The same tokens behind the last blocks of two models, which may be one source: then both streams take its head.

    Raises PareError if the two models have vocabularies of different sizes, or if a loss is not finite.
    """
    began, batches = perf_counter(), []
    with ExitStack() as stack:
        head = stack.enter_context(output_head(source))
        dense_head = head if dense is source else stack.enter_context(output_head(dense))
        for theirs, ours, ids in zip(before.hidden, after.hidden, after.ids, strict=True):
            pairs = zip(dense_head(theirs, ids), head(ours, ids), strict=True)
            parts = [_part(dense_logits, logits, ids[:, at.cpu() + 1]) for (at, dense_logits), (_, logits) in pairs]
            batches.append(Compared.joined(parts, 1))
    after.seconds += perf_counter() - began
    return Compared.joined(batches, 0)


def _part(dense: Tensor, logits: Tensor, targets: Tensor) -> Compared:
    """Some positions of a batch; logits (batch, positions, vocabulary), targets (batch, positions)."""
    if dense.shape != logits.shape:
        sizes = f"{dense.shape[-1]} and {logits.shape[-1]}"
        raise PareError(f"the two models predict {sizes} tokens: their distributions cannot be compared.")
    losses = (target_nll(dense, targets).cpu(), target_nll(logits, targets).cpu())
    return Compared(*losses, token_divergence(dense, logits))


@contextmanager
def output_head(source: ModelSource) -> Iterator[Head]:
    """What gives the positions that have a next token and the logits there, part by part: see `head_logits`.

    While the `with` block runs, the weights outside the blocks are on the device.
    """
    at_once = LOGITS_BYTES // (4 * int(source.config.get_text_config().vocab_size))
    with materialised_rest(source, embedding=False), recorders(source) as layers:

        def head(hidden: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            states = hidden.to(source.device, copy=True)

            def model(*args: Any, **kwargs: Any) -> Any:
                layers[-1].output = states  # at each call: another stream may have taken the head meanwhile
                return source.model(*args, **kwargs)

            yield from head_logits(model, ids.to(source.device), max(1, min(HEAD_TOKENS, at_once)))

        yield head


def evaluation_entry(windows: Windows, compared: Compared) -> dict[str, Any]:
    """One element of the report's `evaluation`."""
    before, after = windows.of_text(compared.before), windows.of_text(compared.after)
    apart = TokenDivergence(*(windows.of_text(part) for part in compared.divergence))
    return {
        **windows.provenance(),
        "before": perplexity(before),
        "after": perplexity(after),
        "paired_delta": paired_delta(before, after),
        "divergence": divergence(apart, windows.length - before.shape[1]),
    }
