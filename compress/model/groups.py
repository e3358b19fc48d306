"""Coupled units of a block, found by trying how it uses its weights: no family's names are known here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from paredown.compress.methods.base import Group, Part, Units
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.stream import Stream
from paredown.compress.model.trial import Module32, Trial
from paredown.compress.numerics.moments import InputStats, Stats

FUSED = 4  # a writer holds the units at most so many times
EXACT = 1e-4  # what permuting all parts may change, beside what permuting the reader alone changes
VISIBLE = 1e-5  # the least that permuting the reader alone changes, beside the whole output
SEED = 1


@torch.no_grad()
def channel_groups(stream: Stream, block: Block) -> list[Group]:
    """Groups of MLP channels of a block, whose weights are in memory, in the order in which it uses them; [] if it has none.

    Writers are linear layers that give each channel, readers those that read it. What is called a group has passed these
    trials on the first batch of the `stream`, which does not move:
    - the reader's input at a token is made of the writers' outputs at that token, and of nothing else;
    - it is not linear in a single writer's output, and what that part of the block gives is linear in the reader's: else
      they are the factors of one matrix, or lie on the way to something else, such as queries. A reader that is the last
      layer of the whole block may be followed by a norm;
    - the output stays as it is where all parts are permuted alike, and does not where the reader's are alone.
    `config_key` is "" in all of them: see `with_keys`.
    """
    trial = Trial.of(stream, block)
    ordinary = {trial.path(v): v for v in block.views() if v.expert is None and v.control is None}
    views = [ordinary[path] for path in trial.outputs if path in ordinary]  # in the order in which they are called
    found = (_group_of(trial, views[:i], reader) for i, reader in enumerate(views))
    return [group for group in found if group is not None and holds(stream, block, group)]


def units_of(group: Group, block: Block, stats: Stats, inputs: Mapping[str, InputStats] | None = None) -> Units:
    """A group with its matrices in `block`, which is in memory; `inputs` of its writers, by view name."""
    views = {v.stored_name: v for v in block.views()}
    written = [views[part.name] for part in group.parts if part.name in views]
    reader = next(v for v in written if v.name == group.reader)
    return Units(group, reader.weight, {v.name: v.weight for v in written if v is not reader}, stats, inputs or {})


def sliced(tensor: Tensor, parts: Sequence[Part], keep: Tensor) -> Tensor:
    """A parameter without the units that go.

    `parts` are those of this parameter, `keep` (units,) bool; entries outside of all parts stay.
    """
    for dim in sorted({part.dim for part in parts}):
        stay = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
        for part in parts:
            if part.dim == dim:
                entries = keep.to(tensor.device).repeat_interleave(part.width)
                stay[part.first : part.first + len(entries)] = entries
        tensor = tensor.index_select(dim, stay.nonzero()[:, 0])
    return tensor.contiguous()


def _group_of(trial: Trial, before: Sequence[View], reader: View) -> Group | None:
    """The channels that this layer reads, if it reads channels; `before` are the layers called before it."""
    for path, writers in _writers(trial, before, reader):
        if trial.made_of(path, writers, reader):
            if not trial.added(reader) and (path or trial.path(reader) != list(trial.outputs)[-1]):
                return None
            module = Module32(trial, path)
            if _factors(module, writers, reader):
                return None
            parts = next((p for p in _layouts(module, writers, reader) if coupled(module, p, reader.shape[1])), None)
            if parts is None:
                return None
            named = tuple(replace(part, name=trial.block.prefix + _joined(path, part.name)) for part in parts)
            name = (trial.block.prefix + path).rstrip(".")
            return Group(name, "channels", reader.shape[1], named, reader.name, "")
    return None


def _writers(trial: Trial, before: Sequence[View], reader: View) -> Iterator[tuple[str, list[View]]]:
    """The layers called last before the reader that may write its channels, more and more of them.

    With each the path of the module that holds them and the reader: the nearest one in which there are any.
    """
    units, path = reader.shape[1], trial.path(reader)
    while path:
        path = path.rpartition(".")[0]
        inside = [v for v in before if trial.path(v).startswith(f"{path}." if path else "")]
        writers = [v for v in inside if v.shape[0] % units == 0 and v.shape[0] <= FUSED * units]
        if writers and path in trial.calls:
            yield from ((path, writers[-n:]) for n in range(1, len(writers) + 1))
            return


def _factors(module: Module32, writers: Sequence[View], reader: View) -> bool:
    """Whether the reader's input is linear in the only writer's output: both are the factors of one matrix."""
    if len(writers) > 1 or writers[0].shape[0] > reader.shape[1]:
        return False
    weights = {name: -2 * module.tensors[name] for name in own_names(module, writers[0]) if name in module.tensors}
    name = own_names(module, reader)[0]
    output = module.output()
    change = module.output({name: module.tensors[name].flip(0)}) - output
    error = module.output({**weights, name: module.tensors[name] / -2}) - output
    return bool(error.norm() <= EXACT * change.norm())


def _layouts(module: Module32, writers: Sequence[View], reader: View) -> Iterator[tuple[Part, ...]]:
    """Where the channels may lie, by parameters' names within the module; the reader's part is the last one.

    A writer may hold them several times: one copy after another, or interleaved. Beside its writers' biases other
    parameters of the module may have an entry for each channel.
    """
    units = reader.shape[1]
    last = Part(own_names(module, reader)[0], 0 if reader.layout == "conv1d" else 1)
    known = {name for v in [*writers, reader] for name in own_names(module, v)}
    others = [
        _copies(name, 0, units, tensor.shape[0])
        for name, tensor in module.tensors.items()
        if name in module.parameters - known
        and tensor.dim() == 1
        and tensor.shape[0] in range(units, FUSED * units + 1, units)
    ]
    further = [(), tuple(part for parts in others for part in parts), *(others if len(others) > 1 else ())]
    for more in further if others else further[:1]:
        for choice in product(*(_written(module, v, units) for v in writers)):
            yield (*(part for parts in choice for part in parts), *more, last)


def _written(module: Module32, writer: View, units: int) -> list[tuple[Part, ...]]:
    """The ways in which a writer's weight and bias may hold the channels."""
    copies = writer.shape[0] // units
    weight, bias = own_names(module, writer)
    dims = {weight: 1 if writer.layout == "conv1d" else 0, bias: 0}
    dims = {name: dim for name, dim in dims.items() if name in module.tensors}
    ways = [tuple(p for name, dim in dims.items() for p in _copies(name, dim, units, writer.shape[0]))]
    return ways + [tuple(Part(name, dim, copies) for name, dim in dims.items())] * (copies > 1)


