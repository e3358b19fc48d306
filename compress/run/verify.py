"""Check a written checkpoint: names, shapes, hashes, masks, sparsity, files, tokens, and its losses as users load it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch

from paredown.compress.checkpoint.companions import file_sha256
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import TensorFiles, sha256
from paredown.compress.checkpoint.writer import RECORD
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, View, blocks
from paredown.compress.numerics.masks import NofM, parse_sparsity
from paredown.compress.progress import logger
from paredown.compress.run.loaded import CannotLoad, NoRoom, loaded_losses
from paredown.compress.run.recorded import Record, read_record
from paredown.compress.run.scoring import score
from paredown.compress.run.tokens import token_faults
from paredown.compress.storage.kinds import stored_numbers
from paredown.compress.storage.modules import PACKED
from paredown.compress.text.windows import Windows

# Another machine or number of threads adds in another order, so losses differ a little. On the probe's window they may
# differ by PROBE_TOLERANCE nats per token, and by ROUNDINGS times what rounding to the model's dtype changes on top of it.
PROBE_TOLERANCE, ROUNDINGS = 0.02, 4


def verify(
    folder: str | Path,
    note: Callable[[str], None] = logger.info,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """All faults of a checkpoint that paredown wrote, a sentence each that names the tensor or file; empty if it is sound.

    `note` is called with a sentence on what could not be checked on this machine, `progress` with (tensors read, tensors).
    Raises PareError for a folder that paredown did not write, or whose paredown.json is damaged.
    """
    folder = Path(folder)
    record = read_record(folder)
    tensors = _tensor_faults(TensorFiles(folder), record["tensors"], progress) if record["tensors"] else ()
    faults = [*tensors, *_file_faults(folder, record.get("files", {}))]
    if faults:  # further checks would only repeat them
        return faults
    if record.get("format") in ("deci", "gguf", "onnx"):
        note(f"{folder} is for other engines, and is not loaded: tensors and files are those that were written")
        return []
    try:
        source = ModelSource(folder, str(folder))
        faults = [*_mask_faults(source, record.get("layers", {})), *token_faults(folder, record.get("tokenizer", {}))]
        # a model with damaged masks cannot be run
        return faults or list(_run_faults(source, record, note))
    except PareError as fault:  # config.json describes other weights than these
        return [str(fault)]


def _file_faults(folder: Path, recorded: Mapping[str, str]) -> Iterator[str]:
    """Files beside the weights that are missing or have changed."""
    for name, digest in recorded.items():
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            yield f"file {name!r} of {RECORD} would lie outside the folder"
            continue
        try:
            found = file_sha256(folder / name)
        except (OSError, ValueError):
            yield f"file {name!r} is missing or cannot be read"
            continue
        if found != digest:
            yield f"file {name!r} has changed since it was written (sha256 differs)"


def _tensor_faults(files: TensorFiles, recorded: dict[str, Any], progress: Callable[[int, int], None]) -> Iterator[str]:
    """Tensors that are missing, unknown, or not as they were recorded."""
    try:
        stored = files.entries
    except PareError as fault:
        yield str(fault)
        return
    yield from (f"tensor {name!r} is missing" for name in sorted(set(recorded) - set(stored)))
    yield from (f"tensor {name!r} is not in {RECORD}" for name in sorted(set(stored) - set(recorded)))
    for n, name in enumerate(sorted(set(recorded) & set(stored))):
        progress(n, len(recorded))
        entry, written = stored[name], recorded[name]
        dtype = str(entry.dtype).removeprefix("torch.")
        if list(entry.shape) != written["shape"] or dtype != written["dtype"]:
            yield f"tensor {name!r} is {dtype} {list(entry.shape)}, written was {written['dtype']} {written['shape']}"
            continue
        try:
            # what the model class does not know may hold anything, such as the -inf of an old mask
            tensor = files.read([name], finite=written.get("kind") != "verbatim")[name]
        except PareError as fault:
            yield str(fault)
            continue
        if sha256(tensor) != written["sha256"]:
            yield f"tensor {name!r} has changed since it was written (sha256 differs)"


def _mask_faults(source: ModelSource, layers: dict[str, Any]) -> Iterator[str]:
    """Packed index data that is damaged, and layers that are not as sparse as the record says."""
    seen: set[str] = set()
    for block in blocks(source):
        with source.loaded(block):
            yield from _block_faults(block, layers, seen)
    yield from (f"layer {name!r} of the record is not in the model" for name in sorted(set(layers) - seen))


def _block_faults(block: Block, layers: dict[str, Any], seen: set[str]) -> Iterator[str]:
    """The same for one block in memory; `seen` gains the layers of the record that it holds."""
    for path, module in block.module.named_modules():
        name = block.prefix + path
        seen |= {name} & layers.keys()  # a mixture that lost experts, or a layer
        if isinstance(module, PACKED):
            if fault := module.fault():
                yield f"{name}.{fault}"
            for layer in [n for n in layers if n == name or n.startswith(name + ".")]:
                seen.add(layer)
            stored = stored_numbers(module.spec)
            if name in layers and round(layers[name]["kept"] * module.spec.size) != stored:
                yield f"{name} stores {stored} numbers, the record says {layers[name]['kept']:.4f} of the dense ones"
    for view in block.views():
        if view.name in layers:
            seen.add(view.name)
            yield from _dense_faults(view, layers[view.name])


def _dense_faults(view: View, recorded: dict[str, Any]) -> Iterator[str]:
    """A pruned weight, stored dense, that holds more nonzeros than recorded."""
    if recorded.get("sparsity") is None:  # factors that were multiplied back
        return
    nonzero = view.weight != 0  # (out, in)
    if int(nonzero.sum()) > round(recorded["kept"] * nonzero.numel()):
        yield f"{view.name} holds {int(nonzero.sum())} nonzeros, more than the {recorded['kept']:.4f} that were kept"
    sparsity = parse_sparsity(recorded["sparsity"])
    if isinstance(sparsity, NofM):
        most = int(nonzero.unflatten(-1, (-1, sparsity.m)).sum(-1).max())
        if most > sparsity.n:
            yield f"{view.name} is not {sparsity}: a group holds {most} nonzeros"


def _run_faults(source: ModelSource, record: Record, note: Callable[[str], None]) -> Iterator[str]:
    """A model that does not load as its users load it, and losses that differ from the recorded ones."""
    probe = record.get("probe") or {"ids": [0, 0]}
    ids = torch.tensor([probe["ids"]])
    if int(ids.max()) >= int(source.config.get_text_config().vocab_size):
        yield f"the probe of {RECORD} holds tokens that the model does not know"
        return
    try:
        losses = loaded_losses(source, ids, record.get("tied", source.tied))
    except CannotLoad as fault:
        yield str(fault)
        return
    except NoRoom as fault:
        note(f"not loaded by from_pretrained, and read block by block instead: {fault}")
        losses = _losses(source, ids)
    if "nll" in probe:
        yield from _probe_faults(source, losses, ids, probe["nll"])


def _probe_faults(source: ModelSource, losses: torch.Tensor, ids: torch.Tensor, recorded: list[float]) -> Iterator[str]:
    """Losses (1, length - 1) that differ from the recorded ones by more than rounding explains."""
    change = float((losses - torch.tensor([recorded])).abs().mean())
    if change <= PROBE_TOLERANCE:
        return
    wide = ModelSource(source.folder, source.id, dtype=torch.float32)
    rounding = float((_losses(source, ids) - _losses(wide, ids)).abs().mean())
    if not change <= PROBE_TOLERANCE + ROUNDINGS * rounding:
        yield f"on the probe window the loss differs by {change:.4f} nats per token from the run that wrote it"


def _losses(source: ModelSource, ids: torch.Tensor) -> torch.Tensor:  # (1, length - 1)
    return score(source, [Windows(ids, "probe", "", "")], lambda done, total: None)[0]
