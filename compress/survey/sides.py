"""What layers are given in one of two models that are compared at a block, batch by batch.

The compressed model's layers are edited one group after another, so each group's inputs take a pass of their own through the
block, up to that group. The dense model's stay as they are: one pass finds them all, where they may be kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.machine import available_memory
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.stream import Stream
from paredown.compress.numerics.moments import InputStats, Need, Residual, Stats
from paredown.compress.numerics.precision import exact_product, like
from paredown.compress.survey.finished import Finished
from paredown.compress.survey.products import Capture, input_of, run_with_capture
from paredown.compress.survey.residual import ResidualLayers, silenced

# of inputs and outputs of a dense block's layers that are kept, and of outputs of a block's finished parts, at least
KEPT_BYTES = 2**29
KEPT_PART = 6  # ... and on a CPU a sixth of the free memory, where that is more


class Side:
    """A stream before a block, the block's residual layers, and the views that are read one after another.

    What is kept of the block takes no more than `room` bytes.
    """

    def __init__(
        self, stream: Stream, block: Block, layers: ResidualLayers, views: Sequence[View] = (), room: int = 0
    ) -> None:
        self.stream, self.layers = stream, layers
        self.block, self._views = block, {v.name: v for v in block.views()}
        # on a GPU, where running a part again is cheap, it was not measured
        self._finished = Finished(stream, block, views, room if views and stream.device.type == "cpu" else 0)

    def input(self, name: str, i: int) -> Tensor | None:
        """The input (..., in) of the view of this name in batch `i`; None if no token reaches it."""
        with self._finished.batch(i):
            return input_of(self.stream, self.block, self._views[name], i)

    def input_and_rest(self, name: str, i: int) -> tuple[Tensor | None, Tensor]:
        """The input of a residual layer, and what the block gives without it and those after it: (batch, length, hidden)
        float32.
        """
        view = self._views[name]
        if self.layers.alone and not self.layers.before(view):
            return self.input(name, i), self._hidden(i)
        with silenced(self.layers.after(view)), self._finished.batch(i):
            output, x, own = run_with_capture(self.stream, self.block, view, i)
        return x, output.float() if own is None else output.float() - own.reshape(output.shape).float()

    def advance(self) -> None:
        """Move the stream behind the block."""
        batches = self.stream.advancing(self.block)
        for i in range(len(self.stream.hidden) + 1):  # once more to end it
            with self._finished.batch(i):
                next(batches, None)

    def passed(self, group: Sequence[View]) -> None:
        """These views are asked for no more, and will not change."""
        self._finished.add(group)

    def close(self) -> None:
        """Leave the block as any other."""
        self._finished.close()

    def _hidden(self, i: int) -> Tensor:
        return self.stream.hidden[i].to(self.stream.device).float()


class KeptSide(Side):
    """All inputs of `firsts`, the first views of their groups, by one pass through a block that nobody edits."""

    def __init__(self, stream: Stream, block: Block, layers: ResidualLayers, firsts: Sequence[str]) -> None:
        super().__init__(stream, block, layers)
        self._ahead = stream.copy()  # behind the block
        self._inputs: list[dict[str, Tensor]] = []  # of each batch, in host memory
        self._outputs: list[dict[str, Tensor]] = []
        writers = [v.name for v in layers.views]
        views = [self._views[name] for name in {*firsts, *writers}]
        batches = self._ahead.advancing(block)
        while True:
            capture = Capture(views)
            with capture:
                if next(batches, self) is self:
                    break
            self._inputs.append(
                {name: capture.inputs[name].to("cpu", copy=True) for name in firsts if name in capture.inputs}
            )
            self._outputs.append({name: capture.outputs[name].to("cpu") for name in writers if name in capture.outputs})
        stream.seconds += self._ahead.seconds

    def input(self, name: str, i: int) -> Tensor | None:
        found = self._inputs[i].get(name)
        return None if found is None else found.to(self.stream.device)

    def input_and_rest(self, name: str, i: int) -> tuple[Tensor | None, Tensor]:
        view = self._views[name]
        if self.layers.after(view):
            rest = self._hidden(i)
            for writer in self.layers.before(view):
                rest = rest + self._output(writer.name, i, rest)
            return self.input(name, i), rest
        rest = self._ahead.hidden[i].to(self.stream.device).float()  # rounded as where the block is run whole
        return self.input(name, i), rest - self._output(name, i, rest)

    def passed(self, group: Sequence[View]) -> None:
        for inputs in self._inputs:
            inputs.pop(group[0].name, None)
        if self.layers.views and group[0].name == self.layers.views[-1].name:
            self._outputs.clear()

    def _output(self, name: str, i: int, like: Tensor) -> Tensor:
        """Of a writer, (batch, length, hidden) float32."""
        return self._outputs[i][name].to(like.device).reshape(like.shape).float()

    def advance(self) -> None:
        self.stream.hidden, self.stream.carried = self._ahead.hidden, self._ahead.carried


def dense_side(
    stream: Stream, block: Block, layers: ResidualLayers, firsts: Sequence[View], views: Sequence[View], room: int
) -> Side:
    """All groups' `firsts` kept if they take no more than `room` bytes, else a pass for each group of `views`."""
    tokens, element = sum(ids.numel() for ids in stream.ids), stream.hidden[0].element_size()
    if (layers.views and not layers.alone) or kept_bytes([*firsts, *layers.views], tokens, element) > room:
        return Side(stream, block, layers, views, room)
    return KeptSide(stream, block, layers, [v.name for v in firsts if v.expert is None])


