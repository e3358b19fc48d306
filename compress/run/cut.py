"""One group of units of a block in memory: what a method reads of it, the tensors that stay, and its entry in the report."""

from typing import Any

import torch
from torch import Tensor

from paredown.compress.methods.base import Group, Sliced, Units
from paredown.compress.methods.structured.experts import Experts, ExpertStats
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.groups import sliced
from paredown.compress.model.merging import averaged
from paredown.compress.numerics.moments import Stats


def units_of(group: Group, block: Block, stats: Stats) -> Units:
    """A group with its matrices in `block`, which is in memory."""
    views = {v.stored_name: v for v in block.views()}
    written = [views[part.name] for part in group.parts if part.name in views]
    reader = next(v for v in written if v.name == group.reader)
    return Units(group, reader.weight, {v.name: v.weight for v in written if v is not reader}, stats)


def experts_of(group: Group, block: Block, stats: ExpertStats | None) -> Experts:
    """A group of experts with their matrices in `block`, which is in memory."""
    names = {part.name for part in group.parts}
    first = [v for v in block.views() if v.expert == 0 and v.owner in names]
    return Experts(group, {v.owner: v.whole for v in first}, stats)


def left_of(block: Block, group: Group, cut: Sliced, fitted: str = "") -> dict[str, Tensor]:
    """The tensors of a group without the units that go, by full name; that of the `fitted` name is not averaged."""
    own = block.module.state_dict()
    left: dict[str, Tensor] = {}
    for name in dict.fromkeys(part.name for part in group.parts):
        tensor, parts = own[name.removeprefix(block.prefix)], [p for p in group.parts if p.name == name]
        if cut.into is not None and name != fitted:
            tensor = averaged(tensor, parts, cut.into)
        left[name] = sliced(tensor, parts, cut.keep)
    return left


def tensors_of(block: Block, reader: View, group: Group, cut: Sliced) -> dict[str, Tensor]:
    """As `left_of`, with what else changes: the reader's weight and its bias."""
    changed, dtype = left_of(block, group, cut, reader.stored_name), reader.weight.dtype
    if cut.weight is not None:
        weight = cut.weight.to(dtype)
        changed[reader.stored_name] = weight.T.contiguous() if reader.layout == "conv1d" else weight
    if cut.shift is not None:
        bias = cut.shift if reader.bias is None else reader.bias.double() + cut.shift
        changed[f"{reader.name}.bias"] = bias.to(dtype)
    return changed


def record_of(method: str, units: Units, cut: Sliced, seconds: float) -> dict[str, Any]:
    """The entry of a group's reader in the report."""
    columns = cut.keep.repeat_interleave(units.width)  # (in,)
    removed = units.weight.to(torch.float64, copy=True)  # (out, in): what the output loses
    total = units.stats.inputs.energy(removed)
    removed[:, columns] = 0.0 if cut.weight is None else removed[:, columns] - cut.weight.double()
    lost = units.stats.inputs.energy(removed)
    if cut.shift is not None:
        shift = cut.shift.double()
        lost += float(shift.square().sum() - 2 * shift @ (removed @ units.stats.inputs.mean))
    error = max(lost, 0.0) / max(total, 1e-300) if cut.into is None else None  # of units that become one inputs are new
    return entry_of(units.group.reader, method, cut, error, seconds)


def entry_of(name: str, method: str, cut: Sliced, error: float | None, seconds: float) -> dict[str, Any]:
    """An entry of the report; the relative `error` is None where it is not known."""
    return {
        "name": name,
        "method": method,
        "kept": float(cut.keep.float().mean()),
        "relative_error": error,
        "damping": None,
        "seconds": seconds,
    }
