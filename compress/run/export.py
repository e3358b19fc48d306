"""Convert a checkpoint between packed and dense, block by block, without the original model."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paredown.compress.checkpoint.hub import load_tokenizer, resolve
from paredown.compress.checkpoint.origins import reverted
from paredown.compress.checkpoint.remote_code import check_packed
from paredown.compress.checkpoint.skeleton import skeleton
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import TensorFiles
from paredown.compress.checkpoint.transformers_plugin import dense_config
from paredown.compress.checkpoint.writer import RECORD, CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.job import Format
from paredown.compress.model.blocks import Block, View, blocks
from paredown.compress.numerics.edits import Masked
from paredown.compress.numerics.masks import NofM, keep_mask
from paredown.compress.run.biases import dense_form
from paredown.compress.run.editor import EditedBlock
from paredown.compress.run.export_deci import write_deci
from paredown.compress.run.export_engine import write_for_engine
from paredown.compress.run.record import finish
from paredown.compress.run.recorded import read_record
from paredown.compress.run.tokens import probe_tokens
from paredown.compress.run.write import (
    BlockChange,
    add_dense,
    names_in_files,
    write_block,
    write_rest,
    write_verbatim,
)
from paredown.compress.serving.engines import engines
from paredown.compress.storage.modules import PACKED, PackedConv1D, PackedExperts, PackedLinear
from paredown.compress.storage.spec import Spec
from paredown.evaluation.card import CARD, export_card
from paredown.evaluation.schema import BytesChange, ExportFormat, ExportResult

PATTERN = NofM(2, 4)


def export(
    old: str | Path,
    out: str | Path,
    format: ExportFormat | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    remote_code: bool = False,
) -> ExportResult:
    """Convert a checkpoint, a folder or hub id, into the folder `out`. Any checkpoint whose weights hold zeros can be packed.

    Without a format a packed checkpoint becomes dense, and any other packed. `deci` is for engines: a Llama whose blocks may
    have sizes of their own, see export_deci.py. `gguf` is one file for llama.cpp, `onnx` a graph for onnxruntime. `progress`
    is called with (blocks done, blocks). `remote_code`: as of `compress`. Returns the bytes of the weights before and after.
    Raises PareError if the checkpoint cannot be read or converted; `out` then does not exist.
    """
    folder, revision = resolve(str(old))
    return export_source(
        ModelSource(folder, str(old), revision, stranded=True), Path(out), format, progress, remote_code
    )


@torch.no_grad()
def export_source(
    source: ModelSource,
    out: Path,
    format: ExportFormat | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    remote_code: bool = False,
) -> ExportResult:
    """As `export`, for a model that is open."""
    format = format or ("dense" if source.packed else "packed")
    if remote_code:
        check_packed(format)
    if source.packed and format == "packed":
        raise PareError(f"{source.id} is packed already. Name another --format, or copy the folder.")
    if source.shapes and format == "dense":
        raise PareError(
            f"the blocks of {source.id} have sizes of their own, which no config of an ordinary {source.family} checkpoint "
            "says. Keep it packed; of a Llama, --format deci is read by vLLM."
        )
    # our own checkpoints keep the record of the model that was compressed; for others it begins here
    record = {"model": source.provenance(), **_old_record(source), "format": format}
    after = 0  # bytes of what is no tensor file
    specs: Mapping[str, Spec] = {}
    with CheckpointWriter(out, remote_code=remote_code) as writer:
        if format == "deci":
            write_deci(source, writer, record, progress)
        elif format == "gguf" or format == "onnx":
            # a graph is in float32: what a packed weight is the sum of is not rounded on the way
            read = replace(source, dtype=torch.float32) if format == "onnx" else source
            plain = partial(export_source, read, progress=progress)
            after = write_for_engine(source, writer, format, record, plain)
        else:
            specs = _write(source, writer, format, record, progress)
        before = sum(entry.bytes for entry in TensorFiles(source.folder).entries.values())  # as they are on disk
        sizes: BytesChange = {"before": before, "after": after or writer.bytes}
        form = "dense" if format == "packed" and not specs else format  # where there was nothing to pack
        taken = dict(engines(form, specs.values(), bool(source.shapes)))
        result: ExportResult = {
            "model": source.id, "out": str(out), "format": format, "engines": taken, "bytes": sizes,
        }  # fmt: skip
        writer.write_text(CARD, export_card(source.folder, result, record))
        writer.commit()
    return result


def _write(
    source: ModelSource,
    writer: CheckpointWriter,
    format: Format,
    record: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> dict[str, Spec]:
    """Write the whole checkpoint, packed or dense, but for the commit; `record` goes into paredown.json.

    Returns how weights are stored that are packed, by name.
    """
    config, biases = dense_form(source)
    family = (
        skeleton(dense_config(source.config), {}, source.dtype or torch.float32) if source.modules else source.model
    )
    specs: dict[str, Spec] = {}
    layers: dict[str, dict[str, Any]] = {}
    all_blocks = blocks(source)
    for block in all_blocks:
        with source.loaded(block):
            if source.modules:
                _write_unpacked(writer, source, block, biases, family, record)
            else:
                change = _packed_change(block, format, layers)
                write_block(writer, source, block, change, format)
                specs |= change.specs
        progress(block.index + 1, len(all_blocks))
    if source.modules:
        _write_rest_unpacked(writer, source, all_blocks, family, record)
    else:
        write_rest(writer, source, all_blocks, format)
    names = {} if source.modules else names_in_files(source)
    record = {**record, **names, "layers": record.get("layers") or layers}
    finish(writer, source, format, specs, record, config)
    return specs


def _packed_change(block: Block, format: Format, layers: dict[str, dict[str, Any]]) -> BlockChange:
    """A block with its weights packed if their zeros make that smaller; `layers` gains an entry of the record for each."""
    edited = EditedBlock(block, format)
    for view in edited.views:
        if (edit := _mask_of(view)) is not None:
            edited.edits[view.name] = edit
            layers[view.name] = {"kept": edit.numbers / edit.keep.numel(), **edit.facts}
    return edited.change(tuned=False)


def _write_unpacked(
    writer: CheckpointWriter,
    source: ModelSource,
    block: Block,
    biases: Mapping[str, Tensor],
    family: Any,
    record: Mapping[str, Any],
) -> None:
    """Write all weights of a packed block dense, under the names of the family's own checkpoints.

    `biases` of the dense model that the packed one has not, by full name, are zeros.
    """
    modules = dict(block.module.named_modules())
    dense = {}
    for path, module in modules.items():
        if isinstance(module, PackedExperts):
            dense[block.prefix + path] = module.whole()
        elif isinstance(module, PackedLinear | PackedConv1D):
            dense[f"{block.prefix}{path}.weight"] = module.weight
    parts = {f"{path}.{part}" for path, m in modules.items() if isinstance(m, PACKED) for part in m.parts}
    own = [n for n in block.names if n not in parts and block.prefix + n in source.parameters]  # tied ones once
    dense |= source.read(block.prefix + n for n in own)
    for name, bias in biases.items():
        if name.startswith(block.prefix) and name not in dense:
            dense[name] = torch.zeros(bias.shape, dtype=source.dtype)
    add_dense(writer, _as_in_files(family, dense, record))
    writer.end_block()


def _write_rest_unpacked(
    writer: CheckpointWriter, source: ModelSource, all_blocks: Sequence[Block], family: Any, record: Mapping[str, Any]
) -> None:
    """Write what lies outside the blocks of a packed model, under the names of the family's own checkpoints."""
    inside = tuple(block.prefix for block in all_blocks)
    together: dict[str, list[str]] = {}  # what files may hold as one tensor lies in one layer
    for name in source.parameters:
        if not name.startswith(inside):
            layer = re.match(r"(.*\.\d+)\.", name)
            whole = name in record.get("converted", [name])
            together.setdefault(layer[1] if layer else name.rsplit(".", 2)[0] if whole else name, []).append(name)
    for names in together.values():
        add_dense(writer, _as_in_files(family, source.read(names), record))
        writer.end_block()
    write_verbatim(writer, source)


