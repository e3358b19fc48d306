"""Statistics of a block's inputs: all layers in one pass, or group by group where two streams are compared."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.stream import Stream
from paredown.compress.numerics.moments import InputStats
from paredown.compress.survey.observe import Catcher, Observer, Reached


def observe(stream: Stream, block: Block, views: list[View], needs: frozenset[str]) -> dict[str, InputStats]:
    """Statistics of each view's input, by view name; views that no token reached are missing."""
    observer = Observer(views, needs, stream.device)
    with observer:
        for _ in stream.outputs(block):
            observer.next_batch()
    stream.seconds -= observer.seconds  # what is collected on the way is not the model's own forward pass
    return observer.stats


def groups(stream: Stream, block: Block, views: list[View]) -> list[list[View]]:
    """Views that share an input, in the order in which the block calls them; those never called come last."""
    observer = Observer(views, frozenset(), stream.device)
    with observer:
        stream.output(block, 0)
    by_name = {v.name: v for v in views}
    called = [[by_name.pop(name) for name in names] for names in observer.groups()]
    return called + ([list(by_name.values())] if by_name else [])


def observe_paired(
    stream: Stream, dense: Stream, block: Block, twin: Block, group: list[View], needs: frozenset[str]
) -> InputStats | None:
    """Statistics of the input that a group of views shares, on both streams; None if no token reaches it.

    Each block stops as soon as the input is there.
    """
    mine = group[0]
    theirs = next(v for v in twin.views() if v.name == mine.name)
    stats = InputStats(mine.shape[1], needs, stream.device)
    for i in range(len(stream.hidden)):
        found, wanted = caught(stream, block, mine, i), caught(dense, twin, theirs, i)
        if found is None or wanted is None or found.shape != wanted.shape:
            return None
        try:
            stats.update(found, wanted)
        except PareError as fault:
            raise PareError(f"{mine.name}: {fault}") from fault
    return stats


@dataclass(frozen=True)
class Writers:
    """The layers of a block whose output is added to its residual stream, in the order in which they are called."""

    views: list[View]

    @classmethod
    def of(cls, stream: Stream, block: Block, called: list[list[View]]) -> "Writers":
        """Found by trying: with all later ones silent, a multiple of the weight must add that multiple of its output."""
        width = stream.hidden[0].shape[-1]
        alone = [
            g[0] for g in called if len(g) == 1 and g[0].expert is None and g[0].shape[0] == width <= g[0].shape[1]
        ]
        found: list[View] = []
        for view in reversed(alone):
            with silenced(found):
                if _adds(stream, block, view):
                    found.insert(0, view)
        return cls(found)

    def after(self, view: View) -> list[View]:
        names = [v.name for v in self.views]
        return self.views[names.index(view.name) + 1 :]


def _adds(stream: Stream, block: Block, view: View) -> bool:
    weight, bias = view.weight, cast(Tensor | None, view.module.bias)
    before, catcher = _through(stream, block, view, 0)
    made = catcher.made
    if made is None:
        return False
    added = (made if bias is None else made - bias).reshape(before.shape).float()
    # so that what it adds is no smaller than the stream, whose rounding would hide it
    factor = max(1.0, float(before.float().norm() / added.norm().clamp_min(1e-30)))
    view.assign(weight * (1 + factor))
    after, _ = _through(stream, block, view, 0)
    view.assign(weight)
    error = (after.float() - before.float() - factor * added).norm()
    return bool(error < 0.1 * factor * added.norm())


@contextmanager
def silenced(views: list[View]) -> Iterator[None]:
    """The layers give zeros meanwhile."""
    kept = [(v, v.weight, v.module.bias) for v in views]
    for view, weight, bias in kept:
        view.assign(weight.new_zeros(()).expand(weight.shape))
        if bias is not None:
            view.module.bias = nn.Parameter(torch.zeros_like(cast(Tensor, bias)), requires_grad=False)
    try:
        yield
    finally:
        for view, weight, bias in kept:
            view.assign(weight)
            view.module.bias = bias


def observe_writer(
    stream: Stream, dense: Stream, block: Block, twin: Block, view: View, later: list[View], needs: frozenset[str]
) -> InputStats | None:
    """Statistics of the input of a layer that writes to the residual stream, and what that stream misses behind it.

    `missing` E[z y^T] (out, in) and `missing_mean` E[z] (out,): z is the dense residual stream minus the compressed one
    once each has got the output of the dense weight, y the compressed input. Of a wide weight that is all that "cross"
    could tell, and smaller.
    """
    theirs = {v.name: v for v in twin.views()}
    stats = InputStats(view.shape[1], needs - {"cross"}, stream.device)
    weight = view.weight.float()  # (out, in)
    missing = torch.zeros(view.shape, dtype=torch.float64, device=stream.device)
    total = torch.zeros(view.shape[0], dtype=torch.float64, device=stream.device)
    with silenced(later), silenced([theirs[v.name] for v in later]):
        for i in range(len(stream.hidden)):
            x, rest = _beside(stream, block, view, i)
            dense_x, dense_rest = _beside(dense, twin, theirs[view.name], i)
            if x is None or dense_x is None:
                return None
            try:
                stats.update(x)
            except PareError as fault:
                raise PareError(f"{view.name}: {fault}") from fault
            flat, dense_flat = (t.reshape(-1, view.shape[1]).float() for t in (x, dense_x))  # (tokens, in)
            z = (dense_rest - rest).reshape(-1, view.shape[0])  # (tokens, out)
            z = torch.addmm(z, dense_flat - flat, weight.T)
            missing += z.T @ flat
            total += z.sum(0)
    return stats.with_residual({"missing": missing.div_(stats.count), "missing_mean": total / stats.count})


def _beside(stream: Stream, block: Block, view: View, i: int) -> tuple[Tensor | None, Tensor]:
    """A layer's input, and the block's output without the layer's own, float32."""
    out, catcher = _through(stream, block, view, i)
    rest = out.float() if catcher.made is None else out.float() - catcher.made.reshape(out.shape).float()
    return catcher.found, rest


def _through(stream: Stream, block: Block, view: View, i: int) -> tuple[Tensor, Catcher]:
    catcher = Catcher(view, stop=False)
    with catcher:
        out = stream.output(block, i)
    return out, catcher


def caught(stream: Stream, block: Block, view: View, i: int) -> Tensor | None:
    """The input of a view in batch i."""
    catcher = Catcher(view)
    with suppress(Reached), catcher:
        stream.output(block, i)
    return catcher.found


def shared_copy(block: Block) -> Block:
    """The block again, with modules of its own and the same weights: it stays dense while the other one is edited."""
    shared: dict[int, Tensor] = {id(t): t for t in [*block.module.parameters(), *block.module.buffers()]}
    for view in block.views():
        if view.expert is not None:  # one expert is edited within the tensor of all
            whole = getattr(view.module, view.parameter)
            if shared[id(whole)] is whole:
                shared[id(whole)] = nn.Parameter(whole.clone(), requires_grad=False)
    return Block(block.index, block.prefix, copy.deepcopy(block.module, shared))
