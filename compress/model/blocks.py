"""A model as a list of decoder blocks, and each weight matrix of a block as `(out, in)`, whatever class holds it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.families import FAMILIES
from paredown.compress.model.targets import bare, control, control_counts
from paredown.compress.storage.modules import PACKED
from paredown.compress.storage.spec import Layout

# Classes of fused experts that do not say how they multiply, and how: their parameters of three dimensions, or, of those
# marked as stacked, the rows of all experts one after another in one matrix.
EXPERTS: dict[str, Layout] = {
    "JetMoeParallelExperts": "experts",
    "LongcatFlashExperts": "experts",
    "InklingSharedExperts": "experts",
    "Llama4TextExperts": "experts_in_out",
}
STACKED: dict[str, tuple[str, dict[str, Layout]]] = {  # the attribute with their number; parameters
    "DbrxExpertGLU": ("moe_num_experts", {"w1": "experts", "v1": "experts", "w2": "experts_in_out"}),
}


@dataclass(frozen=True)
class View:
    """One weight matrix as methods read it, `(out, in)`; its module may hold it transposed, or inside a 3-D parameter."""

    name: str  # model.layers.0.self_attn.q_proj; of a fused expert: model.layers.0.mlp.experts.gate_up_proj.3
    module: nn.Module
    parameter: str  # the attribute of `module` that holds the tensor
    layout: Layout
    expert: int | None = None  # index of this weight in a fused parameter of experts
    experts: int = 0  # how many there are in it
    control: str | None = None  # why it is compressed only if a recipe names it; None for an ordinary layer

    @property
    def tensor(self) -> Tensor:
        """The whole parameter as the module holds it."""
        tensor: Tensor = getattr(self.module, self.parameter)
        return tensor

    @property
    def raw(self) -> Tensor:
        """The tensor as the module multiplies with it; it shares the module's memory."""
        return self.tensor if self.expert is None else _separate(self.tensor, self.experts)[self.expert]

    @property
    def weight(self) -> Tensor:  # (out, in)
        """The weight as methods read it; it shares the module's memory."""
        return self.part_of(self.tensor)

    def part_of(self, tensor: Tensor) -> Tensor:  # (out, in)
        """This weight's part of a tensor of the parameter's shape, such as the parameter itself or its mask."""
        own = tensor if self.expert is None else _separate(tensor, self.experts)[self.expert]
        return own.T if self.layout in ("conv1d", "experts_in_out") else own

    def assign(self, weight: Tensor) -> None:
        """Replace the weight by another one of the same shape (out, in)."""
        if self.expert is None:
            weight = weight.T.contiguous() if self.layout == "conv1d" else weight
            setattr(self.module, self.parameter, nn.Parameter(weight, requires_grad=False))
        else:
            self.weight.copy_(weight)

    @property
    def whole(self) -> Tensor:
        """The weight (out, in); for a fused expert the weights of all experts (experts, out, in)."""
        if self.expert is None:
            return self.weight
        experts = _separate(self.tensor, self.experts)
        return experts.transpose(1, 2) if self.layout == "experts_in_out" else experts

    @property
    def bias(self) -> Tensor | None:  # (out,)
        """The layer's bias, or None; experts have none that can be edited."""
        bias: Tensor | None = getattr(self.module, "bias", None) if self.expert is None else None
        return bias

    def assign_bias(self, bias: Tensor | None) -> None:
        """Replace the layer's bias (out,); None removes it."""
        parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.module.register_parameter("bias", parameter)

    @property
    def stored_name(self) -> str:
        """Full name of the parameter that holds the weight."""
        return f"{self.name}.{self.parameter}" if self.expert is None else self.owner

    @property
    def shape(self) -> tuple[int, int]:  # (out, in)
        out, inner = self.weight.shape
        return out, inner

    @property
    def owner(self) -> str:
        """The name of the packed weight in a checkpoint: the layer's, or the fused parameter's of all experts."""
        return self.name if self.expert is None else self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Block:
    """One decoder layer of the model; its weights are in memory only while it is loaded."""

    index: int
    prefix: str  # model.layers.0.
    module: nn.Module
    counts: frozenset[int] = frozenset()  # see `control_counts`
    shared: frozenset[str] = frozenset()  # full names of parameters that other blocks or the embedding use too

    @property
    def name(self) -> str:
        """model.layers.0"""
        return self.prefix.rstrip(".")

    @cached_property
    def names(self) -> list[str]:
        """Names of the block's parameters and buffers, without the prefix."""
        return list(self.module.state_dict())

    def views(self) -> list[View]:
        """The weight matrices that methods may edit, in the order of the model class. Packed weights are not among them.

        Nor are those shared with other blocks. Those with a `control` are edited only if a recipe names them.
        """
        modules = dict(self.module.named_modules())
        views: list[View] = []
        for path, module in modules.items():
            own = _views(module, (self.prefix + path).rstrip("."))
            found = [v for v in own if not bare(v.name) and v.stored_name not in self.shared]
            if isinstance(module, nn.Linear) and found:
                parts = path.split(".")
                classes = [type(modules[".".join(parts[: n + 1])]).__name__ for n in range(len(parts))]
                found = [replace(v, control=control(path, classes, v.shape, self.counts)) for v in found]
            views.extend(found)
        return views

    def replace(self, name: str, module: nn.Module) -> nn.Module:
        """Put `module` in the place of the layer with this full name; returns the layer that was there."""
        path, _, leaf = name.removeprefix(self.prefix).rpartition(".")
        parent = self.module.get_submodule(path)
        old = parent.get_submodule(leaf)
        setattr(parent, leaf, module)
        return old

    def others(self) -> list[str]:
        """Full names of matrices that no method may edit: they stay as they are, and plan and report list them."""
        editable = {(id(v.module), v.parameter) for v in self.views()}
        return [
            self.prefix + (f"{path}.{name}" if path else name)
            for path, module in self.module.named_modules()
            for name, p in module._parameters.items()
            if p is not None and p.dim() >= 2 and (id(module), name) not in editable and not isinstance(module, PACKED)
        ]


