"""What blocks hand on to later blocks beside the hidden states: further outputs, and containers that they write to.

It is plain data: tensors, numbers, strings and None in nested dictionaries, lists and tuples.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FromBlock:
    """Stands for a further output of a block, which a later block takes."""

    block: int
    index: int  # in the tuple that the block returns


@dataclass(frozen=True)
class Shared:
    """Stands for a dictionary or list that several blocks are given, so that one may write what another reads."""

    number: int
    content: Any  # before the first block

    def filled(self, content: Any) -> Any:
        """A container of the same class with this content."""
        if isinstance(self.content, dict | list):
            return copy(content)
        return type(self.content)(content)


Key = FromBlock | int  # the number of what is shared
Carried = dict[Key, Any]


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The structure with `change` made to everything in it that is no tuple, list or dictionary."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(branch, change) for branch in tree))
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return type(tree)(mapped(branch, change) for branch in tree)
    if isinstance(tree, dict):
        return {key: mapped(branch, change) for key, branch in tree.items()}
    return change(tree)


def moved(tree: Any, device: torch.device) -> Any:
    """The structure, with dictionaries for all mappings, and all tensors on the device."""
    tree = dict(tree) if isinstance(tree, MutableMapping) else tree
    return mapped(tree, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


def tensors_of(tree: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Tensor]:
    """All tensors of a structure by their path in it."""
    if isinstance(tree, Tensor):
        return {path: tree}
    branches = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return {p: t for key, branch in branches for p, t in tensors_of(branch, (*path, key)).items()}


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, as a safetensors file can hold them: of those that share memory all but one are copied."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor.contiguous()
        seen.add(address)
    return result


def to_json(carried: Sequence[Carried], tensors: list[Tensor]) -> Any:
    """The structure of what the batches carry, as JSON holds it; `tensors` gains its tensors in order."""

    def encoded(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            tensors.append(tree)
            return {"tensor": len(tensors) - 1}
        if isinstance(tree, dict):
            return {"dict": [[key, encoded(branch)] for key, branch in tree.items()]}
        if isinstance(tree, list | tuple):
            return {"list" if isinstance(tree, list) else "tuple": [encoded(branch) for branch in tree]}
        return {"plain": tree}

    names = [{k: [k.block, k.index] if isinstance(k, FromBlock) else k for k in batch} for batch in carried]
    return [[[names[i][k], encoded(tree)] for k, tree in batch.items()] for i, batch in enumerate(carried)]


def from_json(structure: Any, tensors: Sequence[Tensor]) -> list[Carried]:
    """The inverse of `to_json`."""

    def decoded(code: dict[str, Any]) -> Any:
        ((kind, value),) = code.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dict":
            return {key: decoded(branch) for key, branch in value}
        if kind in ("list", "tuple"):
            branches = [decoded(branch) for branch in value]
            return branches if kind == "list" else tuple(branches)
        return value

    return [{FromBlock(*k) if isinstance(k, list) else k: decoded(v) for k, v in batch} for batch in structure]