def kept_room(device: torch.device, taken: int = 0) -> int:
    """How many bytes of host memory each of two sides may keep of a block, once `taken` bytes more are in use."""
    free = available_memory() if device.type == "cpu" else None  # copies to a GPU and back should cost more than passes
    return max(KEPT_BYTES, ((free or 0) - taken) // KEPT_PART)


def kept_bytes(views: Sequence[View], tokens: int, element: int) -> int:
    """Of the inputs of these views, and of outputs that are no wider."""
    return element * tokens * sum(v.shape[1] for v in views if v.expert is None)


def held_bytes(views: Sequence[View], tokens: int, element: int, device: torch.device, room: int) -> int:
    """Of what two sides with such a `room` keep at most of a block with these views, while its last layer is edited.

    The dense side's inputs are no longer there by then, but where they take more than all outputs of the other side.
    """
    kept = kept_bytes(views, tokens, element)
    finished = element * tokens * sum(v.shape[0] for v in views if v.expert is None) if device.type == "cpu" else 0
    own = min(finished, room)
    return max(kept, own) if kept <= room else 2 * own


def observe_paired(own: Side, dense: Side, view: View, needs: frozenset[Need]) -> Stats | None:
    """Statistics, on both sides, of a view's input; None if no token reaches it."""
    stats = InputStats(view.shape[1], needs, own.stream.device)
    for i in range(len(own.stream.hidden)):
        x, dense_x = own.input(view.name, i), dense.input(view.name, i)
        if x is None or dense_x is None or x.shape != dense_x.shape:
            return None
        _update(stats, view, x, dense_x)
    return Stats(stats)


def observe_residual(own: Side, dense: Side, view: View, needs: frozenset[Need]) -> Stats | None:
    """Statistics of the input of a residual layer, and the Residual that its output can make up for.

    None if no token reaches the layer. The cross moment is not collected: for a weight with out <= in the Residual, which
    is smaller, serves instead.
    """
    device = own.stream.device
    stats = InputStats(view.shape[1], needs - {Need.CROSS}, device)
    weight = view.weight  # (out, in)
    missing = torch.zeros_like(weight, dtype=torch.float64)
    total = torch.zeros_like(weight[:, 0], dtype=torch.float64)  # (out,)
    for i in range(len(own.stream.hidden)):
        x, rest = own.input_and_rest(view.name, i)
        dense_x, dense_rest = dense.input_and_rest(view.name, i)
        if x is None or dense_x is None:
            return None
        _update(stats, view, x)
        flat, dense_flat = (t.reshape(-1, view.shape[1]) for t in (x, dense_x))  # (tokens, in)
        z = (dense_rest - rest).reshape(-1, view.shape[0])  # (tokens, out)
        z = z + exact_product(dense_flat - flat, weight.T)
        missing += exact_product(like(z, flat).T, flat)
        total += z.sum(0)
    return Stats(stats, residual=Residual(missing.div_(stats.count), total / stats.count))


def _update(stats: InputStats, view: View, x: Tensor, dense: Tensor | None = None) -> None:
    try:
        stats.update(x, dense)
    except PareError as error:
        raise PareError(f"{view.name}: {error}") from error
