"""Statistics of a block's inputs: all layers in one pass, or group by group where two streams are compared."""

import copy
from contextlib import suppress

from torch import Tensor

from paredown.compress.blocks import Block, View
from paredown.compress.errors import PareError
from paredown.compress.observe import Catcher, Observer, Reached
from paredown.compress.statistics import InputStats
from paredown.compress.stream import Stream


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


def caught(stream: Stream, block: Block, view: View, i: int) -> Tensor | None:
    """The input of a view in batch i."""
    catcher = Catcher(view)
    with suppress(Reached), catcher:
        stream.output(block, i)
    return catcher.found


def shared_copy(block: Block) -> Block:
    """The block again, with modules of its own and the same weights: it stays dense while the other one is edited."""
    shared = {id(t): t for t in [*block.module.parameters(), *block.module.buffers()]}
    return Block(block.index, block.prefix, copy.deepcopy(block.module, shared))
