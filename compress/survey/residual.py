"""Layers that add their output to a block's residual stream.

Where the compressed model's residual stream differs from the dense model's, such a layer can make up for a part of the
difference, because its own output is added to the stream.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from paredown.compress.model.blocks import Block, View
from paredown.compress.model.stream import Stream
from paredown.compress.survey.products import run_with_capture

Kind = tuple[type, tuple[str, ...]]  # the class of a block, and its layers that may be residual ones


@dataclass(frozen=True)
class ResidualLayers:
    """The layers of a block whose output is added to its residual stream, in the order in which the block calls them.

    `alone`: nothing else is added to the stream, which with all of them silent leaves the block as it entered.
    """

    views: list[View]
    alone: bool = False

    @classmethod
    def of(
        cls, stream: Stream, block: Block, groups: list[list[View]], known: dict[Kind, set[str]] | None = None
    ) -> "ResidualLayers":
        """Find them by trial among `groups` of views that share an input, in the order in which the block calls them.

        With all later ones silent, a layer belongs to them if adding a multiple of its weight adds the same multiple of
        its output to the block's output. What is `known` of an earlier block of the same kind is taken over where nothing
        else is added to the stream here either.
        """
        width = stream.hidden[0].shape[-1]
        candidates = [
            g[0] for g in groups if len(g) == 1 and g[0].expert is None and g[0].shape[0] == width <= g[0].shape[1]
        ]
        own = {v.name.removeprefix(block.prefix): v for v in candidates}
        kind, known = (type(block.module), tuple(own)), {} if known is None else known
        views = [v for name, v in own.items() if name in known.get(kind, ())]
        if kind in known and _alone(stream, block, views):
            return cls(views, True)
        views = []
        for view in reversed(candidates):
            with silenced(views):
                if _adds(stream, block, view):
                    views.insert(0, view)
        alone = _alone(stream, block, views)
        if alone:
            known[kind] = {name for name, v in own.items() if v in views}
        return cls(views, alone)

    def after(self, view: View) -> list[View]:
        """Those that the block calls after this one."""
        return self.views[self._place(view) + 1 :]

    def before(self, view: View) -> list[View]:
        """Those that the block calls before this one."""
        return self.views[: self._place(view)]

    def of_twin(self, twin: Block) -> "ResidualLayers":
        """The same layers of another block of the same kind."""
        by_name = {v.name: v for v in twin.views()}
        return ResidualLayers([by_name[v.name] for v in self.views], self.alone)

    def _place(self, view: View) -> int:
        return [v.name for v in self.views].index(view.name)


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


def _alone(stream: Stream, block: Block, views: list[View]) -> bool:
    """Whether with these layers silent the block's output is its input."""
    with silenced(views):
        return torch.equal(stream.output(block, 0), stream.hidden[0].to(stream.device))


def _adds(stream: Stream, block: Block, view: View) -> bool:
    """Whether the block adds the layer's output to its own; all residual layers after it must be silent."""
    weight, bias = view.weight, view.bias
    before, _, output = run_with_capture(stream, block, view, 0)  # (batch, length, hidden)
    if output is None or output.numel() != before.numel():
        return False
    added = (output if bias is None else output - bias).reshape(before.shape).float()
    # so large that what is added is no smaller than the stream, whose rounding would hide it
    factor = max(1.0, float(before.float().norm() / added.norm().clamp_min(1e-30)))
    view.assign(weight * (1 + factor))
    after, *_ = run_with_capture(stream, block, view, 0)
    view.assign(weight)
    error = (after.float() - before.float() - factor * added).norm()
    return bool(error < 0.1 * factor * added.norm())
