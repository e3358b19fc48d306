"""Moments of output gradients by a backward pass that streams: one block in memory, revisited from the last to the first.

A forward pass keeps each block's inputs on disk. The gradient of the loss enters at the head; each block is then run
again from its inputs with autograd on activations alone, and hands the gradient of its input to the one before.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.machine import return_freed_memory
from paredown.compress.model.blocks import Block, View, blocks
from paredown.compress.model.stream import HEAD_TOKENS, Stream, materialised_rest, recorders, start
from paredown.compress.numerics.moments import GRADIENT_NEEDS, InputStats
from paredown.compress.numerics.perplexity import target_nll
from paredown.compress.survey.observe import Observer

Labels = Literal["data", "sampled"]  # the text's own next tokens (empirical Fisher), or the model's draws (true Fisher)
Progress = Callable[[str], None]


def moments(
    needs: frozenset[str], weight: Tensor, x: Tensor, delta: Tensor, sequences: int
) -> Iterator[tuple[str, Tensor]]:
    """Sums over tokens of what is needed of one batch: x (tokens, in), delta = dL/dy (tokens, out), float32.

    output_gradient           G = delta^T delta (out, out); where out > in W^T G W (in, in), which is all that a solver reads
    output_gradient_diagonal  diag G (out,)
    fisher                    squares of each sequence's weight gradient, summed (out, in)
    fisher_rows               the same summed over the inputs (out,): FWSVD's importance
    fisher_rows_per_token     sum of delta^2 |x|^2 (out,): as if every token were a sequence
    """
    squares = delta.square()
    if "output_gradient" in needs:
        folded = delta if weight.shape[0] <= weight.shape[1] else delta @ weight.float()
        yield "output_gradient", folded.T @ folded
    if needs & {"output_gradient", "output_gradient_diagonal"}:
        yield "output_gradient_diagonal", squares.sum(0)
    if "fisher_rows_per_token" in needs:
        yield "fisher_rows_per_token", x.square().sum(1) @ squares
    if needs & {"fisher", "fisher_rows"}:
        per_sequence = zip(delta.chunk(sequences), x.chunk(sequences), strict=True)
        total = torch.zeros_like(weight, dtype=torch.float32)  # (out, in)
        for mine, inputs in per_sequence:
            total += (mine.T @ inputs).square()
        if "fisher" in needs:
            yield "fisher", total
        if "fisher_rows" in needs:
            yield "fisher_rows", total.sum(1)


class GradientObserver(Observer):
    """Observes inputs, and while autograd runs through the block's outputs, the gradients of each product's output."""

    def __init__(self, views: list[View], inputs: frozenset[str], needs: frozenset[str], device: torch.device) -> None:
        super().__init__(views, inputs, device)
        self.gradients: dict[str, dict[str, Tensor]] = {}  # sums over tokens, float64
        self.sequences = 1  # of the running batch
        self._gradient_needs = needs

    def note(self, view: View, x: Tensor, out: Tensor) -> None:
        super().note(view, x, out)
        if out.requires_grad:
            out.register_hook(partial(self._add, view, x.detach()))

    def _add(self, view: View, x: Tensor, gradient: Tensor) -> None:
        delta = gradient.flatten(0, -2).float()  # (tokens, out)
        if not bool(torch.isfinite(delta.sum())):
            raise PareError(f"{view.name}: its gradients are not finite. Try --dtype bfloat16 or float32.")
        sums = self.gradients.setdefault(view.name, {})
        weight = view.weight
        for name, value in moments(self._gradient_needs, weight, x.flatten(0, -2).float(), delta, self.sequences):
            if name in sums:
                sums[name] += value
            else:
                sums[name] = value.double()

    def taken(self) -> dict[str, InputStats]:
        """The moments of each layer's input and output gradient, means over the tokens that reached it. Asked for once."""
        found = {}
        for name, stats in self.stats.items():
            means = {key: total.div_(max(stats.count, 1)) for key, total in self.gradients.pop(name, {}).items()}
            found[name] = stats.with_gradient(means)
        return found


