"""Losses of texts by a model, with one block in memory at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.model.blocks import blocks
from paredown.compress.model.stream import start
from paredown.compress.run.streams import advance
from paredown.compress.text.windows import Windows


@torch.no_grad()
def score(source: ModelSource, evaluations: Sequence[Windows], progress: Callable[[int, int], None]) -> list[Tensor]:
    """Loss per token of each text, in nats (windows, length - 1), with one block in memory at a time.

    `progress` is called with (blocks done, blocks).
    """
    streams = [start(source, windows.ids) for windows in evaluations]
    all_blocks = blocks(source)
    for block in all_blocks:
        with source.loaded(block):
            advance(streams, block)
        progress(block.index + 1, len(all_blocks))
    return [stream.nll(source) for stream in streams]
