"""The tensors of a packed checkpoint as an engine's own loader wants them: named and shaped as in an ordinary one.

Each packed weight is checked. Then it is unpacked, or set aside for a layer that takes it packed.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paredown.compress.checkpoint.origins import reverted
from paredown.compress.checkpoint.skeleton import skeleton
from paredown.compress.checkpoint.tensor_files import all_finite
from paredown.compress.checkpoint.writer import RECORD
from paredown.compress.errors import PareError
from paredown.compress.storage.install import install
from paredown.compress.storage.kinds import kind_of
from paredown.compress.storage.modules import PackedExperts
from paredown.compress.storage.spec import LAYOUTS, Spec

Named = tuple[str, Tensor]
Tensors = Mapping[str, Tensor]
AGAIN = "Fetch the checkpoint again, or check it with: paredown verify FOLDER"


@dataclass(frozen=True)
class Names:
    """How the files of an ordinary checkpoint hold the weights of ours."""

    renamed: Mapping[str, str] = field(default_factory=dict)  # weights of ours -> their names there
    converted: frozenset[str] = frozenset()  # weights of ours that the family's class makes of others

    @classmethod
    def read(cls, model: str, revision: str | None = None) -> "Names":
        """Of a folder or a hub id, as its paredown.json says; without one all have their own names."""
        from transformers.utils import cached_file

        path = cached_file(model, RECORD, revision=revision, _raise_exceptions_for_missing_entries=False)
        record = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        return cls(record.get("renamed") or {}, frozenset(record.get("converted") or []))


@dataclass
class Unpacking:
    """Hands the tensors of a packed checkpoint, read once in any order, to an engine's loader."""

    specs: Mapping[str, Spec]
    verbatim: frozenset[str]  # tensors that the model's class does not know
    names: Names
    config: Any  # of the dense family
    # takes the name, the tensors and the added bias of a weight: keeps them and returns what is loaded in their place
    # (out, in), or returns None if the weight shall be loaded dense
    hold: Callable[[str, Tensors, Tensor | None], Tensor | None]

    def __call__(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """Raises PareError for tensors that are missing, unknown or damaged."""
        waiting: dict[str, dict[str, Tensor]] = {name: {} for name in self.specs}
        blocks: dict[str, dict[str, Tensor]] = {}  # weights that are held in another form, together
        for key, tensor in tensors:
            if key in self.verbatim:
                continue
            if not all_finite(tensor):
                raise PareError(f"tensor {key!r} holds NaN or infinite values. {AGAIN}")
            for name, weight in self._arrived(key, tensor, waiting):
                block = self._blocks.get(name)
                if block is None:
                    yield self.names.renamed.get(name, name), weight
                    continue
                blocks.setdefault(block, {})[name] = weight
                if len(blocks[block]) == sum(own == block for own in self._blocks.values()):
                    yield from reverted(self._family, blocks.pop(block), None).items()
        if lacking := [*waiting, *(f"{block}'s experts" for block in blocks)]:
            raise PareError(f"the checkpoint lacks tensors of {lacking[0]} ({len(lacking)} weights in all). {AGAIN}")

    def _arrived(self, key: str, tensor: Tensor, waiting: dict[str, dict[str, Tensor]]) -> Iterator[Named]:
        """What can be handed on now that this tensor was read."""
        name, _, part = key.rpartition(".")
        spec = self.specs.get(name)
        if spec is None or (part == "bias" and not spec.bias):
            held = self.hold(name, {part: tensor}, None) if part == "weight" else None
            yield key, tensor if held is None else held
            return
        needed = {*kind_of(spec.kind).tensors, *(["bias"] if spec.bias else [])}
        if part not in needed or name not in waiting:
            raise PareError(f"{key}: a weight of kind {spec.kind} has no such tensor, or has it twice. {AGAIN}")
        waiting[name][part] = tensor
        if waiting[name].keys() == needed:
            yield self._whole(name, spec, waiting.pop(name))

    def _whole(self, name: str, spec: Spec, tensors: dict[str, Tensor]) -> Named:
        """A packed weight under the name of the dense one."""
        bias = tensors.pop("bias", None)
        if damage := fault(spec, tensors):
            raise PareError(f"{name}.{damage}. {AGAIN}")
        if LAYOUTS[spec.layout] == 3:
            return name, self._experts(name, spec, tensors)
        full = f"{name}.weight"
        weight = None if full in self._blocks else self.hold(name, tensors, bias)
        if weight is None and bias is not None:
            raise PareError(
                f"{name} has a bias that layers of this family lack, and this engine holds it in a layer of its own making. "
                "Export it dense: paredown export OLD -o NEW"
            )
        weight = kind_of(spec.kind).unpack(tensors, spec.shape) if weight is None else weight
        return full, weight.t() if spec.layout == "conv1d" else weight

    def _experts(self, name: str, spec: Spec, tensors: Tensors) -> Tensor:
        """All experts, in the shape of the family's parameter."""
        path, _, leaf = name.rpartition(".")
        parent = self._family.get_submodule(path)
        parameter = parent._parameters[leaf]
        install(self._family, {name: spec})
        module: PackedExperts = getattr(parent, leaf)
        module.load_state_dict({**tensors}, assign=True)
        dense = module.whole()
        delattr(parent, leaf)
        parent.register_parameter(leaf, parameter)
        return dense

    @cached_property
    def _family(self) -> Any:
        """The dense model without weights."""
        return skeleton(self.config, {}, torch.float32)

    @cached_property
    def _blocks(self) -> dict[str, str]:
        """The weights that an ordinary checkpoint holds in another form, all of a block together: name -> block."""
        experts = tuple(f"{n.rpartition('.')[0]}." for n, spec in self.specs.items() if LAYOUTS[spec.layout] == 3)
        if not experts and not self.names.converted:
            return {}
        names = [n for n in self._family.state_dict() if n in self.names.converted or n.startswith(experts)]
        return {name: (re.match(r".*?\.\d+(?=\.)", name) or [name])[0] for name in names}


def fault(spec: Spec, tensors: Tensors) -> str | None:
    """What is wrong with the stored tensors of a weight, the tensor's name first; None if nothing is."""
    kind = kind_of(spec.kind)
    for name, size in kind.sizes(spec).items():
        if tuple(tensors[name].shape) != size:
            return f"{name}: has shape {list(tensors[name].shape)}, and the spec needs {list(size)}"
        if (dtype := kind.tensors[name]) is not None and tensors[name].dtype != dtype:
            return f"{name}: has dtype {tensors[name].dtype}, not {dtype}"
    return kind.fault(tensors, spec.shape)