def blocks(source: ModelSource) -> list[Block]:
    """The decoder blocks in order: of the outermost lists of modules in the language model the one with most parameters.

    Raises PareError if the model has no such list.
    """
    name, layers = _decoder(source.model)
    counts = control_counts(source.config)
    shared = frozenset([*source.tied, *source.tied.values()])
    return [Block(i, f"{name}.{i}.", layer, counts, shared) for i, layer in enumerate(layers)]


def by_owner(views: Iterable[View]) -> dict[str, list[View]]:
    """What is stored as one weight, by its name: a layer alone, or all experts of a fused parameter."""
    owners: dict[str, list[View]] = {}
    for view in views:
        owners.setdefault(view.owner, []).append(view)
    return owners


def decoder_list(source: ModelSource) -> nn.ModuleList:
    """The list of decoder layers inside the model. Raises PareError as `blocks` does."""
    return _decoder(source.model)[1]


def known(source: ModelSource) -> bool:
    """Whether our tests cover the model's family."""
    return source.family in FAMILIES


def _decoder(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    inside = _text_prefix(model)
    lists = [(name, module) for name, module in lists if name.startswith(inside)] or lists
    if not lists:
        raise PareError(
            f"{type(model).__name__} has no list of blocks, so it cannot be walked block by block. "
            "Decoder-only models are supported: see the families in the README."
        )
    # lists further down belong to experts, or to encoders of images and sound
    return max(lists, key=lambda item: (-item[0].count("."), _numbers(item[1])))


def _numbers(layers: nn.Module) -> int:
    """How many weights these modules have, packed ones counted as dense."""
    packed = {id(p) for m in layers.modules() if isinstance(m, PACKED) for p in m.parameters(recurse=False)}
    sizes = sum(m.spec.size for m in layers.modules() if isinstance(m, PACKED))
    return sizes + sum(p.numel() for p in layers.parameters() if id(p) not in packed)


def _text_prefix(model: Any) -> str:
    """Where the language model lies in a model that reads images or sound too: model.language_model. and the like."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{name}." if name else ""


def _views(module: nn.Module, name: str) -> Iterator[View]:
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        yield View(name, module, "weight", "linear")
    elif kind == "Conv1D" and hasattr(module, "nf"):  # transformers' GPT-2 layer: weight is (in, out)
        yield View(name, module, "weight", "conv1d")
    elif kind in STACKED:
        attribute, layouts = STACKED[kind]
        for parameter, layout in layouts.items():
            yield from _expert_views(module, name, parameter, layout, getattr(module, attribute))
    elif kind in EXPERTS or hasattr(module, "is_transposed"):  # transformers' fused experts say how they multiply
        layout = EXPERTS.get(kind) or ("experts_in_out" if module.is_transposed else "experts")
        for parameter, tensor in module._parameters.items():
            if tensor is not None and tensor.dim() == 3:
                yield from _expert_views(module, name, parameter, layout, len(tensor))


def _expert_views(module: nn.Module, name: str, parameter: str, layout: Layout, experts: int) -> Iterator[View]:
    """A view of each expert of a fused parameter; packed already, it has none."""
    if parameter in module._parameters:
        for e in range(experts):
            yield View(f"{name}.{parameter}.{e}", module, parameter, layout, e, experts)


def _separate(tensor: Tensor, experts: int) -> Tensor:
    """A fused parameter with a dimension for the experts, whose rows it may hold one after another."""
    return tensor if tensor.dim() == 3 else tensor.view(experts, -1, tensor.shape[-1])
