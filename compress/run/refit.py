"""Fit the layers of a block that write to the residual stream to the dense model's, where blocks behind them are removed."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from paredown.compress.methods.base import BlockMethod
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.stream import Stream
from paredown.compress.survey.collect import groups
from paredown.compress.survey.refit import refit_towards
from paredown.compress.survey.residual import ResidualLayers, silenced


@dataclass
class Refit:
    """The fit of one block: each layer towards the dense stream where the next one that stays reads."""

    stream: Stream  # the smaller model's, before the block
    target: Block  # of the smaller model
    prefix: str  # of the same block in the dense model
    layers: ResidualLayers  # of `target`
    damping: float
    changed: dict[str, Tensor] = field(default_factory=dict)  # weights by full name in the dense model

    @classmethod
    def begun(cls, stream: Stream, dense: Stream, target: Block, twin: Block, method: BlockMethod) -> "Refit":
        """All layers but the last are fitted: what reads behind them lies in the same block.

        `dense` stands before `twin`, the dense model's block, which is in memory.
        """
        layers = ResidualLayers.of(stream, target, groups(stream, target, target.views()))
        refit = cls(stream, target, twin.prefix, layers, method.damping)
        twins = {v.name.removeprefix(twin.prefix): v for v in twin.views()}
        for view in layers.views[:-1]:
            later = [twins[v.name.removeprefix(target.prefix)] for v in layers.after(view)]
            with silenced(later):
                refit._fit(view, lambda i: dense.output(twin, i))
        return refit

    def last(self, hidden: list[Tensor]) -> None:
        """Fit the last layer; `hidden` (batch, length, hidden) of each batch is the dense stream before the next block."""
        if self.layers.views:
            self._fit(self.layers.views[-1], lambda i: hidden[i].to(self.stream.device))

    def _fit(self, view: View, wanted: Callable[[int], Tensor]) -> None:
        weight = refit_towards(self.stream, self.target, view, self.layers.after(view), wanted, self.damping)
        view.assign(weight.to(view.weight.dtype))
        name = view.stored_name.removeprefix(self.target.prefix)
        self.changed[self.prefix + name] = view.tensor
