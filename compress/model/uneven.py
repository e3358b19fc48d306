"""The model that remains when each group keeps a number of units of its own, or attention or MLPs of single blocks go.

No config of a family describes it: config.json says it beside the packed weights, see `storage.shapes`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.configs import first_line, only_logits
from paredown.compress.checkpoint.skeleton import skeleton
from paredown.compress.checkpoint.source import ModelSource, set_tensor
from paredown.compress.errors import PareError
from paredown.compress.methods.base import Group
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.model.caches import check_caches
from paredown.compress.model.groups import sliced
from paredown.compress.model.narrower import check_group
from paredown.compress.model.reshape import Reshaped
from paredown.compress.model.reshape_compare import kind_of
from paredown.compress.model.reshape_names import heads_in_files, list_of_blocks
from paredown.compress.model.stream import Stream, start, visited
from paredown.compress.model.sublayers import silent
from paredown.compress.model.targets import control_counts
from paredown.compress.model.trial import Trial
from paredown.compress.storage.shapes import Shapes

PROBE = 16  # tokens
EXACT = 1e-3  # how far outputs may differ, beside what the change of the weights makes


def uneven(
    source: ModelSource, sizes: Mapping[str, int], groups: Sequence[Group], absent: Sequence[str] = ()
) -> Reshaped:
    """The model in which each of `groups` has the number of units that `sizes` gives for its name; others are as they were.

    Modules `absent`, by full name, give zeros. What the source itself has of own sizes and absent modules stays.
    That its blocks compute what the source's do with these units' columns of the reader, or these modules' outputs, zero is
    shown by calling one block of each kind, whose weights are read. Raises PareError naming what is in the way.
    """
    if source.modules:
        raise PareError(
            f"{source.id} has packed weights, of which units cannot be removed: remove units first and compress what "
            "remains, or make it dense with paredown export."
        )
    gone = tuple(f"{name}." for name in absent)
    cut = [g for g in groups if sizes.get(g.name, g.units) < g.units and not f"{g.name}.".startswith(gone)]
    shapes = merged_shapes(source, sizes, cut, absent)
    check_caches(source.config, source.model, list_of_blocks(source), absent)
    config = only_logits(source.config)
    model = skeleton(config, {}, source.dtype or torch.float32, shapes)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(source.device)
    within, counts = list_of_blocks(source), control_counts(source.config)
    shared = frozenset([*source.tied, *source.tied.values()])
    layers = [Block(i, f"{within}.{i}.", layer, counts, shared) for i, layer in enumerate(model.get_submodule(within))]
    for copied in set(model.all_tied_weights_keys) - source.tied.keys():  # which the source's files hold twice
        del model.all_tied_weights_keys[copied]
        set_tensor(model, copied, torch.empty_like(model.get_parameter(copied)))
    written = transformers_plugin.packed_config(source.config, {}, source.verbatim, shapes)
    small = Reshaped(written, model, tuple(range(len(layers))), layers, within, heads_in_files(source), shapes=shapes)
    if why := next(_faults(source, small, sizes, cut, absent), None):
        raise PareError(f"{source.id}: {why}. Use a method that leaves all blocks alike, or name other blocks.")
    return small


def merged_shapes(
    source: ModelSource, sizes: Mapping[str, int], groups: Sequence[Group], absent: Sequence[str]
) -> Shapes:
    """What config.json says of a model whose `groups` keep so many units and that lacks these modules."""
    gone = tuple(f"{name}." for name in absent)
    shapes = dict(source.shapes.sizes)
    for group in groups:
        for part in group.parts:
            shape = list(shapes.get(part.name, source.parameters[part.name].shape))
            shape[part.dim] -= part.width * (group.units - sizes[group.name])
            shapes[part.name] = tuple(shape)
    kept = {name: shape for name, shape in shapes.items() if not name.startswith(gone)}
    return Shapes(kept, tuple(sorted({*source.shapes.absent, *absent})))


@torch.no_grad()
def _faults(
    source: ModelSource, small: Reshaped, sizes: Mapping[str, int], groups: Sequence[Group], absent: Sequence[str]
) -> Iterator[str]:
    """Where a block of the smaller model gives something else than the source's block with zeros in it."""
    ids = torch.arange(min(PROBE, int(source.config.get_text_config().vocab_size)))[None]
    stream, seen = start(source, ids), set[Any]()

    def lost(block: Block) -> tuple[list[Group], list[str]]:
        own = [group for group in groups if f"{group.name}.".startswith(block.prefix)]
        return own, [name for name in absent if name.startswith(block.prefix)]

    def is_new(block: Block) -> bool:
        own, gone = lost(block)
        what = tuple(f"{name}.".removeprefix(block.prefix) for name in [*(group.name for group in own), *gone])
        kind = (kind_of(block.module), what)
        new = bool(what) and kind not in seen
        seen.add(kind)
        return new

    for block in visited(source, stream, blocks(source), is_new):
        own, gone = lost(block)
        target = small.blocks[block.index]
        yield from _Pair(source, stream, block, target, small.model, own, sizes, gone).faults()


