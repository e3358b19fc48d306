"""Hand the tensors of a smaller model to the writer: under the names that its family's files have, or, in our packed format,
under those of the model class."""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.model.blocks import Block
from paredown.compress.model.reshape import Reshaped, in_files
from paredown.compress.run.write import add_dense, outside


def write_block(
    writer: CheckpointWriter,
    source: ModelSource,
    block: Block,
    target: Block,
    small: Reshaped,
    changed: Collection[str] | None,
) -> None:
    """Write `target`, made of the source's `block`; `changed` are full names in that block, None all.

    What has not changed is written as it was stored.
    """
    made = {block.prefix + name: tensor for name, tensor in target.module.state_dict().items()}
    own = [name for name in made if name in source.parameters]  # tied ones once
    values = {name: made[name] for name in own if changed is None or name in changed}
    if small.shapes:
        _add(writer, source, small, {**source.read(name for name in own if name not in values), **values})
    else:
        _add(writer, source, small, dict(source.as_stored(own, values)))
    for name in made.keys() - set(own) - source.tied.keys():  # a bias that the dense model does not have
        writer.add(target.prefix + name.removeprefix(block.prefix), made[name], kind="dense")
    writer.end_block()


def write_rest(writer: CheckpointWriter, source: ModelSource, all_blocks: Sequence[Block], small: Reshaped) -> None:
    """Write what lies outside the blocks as it was stored, and what the model class does not know but for removed blocks."""
    for tensors in outside(source, all_blocks, "packed" if small.shapes else "dense"):
        _add(writer, source, small, tensors)
        writer.end_block()
    unknown = [key for key in source.verbatim if key not in small.dropped_verbatim]
    for key, tensor in source.files.read(unknown, finite=False).items():
        if (new := in_files(source, small, key)) is not None:
            writer.add(new, tensor, kind="verbatim")


def _add(writer: CheckpointWriter, source: ModelSource, small: Reshaped, tensors: Mapping[str, Tensor]) -> None:
    new = {name: small.renamed(name) if small.shapes else in_files(source, small, name) for name in tensors}
    named = ((new[name], tensor) for name, tensor in tensors.items())
    add_dense(writer, {name: tensor for name, tensor in named if name is not None})
