"""One group of units of a block in memory: what a method reads of it, the tensors that stay, and its entry in the report."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paredown.compress.checkpoint.source import set_tensor
from paredown.compress.methods.base import Group, Part, Sliced, Units
from paredown.compress.methods.structured.experts import Experts, ExpertStats, Fit, Merged
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.groups import sliced
from paredown.compress.model.merging import averaged, by_unit, reordered
from paredown.compress.model.stream import Stream
from paredown.compress.survey.expert_fit import ExpertFit


def experts_of(group: Group, block: Block, stats: ExpertStats | None) -> Experts:
    """A group of experts with their matrices in `block`, which is in memory."""
    names = {part.name for part in group.parts}
    first = [v for v in block.views() if v.expert == 0 and v.owner in names]
    return Experts(group, {v.owner: v.whole for v in first}, stats, _channels(group, block))


def _channels(group: Group, block: Block) -> list[Tensor]:
    """What each hidden channel of an expert has in each part of `inner` (experts, channels, ...)."""
    own, found = block.module.state_dict(), []
    for part in group.inner:
        tensor, last = own[part.name.removeprefix(block.prefix)], group.inner[-1]
        channels = own[last.name.removeprefix(block.prefix)].shape[last.dim]
        found.append(by_unit(tensor, part, channels).movedim(part.dim, 1))
    return found


def left_of(block: Block, group: Group, cut: Sliced, fitted: str = "") -> dict[str, Tensor]:
    """The tensors of a group without the units that go, by full name; that of the `fitted` name is not averaged."""
    own = block.module.state_dict()
    left: dict[str, Tensor] = {}
    for name in dict.fromkeys(part.name for part in group.parts):
        tensor, parts = own[name.removeprefix(block.prefix)], [p for p in group.parts if p.name == name]
        if isinstance(cut, Merged):
            tensor = _merged(tensor, parts, group, cut)
        elif cut.into is not None and name != fitted:
            tensor = averaged(tensor, parts, cut.into)
        left[name] = sliced(tensor, parts, cut.keep)
    return left


def fit_experts(
    fit: Fit, block: Block, target: Block, group: Group, changed: dict[str, Tensor], stream: Stream, told: list[str]
) -> float | None:
    """Fit the last matrices of the experts that stay, in `changed`: the tensors of `target` that are not those of `block`.

    Returns the relative square error that is left of the experts' output. Where they cannot be fitted, it is None, and `told`
    gains a sentence.
    """
    own = block.module.state_dict()
    for name in target.module.state_dict():
        full = block.prefix + name
        set_tensor(target.module, name, changed[full] if full in changed else own[name])
    fitting = ExpertFit(block, target, group)
    found = fitting.fitted(stream, fit)
    if found is None:
        told.append(f"{group.name}: what its experts are given cannot be seen, so that those that stay are not fitted")
        return None
    for view, weight in zip(fitting.views, found.weights, strict=True):
        view.assign(weight)  # in the tensor that `changed` holds
    return found.after


def _merged(tensor: Tensor, parts: Sequence[Part], group: Group, cut: Merged) -> Tensor:
    """One tensor of a group with experts merged; that of a router, which lies elsewhere than the experts, is left alone."""
    assert cut.into is not None
    name = parts[0].name
    if name.rpartition(".")[0] != group.inner[-1].name.rpartition(".")[0]:
        return tensor
    inner = [part for part in group.inner if part.name == name]
    return averaged(reordered(tensor, inner, cut.order), parts, cut.into, cut.weights)


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
