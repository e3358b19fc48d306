"""Check a written checkpoint: names, shapes, hashes, masks, sparsity, and its losses against those of the run."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import TensorFiles, sha256
from paredown.compress.checkpoint.writer import RECORD
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import View, blocks
from paredown.compress.numerics.masks import NofM, parse_sparsity
from paredown.compress.run.pipeline import score
from paredown.compress.storage import modules
from paredown.compress.storage.kinds import FORMAT_VERSION, stored_numbers
from paredown.compress.text.windows import Windows

# Another machine or thread count sums in another order. Measured in nats per token on the probe's window; where that is
# more, as many times what rounding to the model's dtype changes may come on top.
PROBE_TOLERANCE, ROUNDINGS = 0.02, 4


def verify(folder: Path) -> list[str]:
    """All faults of a checkpoint that paredown wrote, each naming its tensor; empty if it is sound."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, json.JSONDecodeError) as fault:
        raise PareError(f"{folder} has no readable {RECORD} ({fault}): it was not written by paredown.") from fault
    if record.get("format_version") != FORMAT_VERSION:
        raise PareError(f"{folder} has format {record.get('format_version')}; this paredown reads {FORMAT_VERSION}.")
    files = TensorFiles(folder)
    faults = list(_file_faults(files, record["tensors"]))
    if faults:  # what follows would only repeat them
        return faults
    try:
        source = ModelSource(folder, str(folder))
        faults = list(_mask_faults(source, record.get("layers", {})))
        # a model whose masks are damaged cannot be run
        return faults or list(_probe_faults(source, record.get("probe")))
    except PareError as fault:  # config.json speaks of other weights than these
        return [str(fault)]


def _file_faults(files: TensorFiles, wanted: dict[str, Any]) -> Iterator[str]:
    try:
        found = files.entries
    except PareError as fault:
        yield str(fault)
        return
    yield from (f"tensor {name!r} is missing" for name in sorted(set(wanted) - set(found)))
    yield from (f"tensor {name!r} is not in {RECORD}" for name in sorted(set(found) - set(wanted)))
    for name in sorted(set(wanted) & set(found)):
        entry, told = found[name], wanted[name]
        dtype = str(entry.dtype).removeprefix("torch.")
        if list(entry.shape) != told["shape"] or dtype != told["dtype"]:
            yield f"tensor {name!r} is {dtype} {list(entry.shape)}, written was {told['dtype']} {told['shape']}"
            continue
        try:
            tensor = files.read([name])[name]
        except PareError as fault:
            yield str(fault)
            continue
        if sha256(tensor) != told["sha256"]:
            yield f"tensor {name!r} has changed since it was written (sha256 differs)"


def _mask_faults(source: ModelSource, layers: dict[str, Any]) -> Iterator[str]:
    """Packed index data that means something, and every layer as sparse as the record says."""
    seen = set()
    for block in blocks(source):
        source.materialise(block.prefix, block.names)
        for path, module in block.module.named_modules():
            name = block.prefix + path
            if isinstance(module, modules.PACKED):
                if fault := module.fault():
                    yield f"{name}.{fault}"
                for layer in [n for n in layers if n == name or n.startswith(name + ".")]:
                    seen.add(layer)
                stored = stored_numbers(module.spec)
                if name in layers and round(layers[name]["kept"] * prod(module.spec["shape"])) != stored:
                    yield f"{name} stores {stored} numbers, the record says {layers[name]['kept']:.4f} of the dense ones"
        for view in block.views():
            if view.name in layers:
                seen.add(view.name)
                yield from _dense_faults(view, layers[view.name])
        source.release(block.prefix, block.names)
    yield from (f"layer {name!r} of the record is not in the model" for name in sorted(set(layers) - seen))


def _dense_faults(view: View, told: dict[str, Any]) -> Iterator[str]:
    if told.get("sparsity") is None:  # factors that were multiplied back
        return
    nonzero = view.weight != 0  # (out, in)
    if int(nonzero.sum()) > round(told["kept"] * nonzero.numel()):
        yield f"{view.name} holds {int(nonzero.sum())} nonzeros, more than the {told['kept']:.4f} that were kept"
    sparsity = parse_sparsity(told["sparsity"])
    if isinstance(sparsity, NofM):
        most = int(nonzero.unflatten(-1, (-1, sparsity.m)).sum(-1).max())
        if most > sparsity.n:
            yield f"{view.name} is not {sparsity}: a group holds {most} nonzeros"


def _probe_faults(source: ModelSource, probe: dict[str, Any] | None) -> Iterator[str]:
    if not probe:
        return
    ids, wanted = torch.tensor([probe["ids"]]), torch.tensor([probe["nll"]])
    found = _losses(source, ids)
    change = float((found - wanted).abs().mean())
    if change <= PROBE_TOLERANCE:
        return
    wide = ModelSource(source.folder, source.id, dtype=torch.float32)
    rounding = float((found - _losses(wide, ids)).abs().mean())
    if not change <= PROBE_TOLERANCE + ROUNDINGS * rounding:
        yield f"on the probe window the loss differs by {change:.4f} nats per token from the run that wrote it"


def _losses(source: ModelSource, ids: torch.Tensor) -> torch.Tensor:  # (1, length - 1)
    return score(source, [Windows(ids, "probe", "", "")], lambda done, total: None)[0]
