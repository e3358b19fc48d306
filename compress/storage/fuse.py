"""Multiply packed linears that share an input as one: starting a kernel takes as long as reading a megabyte of weights.

The tensors of q, k and v of an attention, or of gate and up of an MLP, are put one after another in memory, and each
linear keeps views of its part: names, shapes and what is saved do not change. The first that is called computes the
outputs of all; the others return theirs when they are called with the same input.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from paredown.compress.storage.kinds import kind_of
from paredown.compress.storage.modules import PackedLinear
from paredown.compress.storage.spec import Spec
from paredown.kernels.paths import PATHS
from paredown.kernels.tuning import Product

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


class FusedGroup:
    """Packed linears of one kind, dtype and device that take the same input."""

    def __init__(self, members: Sequence[PackedLinear]) -> None:
        self.outs = [member.out_features for member in members]
        self.ranks = [member.spec.rank for member in members if member.spec.rank is not None]
        self.kind = kind_of(members[0].kind)
        self.joined = {name: _join([member.tensors()[name] for member in members]) for name in members[0].parts}
        self.bias = _join_bias(members)
        self.joined |= self.kind.derive(self.joined)
        self.members = list(members)
        # the last input, and by index the outputs of members that were not called with it yet
        self.pending: tuple[Tensor, dict[int, Tensor]] | None = None
        for index, member in enumerate(members):
            member.group, member.place = self, index

    def product(self, index: int, x: Tensor) -> Tensor:
        """The output (..., out) of member `index` for x (..., in)."""
        if self.pending is not None and self.pending[0] is x and index in self.pending[1]:
            output = self.pending[1].pop(index)
            if not self.pending[1]:
                self.pending = None  # so that x is not kept longer than it is needed
            return output
        together = self.kind.matmul(x, self.joined, self.bias, self.ranks, self.outs)  # (..., sum of outs)
        outputs: list[Tensor] = list(together.split(self.outs, dim=-1))
        self.pending = (x, {i: output for i, output in enumerate(outputs) if i != index})
        return outputs[index]

    def holds(self, member: PackedLinear) -> bool:
        """Whether the member's tensors are still views of the joined ones."""
        pairs = ((tensor, self.joined[name]) for name, tensor in member.tensors().items())
        return all(t.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for t, whole in pairs)

    def dissolve(self) -> None:
        """End the group: every member multiplies by itself again."""
        for member in self.members:
            member.group = None


def fuse(model: nn.Module, device_type: str = "cuda") -> int:
    """Fuse the packed linears of a model that share an input and are on a device of this type; returns how many groups.

    A model that is loaded onto a GPU is fused already; call this after `model.to("cuda")`. A group ends when one of its
    weights is moved or replaced.
    """
    count = 0
    for module in list(model.modules()):
        for names in SIBLINGS:
            alike: dict[tuple[object, ...], list[PackedLinear]] = {}
            for name in names:
                member = module._modules.get(name)
                if isinstance(member, PackedLinear) and _can_join(member, device_type):
                    alike.setdefault(_traits(member), []).append(member)
            groups = [FusedGroup(members) for members in alike.values() if len(members) > 1]
            count += len(groups)
    return count


def _can_join(member: PackedLinear, device_type: str) -> bool:
    on_device = all(tensor.device.type == device_type for tensor in member.tensors().values())
    return on_device and kind_of(member.kind).joins and member.group is None and member.own_forward is None


def _traits(member: PackedLinear) -> tuple[object, ...]:
    """What must be equal in all members of a group."""
    tensors = member.tensors().values()
    return (member.kind, member.in_features, *((tensor.dtype, tensor.device) for tensor in tensors))


@torch.no_grad()
def _join(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor with all rows, or flat if rows differ in length; the given tensors become views of it."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.data = part.view(tensor.shape)
    widths = {tensor.shape[1:] for tensor in tensors}
    return flat.view(-1, *widths.pop()) if len(widths) == 1 else flat


@torch.no_grad()
def _join_bias(members: Sequence[PackedLinear]) -> Tensor | None:
    """The biases as one (sum of outs,), zeros for members without one; None if no member has one."""
    biases = [member.bias for member in members]
    if all(bias is None for bias in biases):
        return None
    like = next(bias for bias in biases if bias is not None)
    return _join([like.new_zeros(m.out_features) if b is None else b for m, b in zip(members, biases, strict=True)])


def products(modules: Mapping[str, Spec]) -> set[Product]:
    """The products of a packed checkpoint, fused as `fuse` does; `modules` are the specs of its config, by name."""
    result, joined = set[Product](), set[str]()
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        names = next((names for names in SIBLINGS if leaf in names), (leaf,))
        specs = {f"{parent}.{n}": modules[f"{parent}.{n}"] for n in names if f"{parent}.{n}" in modules}
        alike = {n: spec for n, spec in specs.items() if _fuse_together(spec, modules[name])} | {name: modules[name]}
        if name in joined or modules[name].layout.startswith("experts"):
            continue
        joined |= alike.keys()
        result |= _products(list(alike.values()))
    return result


def _fuse_together(spec: Spec, other: Spec) -> bool:
    same = (spec.kind, spec.layout, spec.shape[1]) == (other.kind, other.layout, other.shape[1])
    return same and kind_of(spec.kind).joins and spec.layout == "linear"


def _products(specs: Sequence[Spec]) -> set[Product]:
    """A group is about one weight with all rows and the mean rank. A mask and factors in a group are two products."""
    kind, columns, rows = specs[0].kind, specs[0].shape[1], sum(spec.shape[0] for spec in specs)
    rank = round(sum(spec.rank or 0 for spec in specs) / len(specs))
    density = round(sum(spec.values or 0 for spec in specs) / (rows * columns), 2)
    mask, factors, _ = kind.partition("_lowrank")
    if factors and (len(specs) > 1 or kind not in PATHS):
        return _mask_product(mask, rows, columns, density) | {Product("lowrank", rows, columns, rank)}
    return {Product(kind, rows, columns, rank)} if rank else _mask_product(kind, rows, columns, density)


def _mask_product(kind: str, rows: int, columns: int, density: float) -> set[Product]:
    return {Product(kind, rows, columns, density=density if kind == "bitmap" else 0.5)}
