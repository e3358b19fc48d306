"""Hand a model's tensors to the writer: those of edited layers packed or dense, all others as they were stored."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    own = [block.prefix + name for name in block.names if block.prefix + name in source.parameters]  # tied ones once
    if format == "dense":
        stored = dict(source.as_stored({**dict.fromkeys(own), **change.tensors}, change.tensors))
    else:
        stored = {**source.read(name for name in own if name not in changed), **change.tensors}
    add_dense(writer, stored)
    writer.end_block()


def write_rest(
    writer: CheckpointWriter,
    source: ModelSource,
    all_blocks: Sequence[Block],
    format: Format,
    changed: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what lies outside the blocks as it was stored: embeddings, final norm, head, and tensors that the model class
    does not know. Those of the weights that are `changed`, by name, get new values."""
    for tensors in outside(source, all_blocks, format, changed):
        add_dense(writer, tensors)
        writer.end_block()
    write_verbatim(writer, source)


def outside(
    source: ModelSource, all_blocks: Sequence[Block], format: Format, changed: Mapping[str, Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """The weights outside the blocks as they were stored or `changed`, those together that the files hold as one tensor."""
    inside, new = tuple(block.prefix for block in all_blocks), changed or {}
    written: set[str] = set()
    for name in source.parameters:
        if not name.startswith(inside) and name not in written:
            together = source.origins[name].weights or (name,)
            written.update(together)
            if format == "dense":
                yield dict(source.as_stored([name], new))
            else:
                yield {weight: new.get(weight, tensor) for weight, tensor in source.read(together).items()}


def write_verbatim(writer: CheckpointWriter, source: ModelSource) -> None:
    """Write the tensors that the model class does not know."""
    for key, tensor in source.files.read(source.verbatim, finite=False).items():
        writer.add(key, tensor, kind="verbatim")


def add_dense(writer: CheckpointWriter, tensors: Mapping[str, Tensor]) -> None:
    """Add ordinary tensors by the names under which they are stored."""
    for name, tensor in tensors.items():
        writer.add(name, tensor, kind="dense")


def names_in_files(source: ModelSource) -> dict[str, Any]:
    """What an export needs to give weights their names in the files again: those that are called otherwise, and those that
    the class makes of other tensors."""
    of = {name: source.origins[name] for name in source.parameters}
    renamed = {name: o.keys[0] for name, o in of.items() if o.converter is None and o.keys[0] != name}
    return {"renamed": renamed, "converted": [name for name, o in of.items() if o.converter is not None]}
