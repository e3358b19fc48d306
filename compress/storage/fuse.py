"""Packed linears that share an input, as one product: a launch costs as much as reading a megabyte of weights.

q, k and v of an attention and gate and up of an MLP get their tensors laid one after another, and keep views into them:
names, shapes and what is saved stay as they were. The first that is called multiplies for all and hands the others
their part when they are called with the same input.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from paredown.compress.storage.kinds import Spec, kind_of
from paredown.compress.storage.modules import PackedLinear
from paredown.kernels.paths import PATHS
from paredown.kernels.tuning import Product

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


class Group:
    """Packed linears of one kind, dtype and device that take the same input."""

    def __init__(self, members: Sequence[PackedLinear]) -> None:
        self.outs = [member.out_features for member in members]
        self.ranks = [int(member.spec["rank"]) for member in members] if "rank" in members[0].spec else []
        self.kind = kind_of(members[0].kind)
        self.joined = {name: _join([getattr(m, name) for m in members]) for name in members[0].parts}
        self.bias = _join_bias(members)
        self.joined |= self.kind.derive(self.joined)
        self.members = list(members)
        self.waiting: tuple[Tensor, dict[int, Tensor]] | None = None
        for index, member in enumerate(members):
            member.group, member.place = self, index

    def product(self, index: int, x: Tensor) -> Tensor:
        """The output of member `index` for x (..., in)."""
        if self.waiting is not None and self.waiting[0] is x and index in self.waiting[1]:
            part = self.waiting[1].pop(index)
            if not self.waiting[1]:
                self.waiting = None  # x and the parts are not kept longer than they are needed
            return part
        both = self.kind.matmul(x, self.joined, self.bias, self.ranks, self.outs)
        parts: list[Tensor] = list(both.split(self.outs, dim=-1))
        self.waiting = (x, {i: part for i, part in enumerate(parts) if i != index})
        return parts[index]

    def holds(self, member: PackedLinear) -> bool:
        """Whether the member's tensors are still views into the joined ones."""
        pairs = ((getattr(member, name), self.joined[name]) for name in member.parts)
        return all(t.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for t, whole in pairs)

    def dissolve(self) -> None:
        """Every member multiplies for itself again."""
        for member in self.members:
            member.group = None


def fuse(model: nn.Module, device_type: str = "cuda") -> int:
    """Group what can be grouped in a model whose packed weights lie on `device_type`; how many groups there are.

    Models loaded onto a GPU are fused already; call this after `model.to("cuda")`. Moving or replacing a fused weight
    undoes its group.
    """
    made = 0
    for module in list(model.modules()):
        for names in SIBLINGS:
            found = [getattr(module, name, None) for name in names]
            alike: dict[tuple[object, ...], list[PackedLinear]] = {}
            for member in found:
                if isinstance(member, PackedLinear) and _can_join(member, device_type):
                    alike.setdefault(_traits(member), []).append(member)
            groups = [Group(members) for members in alike.values() if len(members) > 1]
            made += len(groups)
    return made


def _can_join(member: PackedLinear, device_type: str) -> bool:
    on_device = all(getattr(member, name).device.type == device_type for name in member.parts)
    return on_device and kind_of(member.kind).joins and member.group is None and member.own_forward is None


def _traits(member: PackedLinear) -> tuple[object, ...]:
    tensors = [getattr(member, name) for name in member.parts]
    return (member.kind, member.in_features, *((tensor.dtype, tensor.device) for tensor in tensors))


@torch.no_grad()
def _join(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows, or of all numbers where rows differ in length; the given ones become views into it."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.data = part.view(tensor.shape)
    widths = {tensor.shape[1:] for tensor in tensors}
    return flat.view(-1, *widths.pop()) if len(widths) == 1 else flat


@torch.no_grad()
def _join_bias(members: Sequence[PackedLinear]) -> Tensor | None:
    biases = [member.bias for member in members]
    if all(bias is None for bias in biases):
        return None
    like = next(bias for bias in biases if bias is not None)
    return _join([like.new_zeros(m.out_features) if b is None else b for m, b in zip(members, biases, strict=True)])


def products(modules: Mapping[str, Spec]) -> set[Product]:
    """What a packed checkpoint multiplies with, fused as `fuse` does: `modules` are the specs of its config by name."""
    found, joined = set[Product](), set[str]()
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        names = next((names for names in SIBLINGS if leaf in names), (leaf,))
        specs = {f"{parent}.{n}": modules[f"{parent}.{n}"] for n in names if f"{parent}.{n}" in modules}
        alike = {n: spec for n, spec in specs.items() if _fuse_together(spec, modules[name])} | {name: modules[name]}
        if name in joined or modules[name]["layout"] == "experts":
            continue
        joined |= alike.keys()
        found |= _products(list(alike.values()))
    return found


def _fuse_together(spec: Spec, other: Spec) -> bool:
    same = all(spec[key] == other[key] for key in ("kind", "layout")) and spec["shape"][1] == other["shape"][1]
    return same and kind_of(spec["kind"]).joins and spec["layout"] == "linear"


def _products(specs: Sequence[Spec]) -> set[Product]:
    """A group is about one weight of all rows with the mean rank. A mask and factors, joined, are a product each."""
    kind, columns, rows = specs[0]["kind"], specs[0]["shape"][1], sum(spec["shape"][0] for spec in specs)
    rank = round(sum(spec.get("rank", 0) for spec in specs) / len(specs))
    density = round(sum(spec.get("kept", 0) for spec in specs) / (rows * columns), 2)
    mask, factors, _ = kind.partition("_lowrank")
    if factors and (len(specs) > 1 or kind not in PATHS):
        return _mask_product(mask, rows, columns, density) | {Product("lowrank", rows, columns, rank)}
    return {Product(kind, rows, columns, rank)} if rank else _mask_product(kind, rows, columns, density)


def _mask_product(kind: str, rows: int, columns: int, density: float) -> set[Product]:
    return {Product(kind, rows, columns, density=density if kind == "bitmap" else 0.5)}