def backward(
    source: ModelSource,
    ids: Tensor,
    chosen: set[str],
    inputs: frozenset[str],
    needs: frozenset[str],
    scratch: Path,
    labels: Labels = "data",
    progress: Progress = lambda text: None,
) -> Iterator[tuple[Block, dict[str, InputStats]]]:
    """Blocks from last to first, in memory while they are handed out, with the moments of each chosen layer.

    ids (windows, length). The loss is the sum of next-token cross-entropies, labels shifted once; `inputs` out of NEEDS,
    `needs` out of GRADIENT_NEEDS. `scratch` is a folder that holds each block's inputs meanwhile: windows x length x
    hidden numbers a block.
    """
    if unknown := needs - GRADIENT_NEEDS:
        raise ValueError(f"unknown statistics {sorted(unknown)}; there are {sorted(GRADIENT_NEEDS)}")
    all_blocks = blocks(source)
    stream = start(source, ids)
    for block in all_blocks:
        save_file({f"{i}": hidden.contiguous() for i, hidden in enumerate(stream.hidden)}, _inputs(scratch, block))
        source.materialise(block.prefix, block.names)
        stream.advance(block)
        source.release(block.prefix, block.names)
        progress(f"survey, forward: block {block.index + 1} of {len(all_blocks)}")
    upstream = head_gradients(source, stream, labels)
    for block in reversed(all_blocks):
        stream.hidden = [hidden for _, hidden in sorted(load_file(_inputs(scratch, block)).items(), key=_by_number)]
        _inputs(scratch, block).unlink()
        source.materialise(block.prefix, block.names)
        views = [v for v in block.views() if v.name in chosen]
        observer = GradientObserver(views, inputs, needs, source.device)
        upstream = _through(block, stream, upstream, observer)
        return_freed_memory()
        yield block, observer.taken()
        source.release(block.prefix, block.names)
        progress(f"survey, backward: block {block.index + 1} of {len(all_blocks)}")


def _through(block: Block, stream: Stream, upstream: list[Tensor], observer: GradientObserver) -> list[Tensor]:
    """Gradients (batch, length, hidden) at the block's input, from those at its output."""
    found = []
    for i, gradient in enumerate(upstream):
        hidden = stream.hidden[i].to(stream.device).requires_grad_()
        observer.sequences = len(hidden)
        with torch.enable_grad():
            with observer:
                made = stream.call(block, hidden)
            if not made.requires_grad:
                raise PareError(
                    f"{block.prefix.rstrip('.')} cannot be differentiated: choose a method without gradients."
                )
            made.backward(gradient.to(stream.device))
        observer.next_batch()
        assert hidden.grad is not None
        found.append(hidden.grad.to("cpu"))
    return found


def head_gradients(source: ModelSource, stream: Stream, labels: Labels, seed: int = 0) -> list[Tensor]:
    """Gradients (batch, length, hidden) of the loss at the last block's output, by the model's own norm and head."""
    draw = torch.Generator(source.device).manual_seed(seed)
    found = []
    with materialised_rest(source, embedding=False), recorders(source) as layers, torch.enable_grad():
        for hidden, ids in zip(stream.hidden, stream.ids, strict=True):
            hidden, ids = hidden.to(stream.device, copy=True).requires_grad_(), ids.to(stream.device)
            layers[-1].returns = hidden
            for keep in torch.arange(ids.shape[1] - 1, device=ids.device).split(max(1, HEAD_TOKENS // len(ids))):
                logits = source.model(
                    ids, use_cache=False, logits_to_keep=keep
                ).logits  # (batch, positions, vocabulary)
                wanted = ids[:, keep + 1] if labels == "data" else _drawn(logits, draw)
                target_nll(logits, wanted).sum().backward()
            assert hidden.grad is not None
            found.append(hidden.grad.to("cpu"))
    return found


@torch.no_grad()
def _drawn(logits: Tensor, draw: torch.Generator) -> Tensor:  # (batch, positions)
    chances = logits.float().softmax(-1).flatten(0, 1)
    return torch.multinomial(chances, 1, generator=draw).view(logits.shape[:2])


def _inputs(scratch: Path, block: Block) -> Path:
    return scratch / f"inputs-{block.index}.safetensors"


def _by_number(item: tuple[str, Tensor]) -> int:
    return int(item[0])
