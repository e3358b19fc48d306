"""One group of units of a block in memory: what a method reads of it, the tensors that stay, and its entry in the report."""

from typing import Any

from torch import Tensor

from paredown.compress.methods.base import Group, Sliced, Units
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


def tensors_of(block: Block, reader: View, group: Group, cut: Sliced) -> dict[str, Tensor]:
    """The tensors of a group without the units that go, by full name."""
    own = block.module.state_dict()
    changed: dict[str, Tensor] = {}
    for name in dict.fromkeys(part.name for part in group.parts):
        tensor, parts = own[name.removeprefix(block.prefix)], [p for p in group.parts if p.name == name]
        if cut.into is not None and name != reader.stored_name:
            tensor = averaged(tensor, parts, cut.into)
        changed[name] = sliced(tensor, parts, cut.keep)
    dtype = reader.weight.dtype
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
    removed = units.weight.double()  # (out, in): what the output loses
    total = units.stats.inputs.energy(removed)
    removed[:, columns] -= removed[:, columns] if cut.weight is None else cut.weight.double()
    lost = units.stats.inputs.energy(removed)
    if cut.shift is not None:
        shift = cut.shift.double()
        lost += float(shift.square().sum() - 2 * shift @ (removed @ units.stats.inputs.mean))
    return {
        "name": units.group.reader,
        "method": method,
        "kept": float(cut.keep.float().mean()),
        # of units that become one the inputs are new ones
        "relative_error": max(lost, 0.0) / max(total, 1e-300) if cut.into is None else None,
        "damping": None,
        "seconds": seconds,
    }
