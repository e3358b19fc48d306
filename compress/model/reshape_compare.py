"""What a module is, as plain values by name, and where two modules differ."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from paredown.compress.model.calls import Call
from paredown.compress.model.carried import FromBlock, Shared, tensors_of

SIMPLE = (bool, int, float, str, torch.dtype, torch.device, type(None))
# what PyTorch keeps in every module, where a model was read from, and ties, which are compared by themselves
SKIPPED = {*vars(nn.Module()), "_is_hf_initialized", "name_or_path", "all_tied_weights_keys", "_tied_weights_keys"}
NOTHING = "nothing"  # in the place of what is absent
OWN_INDEX = re.compile(r"(^|_)(idx|index|id|number|num)$")  # at the end of an attribute that may count layers


@dataclass(frozen=True)
class Difference:
    """Where a block of the smaller model is not the source's; without a block: where what lies outside of them is not."""

    block: int | None  # index in the source
    where: str  # the full name in the source: model.layers.3.self_attn.sliding_window
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.where} is {_shown(self.before)} now and would be {_shown(self.after)}"


@dataclass(frozen=True)
class Changes:
    """The numbers that may differ between the two models."""

    kept: Sequence[int]  # indices of the blocks that stay
    count: int  # of all blocks
    units: Sequence[tuple[int, int]] = field(default_factory=list)  # each count of units that changes: before and after


def described(module: nn.Module, outside: str = "") -> dict[str, Any]:
    """Class, attributes, parameters and buffers of a module and of all modules in it, by name; but for those in `outside`."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        if outside and (path == outside or path.startswith(f"{outside}.")):
            continue
        stem = f"{path}." if path else ""
        found[path] = type(part)
        for name, tensor in part._parameters.items():
            found[stem + name] = None if tensor is None else _Content(tuple(tensor.shape), tensor.dtype)
        for name, buffer in part._buffers.items():
            found[stem + name] = None if buffer is None else _Content.of(buffer)
        for name, value in vars(part).items():
            if name not in SKIPPED and not isinstance(value, PretrainedConfig):
                found[stem + name] = _plain(value)
    return found


def kind_of(module: nn.Module) -> str:
    """Equal for blocks that differ in nothing but weights and their own number."""
    items = (f"{name}: {value}" for name, value in described(module).items() if not _counts(name, value))
    return hashlib.sha256("\n".join(items).encode()).hexdigest()


def block_differences(
    before: Mapping[str, Any], after: Mapping[str, Any], position: int, prefix: str, changes: Changes
) -> Iterator[Difference]:
    """Where two described blocks differ in more than they may: number `position` of the smaller model, and what it was."""
    index = changes.kept[position]

    def may(name: str, old: Any, new: Any) -> bool:
        moved = _counts(name, old) and _counts(name, new) and old - new in (index - position, 2 * (index - position))
        return moved or _sliced(old, new, changes) or _fewer_units(old, new, changes.units)

    for name, old, new in _unequal(before, after, may):
        yield Difference(index, (prefix + name).rstrip("."), old, new)


def outside_differences(before: Mapping[str, Any], after: Mapping[str, Any], changes: Changes) -> Iterator[Difference]:
    """The same for what lies outside the blocks, which may hold their number.

    What is computed for kinds of blocks that are all gone may be absent: how blocks are called is compared besides.
    """
    size = (changes.count, len(changes.kept))

    def may(name: str, old: Any, new: Any) -> bool:
        fewer_kinds = isinstance(old, tuple) and all(entry in old for entry in new)
        return (old, new) == size or fewer_kinds or _sliced(old, new, changes) or _fewer_units(old, new, changes.units)

    for name, old, new in _unequal(before, after, may):
        if new != NOTHING or isinstance(old, type) or (isinstance(old, _Content) and not old.digest):
            yield Difference(None, name or "the model", old, new)


def call_differences(before: Call, after: Call, changes: Changes, position: int, name: str) -> Iterator[Difference]:
    """Where the smaller model calls its block number `position`, in the source called `name`, otherwise than the source."""

    def arguments(call: Call, indices: Sequence[int]) -> dict[str, Any]:
        named = {**{str(i): value for i, value in enumerate(call.args)}, **call.kwargs}
        return {key: _argument(value, indices) for key, value in named.items()}

    one, other = arguments(before, range(changes.count)), arguments(after, changes.kept)
    own = (changes.kept[position], position)
    for key, old, new in _unequal(one, other, lambda _, old, new: type(old) is int and (old, new) == own):
        yield Difference(own[0], f"the argument {key} of {name}", old, new)


@dataclass(frozen=True)
class _Content:
    """A tensor: its values are compared where they are in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    digest: str = ""
    steps: str = ""  # the digest of its values without those that repeat the one before

    @classmethod
    def of(cls, tensor: Tensor) -> "_Content":
        shape = tuple(tensor.shape)
        if tensor.device.type == "meta":
            return cls(shape, tensor.dtype)
        entries = tensor.detach().cpu().contiguous().reshape(-1, 1).view(torch.uint8)  # (entries, bytes)
        steps = entries.unique_consecutive(dim=0) if len(entries) else entries
        return cls(shape, tensor.dtype, _digest(entries), _digest(steps))


