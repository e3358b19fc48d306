"""Convert a checkpoint between packed and dense, block by block, without the original model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paredown.compress.checkpoint.hub import resolve
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import TensorFiles
from paredown.compress.checkpoint.writer import RECORD, CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.job import Format
from paredown.compress.model.blocks import Block, View, blocks
from paredown.compress.numerics.edits import Masked
from paredown.compress.numerics.masks import NofM, keep_mask
from paredown.compress.run.editor import EditedBlock
from paredown.compress.run.record import write_config
from paredown.compress.run.write import BlockChange, write_block, write_rest
from paredown.compress.storage.modules import PACKED, PackedConv1D, PackedExperts, PackedLinear
from paredown.compress.storage.spec import Spec
from paredown.evaluation.schema import ExportResult

PATTERN = NofM(2, 4)


def export(
    old: str | Path,
    out: str | Path,
    format: Format | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportResult:
    """Convert a checkpoint, a folder or hub id, into the folder `out`. Any checkpoint whose weights hold zeros can be packed.

    Without a format a packed checkpoint becomes dense, and any other packed. `progress` is called with (blocks done,
    blocks). Returns the bytes of the weights before and after.
    Raises PareError if the checkpoint cannot be read or converted; `out` then does not exist.
    """
    folder, revision = resolve(str(old))
    return export_source(ModelSource(folder, str(old), revision, stranded=True), Path(out), format, progress)


@torch.no_grad()
def export_source(
    source: ModelSource,
    out: Path,
    format: Format | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportResult:
    """As `export`, for a model that is open."""
    format = format or ("dense" if source.modules else "packed")
    if source.modules and format == "packed":
        raise PareError(f"{source.id} is packed already. Name another --format, or copy the folder.")
    added = [name for name, spec in source.modules.items() if spec.bias]
    if added:
        raise PareError(
            f"{added[0]} carries a bias that an ordinary {source.family} checkpoint cannot hold ({len(added)} in all): "
            "compress again with --set affine=false, or keep the packed checkpoint."
        )
    specs: dict[str, Spec] = {}
    layers: dict[str, dict[str, Any]] = {}
    all_blocks = blocks(source)
    with CheckpointWriter(out) as writer:
        for block in all_blocks:
            with source.loaded(block):
                if source.modules:
                    _write_unpacked(writer, source, block)
                else:
                    change = _packed_change(block, format, layers)
                    write_block(writer, source, block, change, format)
                    specs |= change.specs
            progress(block.index + 1, len(all_blocks))
        write_rest(writer, source, all_blocks, format)
        record = _old_record(source.folder)
        # our own checkpoints keep the record of the model that was compressed; for others it begins here
        record = {"model": source.provenance(), **record, "format": format, "layers": record.get("layers") or layers}
        writer.finish(record)
        write_config(writer, source, format, specs)
        writer.copy(source.companions())
        before = sum(entry.bytes for entry in TensorFiles(source.folder).entries.values())  # as they are on disk
        writer.commit()
    return {"model": source.id, "out": str(out), "format": format, "bytes": {"before": before, "after": writer.bytes}}


def _packed_change(block: Block, format: Format, layers: dict[str, dict[str, Any]]) -> BlockChange:
    """A block with its weights packed if their zeros make that smaller; `layers` gains an entry of the record for each."""
    edited = EditedBlock(block, format)
    for view in edited.views:
        if (edit := _mask_of(view)) is not None:
            edited.edits[view.name] = edit
            layers[view.name] = {"kept": edit.numbers / edit.keep.numel(), **edit.facts}
    return edited.change(tuned=False)


def _write_unpacked(writer: CheckpointWriter, source: ModelSource, block: Block) -> None:
    """Write all weights of a packed block dense, under the names of the family's own checkpoints."""
    modules = dict(block.module.named_modules())
    dense = {}
    for path, module in modules.items():
        if isinstance(module, PackedExperts):
            dense[block.prefix + path] = torch.stack([module[e] for e in range(len(module))])
        elif isinstance(module, PackedLinear | PackedConv1D):
            dense[f"{block.prefix}{path}.weight"] = module.weight
    parts = {f"{path}.{part}" for path, m in modules.items() if isinstance(m, PACKED) for part in m.parts}
    dense |= source.read(block.prefix + n for n in block.names if n not in parts)
    for name, tensor in source.checkpoint_names(dense).items():
        writer.add(name, tensor, kind="dense")
    writer.end_block()


def _mask_of(view: View) -> Masked | None:
    """The mask of a dense weight's nonzeros, or None if packing it would save nothing."""
    weight = view.weight
    nonzero = weight != 0  # (out, in)
    zeros = 1 - int(torch.count_nonzero(nonzero)) / nonzero.numel()
    if weight.shape[1] % 4 == 0 and int(nonzero.unflatten(-1, (-1, 4)).sum(-1).max()) <= 2:
        # every group stores two values: those with fewer nonzeros store zeros too
        return Masked(weight, keep_mask(weight.abs().float(), PATTERN), PATTERN)
    edit = Masked(weight, nonzero, min(zeros, 1 - 1e-9))
    return edit if edit.spec() is not None else None


def _old_record(folder: Path) -> dict[str, Any]:
    """What paredown.json says of the model and its layers; empty if another tool wrote the checkpoint."""
    path = folder / RECORD
    record = json.loads(path.read_text()) if path.exists() else {}
    return {key: value for key, value in record.items() if key not in ("tensors", "format_version")}