@dataclass
class _Pair:
    """A block of the source, in memory, and the block of the smaller model that it becomes."""

    source: ModelSource
    stream: Stream  # before the block
    block: Block
    target: Block
    model: nn.Module  # the smaller one
    groups: Sequence[Group]  # that lose units, of this block
    sizes: Mapping[str, int]
    gone: Sequence[str]  # full names of modules of this block

    def faults(self) -> Iterator[str]:
        """Raises PareError for a group that gives something else with fewer units."""
        trial = Trial.of(self.stream, self.block)
        for group in self.groups:
            with silent(self.block, self.gone):
                check_group(self.source, trial, self.block, self.target, group)
        if self.gone:
            try:
                yield from self._other_outputs()
            except Exception as fault:  # a class that reads more of a module than what it gives
                yield f"{self.block.name} cannot be run in this form ({type(fault).__name__}: {first_line(fault)})"

    def _other_outputs(self) -> Iterator[str]:
        """Whether the whole block gives something else, in its own dtype, with all that it loses."""
        own = {self.block.prefix + name: tensor for name, tensor in self.block.module.state_dict().items()}
        before = self._output(self.block)
        with silent(self.block, self.gone):
            wanted = self._output(self.block, self._zeroed(own))
        if not bool((wanted - wanted[:, :1]).norm() > EXACT * wanted.norm()):
            yield f"{self.gone[0]} hands on the residual stream, which ends without it"
        with self._filled(self._sliced(own)):
            after = self._output(self.target)
        rounding = 8 * torch.finfo(self.stream.hidden[0].dtype).eps * wanted.norm()
        if bool((after - wanted).norm() > EXACT * (before - wanted).norm() + rounding):
            yield f"{self.block.name} gives something else without {', '.join(self.gone)}"

    def _output(self, block: Block, parameters: dict[str, Tensor] | None = None) -> Tensor:
        hidden = self.stream.hidden[0].to(self.stream.device, copy=True)
        return self.stream.call(block, 0, hidden, parameters).float()

    def _sliced(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with the first units of each group."""
        changed = dict(tensors)
        for group in self.groups:
            keep = torch.arange(group.units) < self.sizes[group.name]
            for name in {part.name for part in group.parts}:
                changed[name] = sliced(changed[name], [p for p in group.parts if p.name == name], keep)
        return changed

    def _zeroed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The readers' weights, by name within the block, with zeros for the other units."""
        changed: dict[str, Tensor] = {}
        for group in self.groups:
            part, weight = group.parts[-1], tensors[group.parts[-1].name]
            gone = torch.arange(self.sizes[group.name] * part.width, group.units * part.width, device=weight.device)
            changed[part.name.removeprefix(self.block.prefix)] = weight.index_fill(part.dim, part.first + gone, 0.0)
        return changed

    @contextmanager
    def _filled(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the `with` block the target has these tensors, by full name."""
        empty = self.target.module.state_dict()
        try:
            for name in empty:
                set_tensor(self.model, self.target.prefix + name, tensors[self.target.prefix + name])
            yield
        finally:
            for name, tensor in empty.items():
                set_tensor(self.model, self.target.prefix + name, tensor)
