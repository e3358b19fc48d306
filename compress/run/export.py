"""Convert a checkpoint between packed and dense, block by block, without the original model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import TensorFiles
from paredown.compress.checkpoint.writer import RECORD, CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, View, blocks
from paredown.compress.numerics.edits import Masked
from paredown.compress.numerics.masks import NofM, keep_mask
from paredown.compress.run.write import Edited, Format, write_block, write_rest
from paredown.compress.storage.modules import PACKED, PackedConv1D, PackedExperts, PackedLinear

PATTERN = NofM(2, 4)


@torch.no_grad()
def export(
    source: ModelSource, out: Path, format: Format | None, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write `source` to `out` in `format`. Any checkpoint with zeros can be packed, whoever pruned it.

    Without a format, a packed checkpoint becomes dense, and any other packed.
    Returns bytes before and after. Raises PareError as the writer does.
    """
    format = format or ("dense" if source.modules else "packed")
    if source.modules and format == "packed":
        raise PareError(f"{source.id} is packed already. Name another --format, or copy the folder.")
    added = [name for name, spec in source.modules.items() if spec.get("bias")]
    if added:
        raise PareError(
            f"{added[0]} carries a bias that an ordinary {source.family} checkpoint cannot hold ({len(added)} in all): "
            "compress again with --set affine=false, or keep the packed checkpoint."
        )
    modules: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    all_blocks = blocks(source)
    with CheckpointWriter(out) as writer:
        for block in all_blocks:
            source.materialise(block.prefix, block.names)
            if source.modules:
                _write_unpacked(writer, source, block)
            else:
                edits = {v.name: edit for v in block.views() if (edit := _found_mask(v)) is not None}
                found += [_layer(name, edit) for name, edit in edits.items()]
                write_block(writer, source, block, Edited(block.views(), edits), format, modules)
            source.release(block.prefix, block.names)
            progress(block.index + 1, len(all_blocks))
        write_rest(writer, source, all_blocks, format)
        record = _old_record(source.folder)
        layers = record.get("layers") or {e["name"]: {"kept": e["kept"], "sparsity": e["sparsity"]} for e in found}
        # a checkpoint of ours keeps the record of the model that it was made of; others' begins here
        writer.finish({"model": source.provenance(), **record, "format": format, "layers": layers})
        write_config(writer, source, format, modules)
        writer.copy(source.companions())
        before = sum(entry.bytes for entry in TensorFiles(source.folder).entries.values())  # as they lie on disk
        writer.commit()
    return {"model": source.id, "out": str(out), "format": format, "bytes": {"before": before, "after": writer.bytes}}


def write_config(writer: CheckpointWriter, source: ModelSource, format: Format, modules: dict[str, Any]) -> None:
    """config.json of what was written: the family's own for dense weights, ours for packed ones."""
    if modules:
        config = transformers_plugin.packed_config(source.config, modules, source.verbatim)
    else:
        config = transformers_plugin.dense_config(source.config) if source.modules else source.config
    config.dtype = source.dtype
    config.save_pretrained(writer.folder)


def _write_unpacked(writer: CheckpointWriter, source: ModelSource, block: Block) -> None:
    """All weights of a block of a packed checkpoint, dense, under the names of the family's own checkpoints."""
    modules = dict(block.module.named_modules())
    dense = {}
    for path, module in modules.items():
        if isinstance(module, PackedExperts):
            dense[block.prefix + path] = torch.stack([module[e] for e in range(len(module))])
        elif isinstance(module, PackedLinear | PackedConv1D):
            dense[f"{block.prefix}{path}.weight"] = module.weight
    inside = tuple(f"{path}.{part}" for path, m in modules.items() if isinstance(m, PACKED) for part in m.parts)
    for name, tensor in source.read(block.prefix + n for n in block.names if n not in inside).items():
        dense[name] = tensor
    for name, tensor in source.checkpoint_names(dense).items():
        writer.add(name, tensor, kind="dense")
    writer.end_block()


def _found_mask(view: View) -> Masked | None:
    """The mask that the zeros of a dense weight tell, or None if packing it would not pay."""
    weight = view.weight
    nonzero = weight != 0  # (out, in)
    zeros = 1 - int(torch.count_nonzero(nonzero)) / nonzero.numel()
    if weight.shape[1] % 4 == 0 and int(nonzero.unflatten(-1, (-1, 4)).sum(-1).max()) <= 2:
        # groups with fewer than two nonzeros keep zeros, so that every group stores two
        return Masked(weight, keep_mask(weight.abs().float(), PATTERN), PATTERN)
    edit = Masked(weight, nonzero, min(zeros, 1 - 1e-9))
    return edit if edit.kind != "dense" else None


def _layer(name: str, edit: Masked) -> dict[str, Any]:
    sparsity = str(edit.sparsity) if isinstance(edit.sparsity, NofM) else edit.sparsity
    return {"name": name, "kept": edit.kept / edit.keep.numel(), "sparsity": sparsity}


def _old_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    record = json.loads(path.read_text()) if path.exists() else {}
    return {key: value for key, value in record.items() if key not in ("tensors", "format_version")}
