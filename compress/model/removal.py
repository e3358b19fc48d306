"""Whether blocks of a model can be removed: not where a block takes what an earlier one hands on beside the hidden states."""

from collections.abc import Collection, Sequence

import torch

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block
from paredown.compress.model.carried import FromBlock, Shared
from paredown.compress.model.stream import Stream, start

PROBE = 4  # tokens


@torch.no_grad()
def check_removable(source: ModelSource, all_blocks: Sequence[Block]) -> None:
    """Raises PareError for a model with blocks that need earlier ones: their outputs, or keys and values that they share.

    Weights of blocks are read only where these are given a container that is empty at first: whether one fills it is tried.
    """
    stream = start(source, torch.arange(PROBE)[None])
    leaves = [leaf for call in stream.calls[0] for leaf in call.leaves()]
    taken = next((leaf for leaf in leaves if isinstance(leaf, FromBlock)), None)
    if taken is not None:
        raise _refusal(source, all_blocks[taken.block])
    if empty := {leaf.number for leaf in leaves if isinstance(leaf, Shared) and not leaf.content}:
        _check_unfilled(source, all_blocks, stream, empty)


def _check_unfilled(source: ModelSource, all_blocks: Sequence[Block], stream: Stream, empty: Collection[int]) -> None:
    """Raises PareError if a block writes to one of these containers, which a later block is given."""
    for block in all_blocks:
        with source.loaded(block):
            stream.advance(block)
        if any(stream.carried[0].get(number) for number in empty):
            raise _refusal(source, block)


def _refusal(source: ModelSource, block: Block) -> PareError:
    return PareError(
        f"{source.id}: later blocks of this {source.family} model take more than hidden states from {block.name}, so its "
        "blocks cannot be removed. Make them narrower or sparser instead: name another method."
    )
