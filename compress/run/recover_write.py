"""Write a checkpoint that was recovered, or merged with an adapter: as it was, with other numbers."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import RECORD, CheckpointWriter
from paredown.compress.job import Format
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.run.record import finish
from paredown.compress.run.recorded import read_record
from paredown.compress.run.tokens import probe_tokens
from paredown.compress.run.write import BlockChange, write_block, write_rest
from paredown.compress.storage.modules import PACKED


def write_recovered(
    writer: CheckpointWriter, source: ModelSource, trained: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """All files but the report. `trained` are weights and parts of packed weights by name; all others are as in `source`."""
    write_changed(writer, source, lambda block: trained, trained, record)


def write_changed(
    writer: CheckpointWriter,
    source: ModelSource,
    changed: Callable[[Block], Mapping[str, Tensor]],
    outside: Mapping[str, Tensor],
    record: Mapping[str, Any],
) -> None:
    """As `write_recovered`; what is `changed` in a block is asked for when it is written. `outside`: what is, of all else."""
    all_blocks, format = blocks(source), format_of(source)
    for block in all_blocks:
        write_block(writer, source, block, _change(block, source, changed(block)), format)
    write_rest(writer, source, all_blocks, format, outside)
    finish(writer, source, format, source.modules, record)


def carried_record(source: ModelSource, tokenizer: Any) -> dict[str, Any]:
    """What paredown.json says of the model and its compression, without what is written anew with every checkpoint."""
    record: dict[str, Any] = {
        "model": source.provenance(),
        "format": format_of(source),
        "tied": source.tied,
        "tokenizer": probe_tokens(tokenizer),
    }
    if (source.folder / RECORD).exists():
        old = {**read_record(source.folder)}
        record |= {key: old[key] for key in old if key not in ("tensors", "format_version", "probe", "files")}
    return record


def format_of(source: ModelSource) -> Format:
    return "packed" if source.packed else "dense"


def add_probe(writer: CheckpointWriter, ids: Tensor, nll: Tensor) -> None:
    """Put the losses (1, length - 1) of ids (1, length) into the record, which `verify` compares."""
    record = json.loads((writer.folder / RECORD).read_text(encoding="utf-8"))
    writer.write_json(RECORD, {**record, "probe": {"ids": ids[0].tolist(), "nll": nll[0].tolist()}})


def _change(block: Block, source: ModelSource, trained: Mapping[str, Tensor]) -> BlockChange:
    """What training changed in a block, with the other parts of its packed weights."""
    packed: dict[str, dict[str, Tensor]] = {}
    for path, module in block.module.named_modules():
        if isinstance(module, PACKED):
            names = {part: f"{block.prefix}{path}.{part}" for part in module.parts}
            stored = source.read(name for name in names.values() if name not in trained)
            packed[block.prefix + path] = {part: {**stored, **trained}[name] for part, name in names.items()}
    parts = frozenset(f"{layer}.{part}" for layer, tensors in packed.items() for part in tensors)
    dense = {name: t for name, t in trained.items() if name.startswith(block.prefix) and name not in parts}
    specs = {name: source.modules[name] for name in packed}
    return BlockChange(dense, specs, packed, parts)
