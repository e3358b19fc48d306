"""Hand a model's tensors to the writer: those of edited layers packed or dense, all others as they were stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.job import Format
from paredown.compress.model.blocks import Block
from paredown.compress.storage.spec import Spec


@dataclass(frozen=True)
class BlockChange:
    """All that the writer sees of an edited block."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # changed dense weights, biases and norms, by full name
    specs: Mapping[str, Spec] = field(default_factory=dict)  # of packed weights, by the name of the layer
    packed: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # layer -> part -> tensor
    replaced: frozenset[str] = frozenset()  # full names of the parameters that packed weights replace


def write_block(
    writer: CheckpointWriter, source: ModelSource, block: Block, change: BlockChange, format: Format
) -> None:
    """Write the block's tensors: those that changed, and the others as they were stored."""
    changed = {*change.tensors, *change.replaced}
    for name, tensors in change.packed.items():
        for part, tensor in tensors.items():
            writer.add(f"{name}.{part}", tensor, kind=change.specs[name].kind)
    unchanged = source.read(block.prefix + n for n in block.names if block.prefix + n not in changed)
    _add_dense(writer, source, {**unchanged, **change.tensors}, format)
    writer.end_block()


def write_rest(writer: CheckpointWriter, source: ModelSource, all_blocks: Sequence[Block], format: Format) -> None:
    """Write what lies outside the blocks as it was stored: embeddings, final norm, head, and tensors that the model class
    does not know."""
    inside = tuple(block.prefix for block in all_blocks)
    for name in source.parameters:
        if not name.startswith(inside):
            _add_dense(writer, source, source.read([name]), format)
            writer.end_block()
    for key, tensor in source.files.read(source.verbatim).items():
        writer.add(key, tensor, kind="verbatim")


def _add_dense(writer: CheckpointWriter, source: ModelSource, weights: dict[str, Tensor], format: Format) -> None:
    """A dense checkpoint has the names and the layout of the family's own, a packed one those of the model class."""
    stored = source.checkpoint_names(weights) if format == "dense" else weights
    for name, tensor in stored.items():
        writer.add(name, tensor, kind="dense")
