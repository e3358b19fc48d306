"""The smaller model that remains when blocks are removed or have fewer units: its config, its skeleton, its names.

No family is known by name. Settings that may speak of single blocks are changed to what they likely mean, the model is built,
and each of its blocks is compared with the one it was; where they differ, other values are tried.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Any

import torch
from torch import nn

from paredown.compress.checkpoint.configs import first_line, only_logits
from paredown.compress.checkpoint.skeleton import skeleton
from paredown.compress.checkpoint.source import ModelSource, set_tensor
from paredown.compress.checkpoint.transformers_plugin import dense_config, packed_config
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.model.caches import check_caches
from paredown.compress.model.reshape_compare import (
    Changes,
    Difference,
    block_differences,
    described,
    outside_differences,
)
from paredown.compress.model.reshape_keys import Value, with_units
from paredown.compress.model.reshape_names import check_numbered, heads_in_files, is_extra, list_of_blocks, renumbered
from paredown.compress.model.reshape_proof import faults
from paredown.compress.model.reshape_settings import Options, Values, options, repairs, starts
from paredown.compress.model.targets import control_counts
from paredown.compress.storage.shapes import Shapes

TRIES = 150  # configs that are built before a model is refused


@dataclass(frozen=True)
class Reshaped:
    """A smaller model of the source's family, without weights."""

    config: Any  # what config.json gets
    model: nn.Module  # on `meta`; computed buffers are on the source's device
    kept: tuple[int, ...]  # indices of the source's blocks that remain
    blocks: list[Block]  # of the smaller model; each index is the source's, so that its recorded calls can be used
    within: str  # the name of the list of blocks: model.layers
    heads: tuple[str, ...]  # what stands before a block's number in names of the source's files
    remarks: list[str] = field(default_factory=list)
    dropped_verbatim: list[str] = field(default_factory=list)  # names in the source's files
    shapes: Shapes = field(default_factory=Shapes)  # what in the model is not as the config says: see `model.uneven`

    def renamed(self, name: str) -> str | None:
        """A parameter's name in the source -> its name here; None if it is removed."""
        return renumbered(name, [self.within], self.kept)


def reshaped(source: ModelSource, kept: Sequence[int], units: Mapping[str, Value]) -> Reshaped:
    """The model that remains of the blocks `kept`, with `units` in place of the counts that the config has under these keys.

    That its blocks are the source's is shown by comparing all that they are, how they are called, and what they make of the
    same input, for which the weights of one block of each kind are read.
    Raises PareError, saying what is in the way, if no config of the family describes this model.
    """
    within, heads = list_of_blocks(source), heads_in_files(source)
    _check(source, kept)
    if len(kept) < len(blocks(source)):
        check_numbered(source, heads)
        _check_shared(source, kept)
    found = _Search(source, tuple(kept), units).best()
    shapes = _renumbered_shapes(source, within, kept)
    check_caches(found.config, found.model, within, shapes.absent)
    shapes.apply(found.model)
    for module in found.model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(source.device)
    dropped = [key for key in source.verbatim if is_extra(key, heads, len(blocks(source)))]
    remarks = []
    if dropped:
        remarks.append(
            f"{len(dropped)} tensors of layers after the last block ({dropped[0]}, ...), such as those of multi-token "
            "prediction, read what the whole model gave them: they are left out of the smaller one"
        )
    shared = frozenset([*found.model.all_tied_weights_keys, *found.model.all_tied_weights_keys.values()])
    counts = control_counts(found.config)
    layers = [
        Block(index, f"{within}.{position}.", layer, counts, shared)
        for position, (index, layer) in enumerate(zip(kept, found.layers, strict=True))
    ]
    why = next(faults(source, found.config, found.model, layers, bool(units)), None)
    if why:
        raise _refusal(source, kept, units, why)
    small = Reshaped(found.config, found.model, tuple(kept), layers, within, heads, remarks, dropped, shapes)
    if shapes:
        verbatim = [new for key in source.verbatim if key not in dropped and (new := in_files(source, small, key))]
        small = replace(small, config=packed_config(found.config, {}, verbatim, shapes))
    return small