def _as_in_files(family: Any, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a packed model under the names, and in the layout, that the files of its family have for them.

    `family` is the dense model without weights.
    """
    converted = set(record.get("converted", weights))  # a checkpoint of another version of paredown does not say
    renamed = dict(record.get("renamed", {}))
    for bias in (name for name in weights if name.endswith(".bias") and name not in renamed):  # one that was added
        weight = renamed.get(f"{bias.removesuffix('bias')}weight", "")
        renamed |= {bias: f"{weight.removesuffix('weight')}bias"} if weight else {}
    stored = {renamed.get(name, name): tensor for name, tensor in weights.items() if name not in converted}
    rest = {name: tensor for name, tensor in weights.items() if name in converted}
    return stored | reverted(family, rest, None) if rest else stored


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


def _old_record(source: ModelSource) -> dict[str, Any]:
    """What paredown.json says of the model and its layers; of another tool's checkpoint only what its tokenizer says."""
    if not (source.folder / RECORD).exists():
        return {"tokenizer": _tokens(source.folder)}
    return {key: value for key, value in read_record(source.folder).items() if key not in ("tensors", "format_version")}


def _tokens(folder: Path) -> dict[str, list[int]]:
    """What its tokenizer gives for a few texts; nothing for a model that has none."""
    try:
        return probe_tokens(load_tokenizer(folder))
    except PareError:
        return {}
