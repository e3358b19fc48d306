"""Show by calling them that modules with fewer units do what the source's do without the others."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paredown.compress.checkpoint.configs import first_line
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.methods.base import Group
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.model.groups import sliced
from paredown.compress.model.reshape import Reshaped
from paredown.compress.model.reshape_compare import kind_of
from paredown.compress.model.stream import start, visited
from paredown.compress.model.trial import Module32, Trial

PROBE = 16  # tokens
EXACT = 1e-3  # how far outputs may differ, beside their size


@torch.no_grad()
def check_narrower(source: ModelSource, small: Reshaped, groups: Mapping[int, Sequence[Group]]) -> None:
    """Raises PareError if a module of the smaller model makes something else of its units than the source does.

    Modules of one block of each kind are compared in float32. All units are made like the first, so that norms over all of
    them are what they were, and the reader's columns of those that go are zeros. Experts have no reader, and are left out.
    """
    ids = torch.arange(min(PROBE, int(source.config.get_text_config().vocab_size)))[None]
    stream, seen = start(source, ids), set[str]()
    found = {index: [group for group in own if group.reader] for index, own in groups.items()}

    def is_new(block: Block) -> bool:
        kind = kind_of(block.module)
        new = bool(found.get(block.index)) and kind not in seen
        seen.add(kind)
        return new

    for block in visited(source, stream, blocks(source), is_new):
        for group in found[block.index]:
            check_group(source, Trial.of(stream, block), block, small.blocks[block.index], group)


def check_group(source: ModelSource, trial: Trial, block: Block, target: Block, group: Group) -> None:
    """The same of one group of a `block`, which is in memory, and the block `target` that it becomes."""
    path = f"{group.name}.".removeprefix(block.prefix).rstrip(".")
    head = f"{group.name}."
    module, smaller = Module32(trial, path), target.module.get_submodule(path)
    reader = group.parts[-1]
    stay = smaller.get_parameter(reader.name.removeprefix(head)).shape[reader.dim] // reader.width
    tensors = dict(module.tensors)
    for part in group.parts[:-1]:
        span = tensors[part.name.removeprefix(head)].clone()
        units = span.narrow(part.dim, part.first, group.units * part.width).unflatten(
            part.dim, (group.units, part.width)
        )
        units.copy_(units.narrow(part.dim, 0, 1).expand_as(units))
        tensors[part.name.removeprefix(head)] = span
    keep = torch.arange(group.units) < stay
    buffers = {name for name, t in smaller.named_buffers() if name in tensors and t.shape == tensors[name].shape}
    names = {name for name, _ in smaller.named_parameters()} | buffers  # a part may be absent, a buffer of another size
    kept = {
        name: sliced(tensor, [p for p in group.parts if p.name == head + name], keep)
        for name, tensor in tensors.items()
        if name in names
    }
    name = reader.name.removeprefix(head)
    gone = torch.arange(stay * reader.width, group.units * reader.width) + reader.first
    wanted = module.output({**tensors, name: tensors[name].index_fill(reader.dim, gone.to(tensors[name].device), 0.0)})
    try:
        result = torch.func.functional_call(smaller, kept, module.call.args, module.call.kwargs)
    except Exception as fault:  # a class that reads more of its config than its shapes say
        raise _refusal(source, group, f"fails ({type(fault).__name__}: {first_line(fault)})") from fault
    output: Tensor = result[0] if isinstance(result, tuple | list) else result
    if output.shape != wanted.shape or bool((output - wanted).norm() > EXACT * wanted.norm()):
        raise _refusal(source, group, "gives something else")


def _refusal(source: ModelSource, group: Group, why: str) -> PareError:
    return PareError(
        f"{source.id}: {group.name} of a {source.family} model {why} when it has fewer {group.kind}. Remove blocks "
        "(paredown_depth), or use a low-rank method."
    )