def in_files(source: ModelSource, reshaped: Reshaped, name_in_files: str) -> str | None:
    """The name in the smaller checkpoint of a tensor of the source's files: None if its block is removed."""
    return renumbered(name_in_files, reshaped.heads, reshaped.kept)


@dataclass
class _Candidate:
    """A config for the smaller model, and what comes of it."""

    values: Values
    config: Any = None
    model: Any = None
    layers: Sequence[nn.Module] = ()
    fault: PareError | None = None
    differences: list[Difference] = field(default_factory=list)

    @cached_property
    def cost(self) -> float:
        """How many blocks are not what they were; outside counts as one."""
        return inf if self.fault else len({d.block for d in self.differences})


@dataclass
class _Search:
    """Looks for the config of the smaller model."""

    source: ModelSource
    kept: tuple[int, ...]
    units: Mapping[str, Value]

    def __post_init__(self) -> None:
        source, text = self.source, self.source.config.get_text_config()
        self.old = blocks(source)
        self.within = list_of_blocks(source)
        # not the source's own: a forward pass may have left marks in it
        dense = skeleton(only_logits(source.config), {}, self.dtype)
        self.before = [described(layer) for layer in _layers(dense, self.within, len(self.old))]
        self.outside = described(dense, self.within)
        self.base = dense_config(source.config)
        for key, count in self.units.items():
            self.base = with_units(self.base, key, count)
        sizes = [pair for key, now in self.units.items() for pair in _pairs(getattr(text, key, None), now)]
        self.changes = Changes(self.kept, len(self.old), sizes)
        self.tried: set[str] = set()

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype or torch.float32

    def best(self) -> _Candidate:
        """A config with which nothing differs. Raises PareError with the least difference that was found."""
        found = options(self.base.get_text_config(), self.kept, len(self.old))
        ends = []
        for start in starts(found):
            end = self._improved(self._tried(start), found)
            if not end.cost:
                return end
            ends.append(end)
        least = min(ends, key=lambda end: end.cost)
        why = str(least.fault or least.differences[0]).rstrip(".")
        raise _refusal(self.source, self.kept, self.units, why)

    def _improved(self, best: _Candidate, found: Options) -> _Candidate:
        """The end of a chain of candidates, each with fewer wrong blocks than the one before."""
        better: _Candidate | None = best
        while better is not None and better.cost:
            best = better
            wrong = {self.kept.index(d.block) for d in best.differences if d.block is not None}
            proposals = (self._tried(values) for values in repairs(best.values, found, wrong) if self._is_new(values))
            better = next((c for c in proposals if c.cost < best.cost), None)
        return better or best

    def _is_new(self, values: Values) -> bool:
        return len(self.tried) < TRIES and repr(sorted(values.items())) not in self.tried

    def _tried(self, values: Values) -> _Candidate:
        """Build and compare."""
        self.tried.add(repr(sorted(values.items())))
        candidate = _Candidate(values)
        try:
            candidate.config = _read_back(self.source, self.base, values)
            candidate.model = skeleton(only_logits(candidate.config), {}, self.dtype)
            candidate.layers = _layers(candidate.model, self.within, len(self.kept))
            _settle_ties(self.source, candidate.model, self.within, self.kept)
        except PareError as fault:
            candidate.fault = fault
        else:
            candidate.differences = list(self._differences(candidate))
        return candidate

    def _differences(self, candidate: _Candidate) -> Iterator[Difference]:
        for position, layer in enumerate(candidate.layers):
            index = self.kept[position]
            prefix = self.old[index].prefix
            yield from block_differences(self.before[index], described(layer), position, prefix, self.changes)
        yield from outside_differences(self.outside, described(candidate.model, self.within), self.changes)


def _renumbered_shapes(source: ModelSource, within: str, kept: Sequence[int]) -> Shapes:
    """What is not as the config says in the blocks that stay."""
    sizes = {new: shape for name, shape in source.shapes.sizes.items() if (new := renumbered(name, [within], kept))}
    absent = (renumbered(name, [within], kept) for name in source.shapes.absent)
    return Shapes(sizes, tuple(name for name in absent if name is not None))


