"""Layers that add their output to a block's residual stream, and what that stream misses in front of each of them.

Where the compressed model's residual stream differs from the dense model's, such a layer can make up for a part of the
difference, because its own output is added to the stream.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.stream import Stream
from paredown.compress.numerics.moments import InputStats, Need, Residual, Stats
from paredown.compress.survey.products import run_with_capture


@dataclass(frozen=True)
class ResidualLayers:
    """The layers of a block whose output is added to its residual stream, in the order in which the block calls them."""

    views: list[View]

    @classmethod
    def of(cls, stream: Stream, block: Block, groups: list[list[View]]) -> "ResidualLayers":
        """Find them by trial among `groups` of views that share an input, in the order in which the block calls them.

        With all later ones silent, a layer belongs to them if adding a multiple of its weight adds the same multiple of
        its output to the block's output.
        """
        width = stream.hidden[0].shape[-1]
        candidates = [
            g[0] for g in groups if len(g) == 1 and g[0].expert is None and g[0].shape[0] == width <= g[0].shape[1]
        ]
        views: list[View] = []
        for view in reversed(candidates):
            with silenced(views):
                if _adds(stream, block, view):
                    views.insert(0, view)
        return cls(views)

    def after(self, view: View) -> list[View]:
        """Those that the block calls after this one."""
        names = [v.name for v in self.views]
        return self.views[names.index(view.name) + 1 :]


def observe_residual(
    stream: Stream, dense: Stream, block: Block, twin: Block, view: View, later: list[View], needs: frozenset[Need]
) -> Stats | None:
    """Statistics of the input of a residual layer, and the Residual that its output can make up for.

    `stream` runs through `block`, the dense model's through `twin`; `later` are the residual layers after this one.
    None if no token reaches the layer. The cross moment is not collected: for a weight with out <= in the Residual, which
    is smaller, serves instead.
    """
    by_name = {v.name: v for v in twin.views()}
    stats = InputStats(view.shape[1], needs - {Need.CROSS}, stream.device)
    weight = view.weight.float()  # (out, in)
    missing = torch.zeros(view.shape, dtype=torch.float64, device=stream.device)  # (out, in)
    total = torch.zeros(view.shape[0], dtype=torch.float64, device=stream.device)  # (out,)
    with silenced(later), silenced([by_name[v.name] for v in later]):
        for i in range(len(stream.hidden)):
            x, rest = _input_and_rest(stream, block, view, i)
            dense_x, dense_rest = _input_and_rest(dense, twin, by_name[view.name], i)
            if x is None or dense_x is None:
                return None
            try:
                stats.update(x)
            except PareError as error:
                raise PareError(f"{view.name}: {error}") from error
            flat, dense_flat = (t.reshape(-1, view.shape[1]).float() for t in (x, dense_x))  # (tokens, in)
            z = (dense_rest - rest).reshape(-1, view.shape[0])  # (tokens, out)
            z = torch.addmm(z, dense_flat - flat, weight.T)
            missing += z.T @ flat
            total += z.sum(0)
    return Stats(stats, residual=Residual(missing.div_(stats.count), total / stats.count))


@contextmanager
def silenced(views: list[View]) -> Iterator[None]:
    """Inside the `with` block these layers output zeros."""
    originals = [(v, v.weight, v.bias) for v in views]
    for view, weight, bias in originals:
        view.assign(weight.new_zeros(()).expand(weight.shape))
        if bias is not None:
            view.assign_bias(torch.zeros_like(bias))
    try:
        yield
    finally:
        for view, weight, bias in originals:
            view.assign(weight)
            if bias is not None:
                view.assign_bias(bias)


def _adds(stream: Stream, block: Block, view: View) -> bool:
    """Whether the block adds the layer's output to its own; all residual layers after it must be silent."""
    weight, bias = view.weight, view.bias
    before, capture = run_with_capture(stream, block, view, 0)  # (batch, length, hidden)
    output = capture.output
    if output is None or output.numel() != before.numel():
        return False
    added = (output if bias is None else output - bias).reshape(before.shape).float()
    # so large that what is added is no smaller than the stream, whose rounding would hide it
    factor = max(1.0, float(before.float().norm() / added.norm().clamp_min(1e-30)))
    view.assign(weight * (1 + factor))
    after, _ = run_with_capture(stream, block, view, 0)
    view.assign(weight)
    error = (after.float() - before.float() - factor * added).norm()
    return bool(error < 0.1 * factor * added.norm())


def _input_and_rest(stream: Stream, block: Block, view: View, i: int) -> tuple[Tensor | None, Tensor]:
    """A layer's input, and the block's output without the layer's own, float32."""
    output, capture = run_with_capture(stream, block, view, i)
    if capture.output is None:
        return capture.input, output.float()
    return capture.input, output.float() - capture.output.reshape(output.shape).float()