def _copies(name: str, dim: int, units: int, size: int) -> tuple[Part, ...]:
    return tuple(Part(name, dim, first=first) for first in range(0, size, units))


def coupled(module: Module32, parts: Sequence[Part], units: int) -> bool:
    """Whether the module gives the same where all parts are permuted alike, but not where the last one, the reader's, is."""
    output = module.output()
    every, alone = (module.output(_permuted(module.tensors, p, units)) - output for p in (parts, parts[-1:]))
    return bool(every.norm() <= EXACT * alone.norm() and alone.norm() > VISIBLE * output.norm())


def holds(stream: Stream, block: Block, group: Group) -> bool:
    """Whether the whole block, in its own dtype, gives the same with all parts permuted, but for what rounding hides."""
    own = {block.prefix + name: tensor for name, tensor in block.module.state_dict().items()}
    hidden = stream.hidden[0].to(stream.device)

    def output(parts: Sequence[Part]) -> Tensor:
        changed = _permuted(own, parts, group.units)
        inside = {name.removeprefix(block.prefix): tensor for name, tensor in changed.items()}
        return stream.call(block, 0, hidden.clone(), inside).float()

    before = output(())
    every, alone = output(group.parts) - before, output(group.parts[-1:]) - before
    rounding = 4 * torch.finfo(hidden.dtype).eps * before.norm()
    return bool(every.norm() <= alone.norm() / 2 + rounding)


def _permuted(tensors: Mapping[str, Tensor], parts: Sequence[Part], units: int) -> dict[str, Tensor]:
    """The tensors of these parts, with the units in another order."""
    cycle = torch.randperm(units, generator=torch.Generator().manual_seed(SEED))
    order = torch.empty_like(cycle)
    order[cycle] = cycle.roll(1)  # no unit stays where it was, however few there are
    changed: dict[str, Tensor] = {}
    for part in parts:
        tensor = changed.get(part.name, tensors[part.name])
        index = torch.arange(tensor.shape[part.dim])
        end = part.first + units * part.width
        index[part.first : end] = index[part.first : end].view(units, part.width)[order].flatten()
        changed[part.name] = tensor.index_select(part.dim, index.to(tensor.device))
    return changed


def own_names(module: Module32, view: View) -> tuple[str, str]:
    """The names, within the module, of a layer's weight, and of its bias if it has one."""
    name = module.trial.path(view).removeprefix(f"{module.path}." if module.path else "")
    return f"{name}.{view.parameter}", f"{name}.bias"


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