def _digest(data: Tensor) -> str:
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def _plain(value: Any) -> Any:
    """A value that can be compared: what is more than plain data is only known by its class."""
    if isinstance(value, SIMPLE):
        return value
    if isinstance(value, Tensor):
        return _Content.of(value)
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((str(key), _plain(v)) for key, v in value.items())
    if isinstance(value, set | frozenset):
        return tuple(sorted(str(v) for v in value))
    if isinstance(value, FunctionType | MethodType | type):
        return value.__qualname__
    return type(value).__qualname__


def _argument(value: Any, indices: Sequence[int]) -> Any:
    """The same for what a block is given; blocks are named by the `indices` that they have in the source."""
    if isinstance(value, Shared):
        content = tensors_of(value.content)
        return (value.number, type(value.content), tuple((path, _Content.of(t)) for path, t in content.items()))
    return f"an output of block {indices[value.block]}" if isinstance(value, FromBlock) else _plain(value)


def _unequal(
    before: Mapping[str, Any], after: Mapping[str, Any], may: Callable[[str, Any, Any], bool]
) -> Iterator[tuple[str, Any, Any]]:
    """Names under which the two hold different values that are not allowed to differ; what is absent is "nothing"."""
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, NOTHING), after.get(name, NOTHING)
        if type(old) is not type(new) or not (_same(old, new) or may(name, old, new)):
            yield name, old, new


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float):  # what is computed of numbers of blocks may be rounded
        return math.isclose(old, new, rel_tol=1e-9) or (math.isnan(old) and math.isnan(new))
    return bool(old == new)


def _sliced(old: Any, new: Any, changes: Changes) -> bool:
    """Whether a list has an entry for each block, and those of the blocks that stay are left."""
    per_block = isinstance(old, tuple) and len(old) == changes.count
    return per_block and bool(new == tuple(old[i] for i in changes.kept))


def _counts(name: str, value: Any) -> bool:
    """Whether an attribute may be the number of its block."""
    return isinstance(value, int) and not isinstance(value, bool) and bool(OWN_INDEX.search(name.rpartition(".")[2]))


def _fewer_units(old: Any, new: Any, units: Sequence[tuple[int, int]]) -> bool:
    """Whether a number, or a size of a tensor, is smaller by a multiple of what a count of units is smaller by.

    Of a tensor in memory, such as a scale for each of a layer's outputs, only repetitions may go.
    """
    if isinstance(old, _Content) and isinstance(new, _Content):
        if len(old.shape) != len(new.shape) or (old.dtype, old.steps) != (new.dtype, new.steps):
            return False
        pairs = list(zip(old.shape, new.shape, strict=True))
        return all(a == b or _fewer_units(a, b, units) for a, b in pairs)
    if not (isinstance(old, int) and isinstance(new, int)) or isinstance(old, bool):
        return False
    return any(was > now and old > new and (old - new) % (was - now) == 0 for was, now in units)


def _shown(value: Any) -> str:
    if isinstance(value, _Content):
        return f"a tensor {list(value.shape)}"
    text = value.__name__ if isinstance(value, type) else value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
