"""Show by calling them that the blocks of a smaller model do what the same blocks of the source do."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from paredown.compress.checkpoint.configs import first_line
from paredown.compress.checkpoint.source import ModelSource, set_tensor
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.model.calls import Call, calls_of, recorders
from paredown.compress.model.carried import FromBlock, Shared
from paredown.compress.model.reshape_compare import Changes, call_differences, kind_of
from paredown.compress.model.rest import imitated_rest
from paredown.compress.model.stream import Stream

PROBE = 16  # tokens
ROUNDING = 1e-3  # of the outputs' root mean square, in the model's dtype


@torch.no_grad()
def faults(source: ModelSource, config: Any, model: Any, layers: Sequence[Block], narrower: bool) -> Iterator[str]:
    """Where the smaller `model` calls one of its blocks `layers` otherwise than the source does, or where the same weights
    give other outputs in it. Each block of `layers` has the index that it has in the source.

    The weights of one block of each kind are read, unless the model is `narrower`: then they do not fit.
    """
    old, kept = blocks(source), [layer.index for layer in layers]
    calls, hidden, ids = _calls(source)
    try:
        after, _, _ = _calls(_as_source(source, config, model))
    except PareError as fault:
        yield str(fault)
        return
    except Exception as fault:  # whatever a class does with a config that it did not expect
        yield f"its forward pass fails ({type(fault).__name__}: {first_line(fault)})"
        return
    changes = Changes(kept, len(old))
    own = {kept[position]: call for position, call in enumerate(after)}
    streams = [
        Stream([hidden], [[c.get(i, calls[i]) for i in range(len(old))]], [ids], source.device) for c in ({}, own)
    ]
    kinds: set[str] = set()
    for position, layer in enumerate(layers):
        block = old[layer.index]
        yield from map(str, call_differences(calls[block.index], after[position], changes, position, block.name))
        kind = kind_of(block.module)
        if not narrower and position != block.index and kind not in kinds and _alone(calls[block.index]):
            kinds.add(kind)
            yield from _other_outputs(source, model, streams, block, layer)


def _other_outputs(
    source: ModelSource, model: Any, streams: Sequence[Stream], block: Block, layer: Block
) -> Iterator[str]:
    """Whether `layer` of the smaller model gives other outputs than the source's `block`, with the same weights.

    `streams` have the calls of the source and of the smaller model.
    """
    empty = layer.module.state_dict()
    with source.loaded(block):
        try:
            for name, weight in block.module.state_dict().items():
                set_tensor(model, layer.prefix + name, weight)
            before, after = (
                stream.call(b, 0, stream.hidden[0].clone()).float()
                for stream, b in zip(streams, (block, layer), strict=True)
            )
        except Exception as fault:  # a class that finds its weights by the number that the block had
            yield f"{block.name} cannot be run in its new place ({type(fault).__name__}: {first_line(fault)})"
            return
        finally:
            for name, tensor in empty.items():
                set_tensor(model, layer.prefix + name, tensor)
    apart, size = (before - after).nan_to_num(), before.nan_to_num()
    if apart.square().mean() > ROUNDING**2 * size.square().mean():
        yield f"{block.name} would give other outputs: its class computes with its number, or with that of all blocks"


def _alone(call: Call) -> bool:
    """Whether a block can be called by itself: nothing that it is given comes from other blocks."""
    return not any(isinstance(leaf, FromBlock | Shared) for leaf in call.leaves())


def _calls(source: ModelSource) -> tuple[list[Call], Tensor, Tensor]:
    """How a model calls its blocks for a few tokens, the hidden states (batch, length, hidden size) and the tokens.

    No weights are read.
    """
    ids = torch.arange(min(PROBE, int(source.config.get_text_config().vocab_size)))[None]
    with imitated_rest(source), recorders(source) as layers:
        source.model(ids.to(source.device), use_cache=False)
        calls, hidden = calls_of(layers, source), layers[0].hidden
    assert hidden is not None
    return calls, hidden, ids


def _as_source(source: ModelSource, config: Any, model: Any) -> ModelSource:
    """What a walk through the smaller model needs that reads no weights."""
    other = copy.copy(source)
    for name in ("parameters", "tied", "bytes_left", "_dtypes"):  # which are of the source's model
        other.__dict__.pop(name, None)
    other.config, other.model = config, model
    return other
