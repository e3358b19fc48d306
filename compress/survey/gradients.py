"""Moments of output gradients by a backward pass with one block in memory, which visits the blocks from last to first.

A forward pass writes each block's inputs to disk. The gradient of the loss starts at the output head. Each block is then
run again from its inputs, with autograd on activations only, and the gradient of its input goes to the block before.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.machine import return_freed_memory
from paredown.compress.model.blocks import Block, View, blocks
from paredown.compress.model.calls import recorders
from paredown.compress.model.carried import mapped, tensors_of, unshared
from paredown.compress.model.rest import materialised_rest
from paredown.compress.model.stream import Stream, head_positions
from paredown.compress.numerics.moments import GRADIENT_NEEDS, Labels, Need, Stats
from paredown.compress.numerics.perplexity import target_nll
from paredown.compress.numerics.precision import exact_product, rounded_product
from paredown.compress.progress import Counted, ignore
from paredown.compress.survey.products import InputObserver, routed

_Later = dict[Any, Tensor]  # by path: gradients at what blocks hand on, from the blocks that take it
# told of each product, its input (tokens, in), and the gradient at its output (tokens, out)
Pair = Callable[[View, Tensor, Tensor], None]


def moments(
    needs: frozenset[Need], weight: Tensor, x: Tensor, delta: Tensor, sequences: int
) -> Iterator[tuple[Need, Tensor]]:
    """Sums over the tokens of one batch, in float32: x (tokens, in), delta = dL/dy (tokens, out), weight (out, in).

    `sequences` is how many sequences of equal length the tokens are.

    output_gradient           G = delta^T delta (out, out); where out > in, W^T G W (in, in), which is all that a solver reads
    output_gradient_diagonal  diag G (out,)
    weight_gradient           the gradient of the weight, with its sign (out, in)
    fisher                    the squared weight gradient of each sequence, summed over sequences (out, in)
    fisher_rows               the same, summed over inputs too (out,): FWSVD's importance
    fisher_rows_per_token     sum of delta^2 |x|^2 (out,): as if every token were a sequence
    """
    squares = delta.float().square()
    if Need.OUTPUT_GRADIENT in needs:
        folded = delta if weight.shape[0] <= weight.shape[1] else rounded_product(delta, weight)
        yield Need.OUTPUT_GRADIENT, exact_product(folded.T, folded)
    if needs & {Need.OUTPUT_GRADIENT, Need.OUTPUT_GRADIENT_DIAGONAL}:
        yield Need.OUTPUT_GRADIENT_DIAGONAL, squares.sum(0)
    if Need.WEIGHT_GRADIENT in needs:
        yield Need.WEIGHT_GRADIENT, exact_product(delta.T, x)
    if Need.FISHER_ROWS_PER_TOKEN in needs:
        yield Need.FISHER_ROWS_PER_TOKEN, x.float().square().sum(1) @ squares
    if needs & {Need.FISHER, Need.FISHER_ROWS}:
        per_sequence = zip(delta.chunk(sequences), x.chunk(sequences), strict=True)
        total = torch.zeros_like(weight, dtype=torch.float32)  # (out, in)
        for sequence_delta, sequence_x in per_sequence:
            total += exact_product(sequence_delta.T, sequence_x).square()
        if Need.FISHER in needs:
            yield Need.FISHER, total
        if Need.FISHER_ROWS in needs:
            yield Need.FISHER_ROWS, total.sum(1)


class GradientObserver(InputObserver):
    """An InputObserver that, when autograd runs backward through the block, also sums the moments of output gradients."""

    def __init__(
        self,
        views: list[View],
        inputs: frozenset[Need],
        needs: frozenset[Need],
        device: torch.device,
        length: int | None = None,
        pair: Pair | None = None,
    ) -> None:
        """`inputs` out of INPUT_NEEDS, `needs` out of GRADIENT_NEEDS."""
        super().__init__(views, inputs, device, length=length)
        self.gradients: dict[str, dict[Need, Tensor]] = {}  # by view name: sums over tokens, float64
        self.sequences = 1  # in the batch that runs
        self._gradient_needs, self._pair = needs, pair

    def on_product(self, view: View, x: Tensor, output: Tensor, expert: int | None = None) -> None:
        super().on_product(view, x, output, expert)
        if output.requires_grad and (expert is None or bool(routed(x).any())):
            output.register_hook(partial(self._add, view, x.detach(), expert))

    def _add(self, view: View, x: Tensor, expert: int | None, gradient: Tensor) -> None:
        if expert is not None:
            rows = routed(x)
            gradient, x = gradient[expert][rows], x[rows]
        gradient, x = gradient.flatten(0, -2), x.flatten(0, -2)
        if not bool(torch.isfinite(gradient.sum(dtype=torch.float32))):
            raise PareError(f"{view.name}: its gradients are not finite. Try --dtype bfloat16 or float32.")
        if self._pair is not None:
            self._pair(view, x, gradient)
        sums = self.gradients.setdefault(view.name, {})
        for need, value in moments(self._gradient_needs, view.weight, x, gradient, self.sequences):
            if need in sums:
                sums[need] += value
            else:
                sums[need] = value.double()

    def means(self) -> dict[str, Stats]:
        """By view name: moments of the input and of the output gradient, means over the tokens that reached the layer.

        Gives the gradients away: can be called once.
        """
        by_layer = {}
        for name, inputs in self.stats.items():
            sums = self.gradients.pop(name, {})
            by_layer[name] = Stats(inputs, {need: total.div_(max(inputs.count, 1)) for need, total in sums.items()})
        return by_layer


def backward(
    source: ModelSource,
    stream: Stream,
    layers: set[str],
    inputs: frozenset[Need],
    needs: frozenset[Need],
    scratch: Path,
    labels: Labels = "data",
    note: Callable[[str], None] = ignore,
    pair: Pair | None = None,
) -> Iterator[tuple[Block, dict[str, Stats]]]:
    """The blocks from last to first, each in memory until the next one is asked for, with the statistics of its `layers`.

    `stream` stands before the first block; it is used up. The loss is the sum of the next-token cross-entropies in nats.
    `inputs` out of INPUT_NEEDS, `needs` out of GRADIENT_NEEDS. `scratch` is a folder for the inputs of all blocks:
    windows x length x hidden numbers a block. `pair` is told of each product of the `layers`. Raises PareError for
    gradients that are not finite and for a block without a gradient.
    """
    if unknown := needs - GRADIENT_NEEDS:
        raise ValueError(f"unknown statistics {sorted(unknown)}; there are {sorted(GRADIENT_NEEDS)}")
    all_blocks = blocks(source)
    structures = []
    for block in all_blocks:
        tensors, structure = stream.state()
        structures.append(structure)
        save_file(unshared(tensors), _inputs(scratch, block))
        with source.loaded(block):
            stream.advance(block)
        note(Counted.block("survey, forward", block.index, len(all_blocks)))
    upstream = head_gradients(source, stream, labels)
    later: list[_Later] = [{} for _ in upstream]
    for block in reversed(all_blocks):
        stream.restore(load_file(_inputs(scratch, block)), structures[block.index])
        _inputs(scratch, block).unlink()
        with source.loaded(block):
            views = [v for v in block.views() if v.name in layers]
            observer = GradientObserver(views, inputs, needs, source.device, stream.ids[0].shape[1], pair)
            upstream = _block_backward(block, stream, upstream, later, observer)
            return_freed_memory()
            yield block, observer.means()
        note(Counted.block("survey, backward", block.index, len(all_blocks)))


def _block_backward(
    block: Block, stream: Stream, upstream: list[Tensor], later: list[_Later], observer: GradientObserver
) -> list[Tensor]:
    """Gradients (batch, length, hidden) at the block's input, from those at its output.

    `later`: gradients at what the block and those before it hand on, from the blocks behind it; those from this block are
    added, and those at what it wrote itself removed.
    """
    gradients = []
    for i, gradient in enumerate(upstream):
        hidden = stream.hidden[i].to(stream.device).requires_grad_()
        taken = {key: mapped(tree, lambda leaf: _leaf(leaf, stream.device)) for key, tree in stream.carried[i].items()}
        stream.carried[i] = taken
        observer.sequences = len(stream.ids[i])
        with torch.enable_grad():
            with observer:
                output = stream.call(block, i, hidden)
            if not output.requires_grad:
                raise PareError(f"{block.name} cannot be differentiated: choose a method without gradients.")
            handed, before = tensors_of({**taken, **stream.handed}), tensors_of(taken)
            roots = [(output, gradient.to(stream.device))]
            for path, late in later[i].items():
                if handed[path] is not before.get(path) and handed[path].requires_grad:
                    roots.append((handed[path], late.to(stream.device)))
            torch.autograd.backward([root for root, _ in roots], [late for _, late in roots])
        observer.next_batch()
        assert hidden.grad is not None
        gradients.append(hidden.grad.to("cpu"))
        later[i] = _earlier(before, {path: g for path, g in later[i].items() if handed[path] is before.get(path)})
    return gradients


def _earlier(taken: Mapping[Any, Tensor], later: _Later) -> _Later:
    """Gradients at what a block took from earlier ones, with the gradients there from `later` blocks added."""
    own = {path: tensor.grad.to("cpu") for path, tensor in taken.items() if tensor.grad is not None}
    both = {path: gradient + later[path] for path, gradient in own.items() if path in later}
    return {**own, **later, **both}


def _leaf(leaf: Any, device: torch.device) -> Any:
    """A tensor at which gradients are wanted."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach().to(device)
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf


def head_gradients(source: ModelSource, stream: Stream, labels: Labels, seed: int = 0) -> list[Tensor]:
    """Gradients (batch, length, hidden) of the loss at the last block's output, by the model's own final norm and head.

    `stream` stands behind the last block. `labels` are the text's own next tokens ("data"), or drawn from the model's
    predictions with `seed` ("sampled").
    """
    generator = torch.Generator(source.device).manual_seed(seed)
    gradients = []
    with materialised_rest(source, embedding=False), recorders(source) as layers, torch.enable_grad():
        for hidden, ids in zip(stream.hidden, stream.ids, strict=True):
            hidden, ids = hidden.to(stream.device, copy=True).requires_grad_(), ids.to(stream.device)
            layers[-1].output = hidden
            for positions in head_positions(ids, stream.head_tokens):
                output = source.model(ids, use_cache=False, logits_to_keep=positions)
                logits = output.logits  # (batch, positions, vocabulary)
                targets = ids[:, positions + 1] if labels == "data" else _sampled(logits, generator)
                target_nll(logits, targets).sum().backward()
            assert hidden.grad is not None
            gradients.append(hidden.grad.to("cpu"))
    return gradients


@torch.no_grad()
def _sampled(logits: Tensor, generator: torch.Generator) -> Tensor:  # (batch, positions)
    """One token for each position, drawn from the predicted probabilities."""
    probabilities = logits.float().softmax(-1).flatten(0, 1)
    return torch.multinomial(probabilities, 1, generator=generator).view(logits.shape[:2])


def _inputs(scratch: Path, block: Block) -> Path:
    """The file that holds a block's inputs."""
    return scratch / f"inputs-{block.index}.safetensors"