def _refusal(source: ModelSource, kept: Sequence[int], units: Mapping[str, Value], why: str) -> PareError:
    gone = [str(i) for i in range(len(blocks(source))) if i not in kept]
    blocks_gone = [f"without the blocks {', '.join(gone)}"] if gone else []
    form = " and ".join([*blocks_gone, *(f"with {key} {count}" for key, count in units.items())])
    return PareError(
        f"{source.id}: no config of a {source.family} model describes it {form}: {why}. "
        + ("Remove other blocks, or make all narrower or sparser." if gone else "Use a method that keeps the shapes.")
    )


def _check(source: ModelSource, kept: Sequence[int]) -> None:
    count = len(blocks(source))
    if not kept or sorted(set(kept)) != list(kept) or not 0 <= kept[0] <= kept[-1] < count:
        raise PareError(
            f"blocks {list(kept)} of {count} cannot be kept: name each once, in order, from 0 to {count - 1}."
        )
    if source.modules:
        raise PareError(
            f"{source.id} is packed, and an ordinary smaller model cannot be made of packed weights: remove blocks and units "
            "first and compress what remains, or make it dense with paredown export."
        )


def _check_shared(source: ModelSource, kept: Sequence[int]) -> None:
    """Raises PareError if a block goes whose weights another one uses."""
    within = list_of_blocks(source)
    for name, original in source.tied.items():
        if renumbered(name, [within], kept) is not None and renumbered(original, [within], kept) is None:
            raise _refusal(source, kept, {}, f"{name} of a block that stays is the same tensor as {original}")


def _layers(model: Any, within: str, count: int) -> Sequence[nn.Module]:
    """The blocks of a smaller model. Raises PareError if there are not `count`."""
    try:
        layers = list(model.get_submodule(within))
    except (AttributeError, TypeError):
        layers = []
    if len(layers) != count:
        raise PareError(f"its config leaves {len(layers)} blocks in {within} where {count} are wanted")
    return layers


def _read_back(source: ModelSource, base: Any, values: Values) -> Any:
    """A copy of the config `base` with these settings in its text model's, as config.json will hold it.

    Raises PareError if the class refuses them.
    """
    config = copy.deepcopy(base)
    text = config.get_text_config()
    try:
        for key, value in values.items():
            setattr(text, key, value)
        settings = json.loads(config.to_json_string(use_diff=True))
        read = type(config).from_dict(config._decode_special_floats(settings))
    except Exception as fault:  # whatever a class does with a value that it did not expect
        raise PareError(f"its config class refuses it ({first_line(fault)})") from fault
    read._attn_implementation, read._experts_implementation = None, "eager"
    for name in read.sub_configs:
        if (part := getattr(read, name, None)) is not None:
            part.dtype = source.dtype
    return read


def _settle_ties(source: ModelSource, model: Any, within: str, kept: Sequence[int]) -> None:
    """Untie what the source's files hold twice. Raises PareError if other weights would be tied than those of the source."""
    wanted = {
        copied: original
        for pair in source.tied.items()
        if (copied := renumbered(pair[0], [within], kept)) and (original := renumbered(pair[1], [within], kept))
    }
    for name in [name for name in model.all_tied_weights_keys if name not in wanted]:
        del model.all_tied_weights_keys[name]
        set_tensor(model, name, torch.empty_like(model.get_parameter(name)))
    if dict(model.all_tied_weights_keys) != wanted:
        missing = next(name for name, original in wanted.items() if model.all_tied_weights_keys.get(name) != original)
        raise PareError(f"{missing} would no longer be the same tensor as {wanted[missing]}")


def _pairs(before: Any, now: Value) -> list[tuple[int, int]]:
    """Each number that a key has, and what it becomes."""
    old = before if isinstance(before, list | tuple) else [before]
    new = now if isinstance(now, list) else [now] * len(old)
    return [(was, value) for was, value in zip(old, new, strict=True) if isinstance(was, int)]
