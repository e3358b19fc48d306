"""A model as a list of decoder blocks, and each weight matrix of a block as `(out, in)`, whatever class holds it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.targets import never
from paredown.compress.storage.modules import PACKED
from paredown.compress.storage.spec import Layout

# Families whose tiny models our tests compress, save, reload and compare. Other models are tried too, with a warning.
KNOWN_FAMILIES = frozenset(
    {
        "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "opt",
        "gpt2", "gpt_neox", "bloom", "falcon", "mixtral", "qwen3_moe", "mamba", "mamba2",
    }
)  # fmt: skip


@dataclass(frozen=True)
class View:
    """One weight matrix as methods read it, `(out, in)`; its module may hold it transposed, or inside a 3-D parameter."""

    name: str  # model.layers.0.self_attn.q_proj; of a fused expert: model.layers.0.mlp.experts.gate_up_proj.3
    module: nn.Module
    parameter: str  # the attribute of `module` that holds the tensor
    layout: Layout
    expert: int | None = None  # index of this weight in a fused parameter of experts

    @property
    def raw(self) -> Tensor:
        """The tensor as the module multiplies with it; it shares the module's memory."""
        tensor: Tensor = getattr(self.module, self.parameter)
        return tensor if self.expert is None else tensor[self.expert]

    @property
    def weight(self) -> Tensor:  # (out, in)
        """The weight as methods read it; it shares the module's memory."""
        return self.raw.T if self.layout == "conv1d" else self.raw

    def assign(self, weight: Tensor) -> None:
        """Replace the weight by another one of the same shape (out, in)."""
        weight = weight.T.contiguous() if self.layout == "conv1d" else weight
        if self.expert is None:
            setattr(self.module, self.parameter, nn.Parameter(weight, requires_grad=False))
        else:
            self.raw.copy_(weight)

    @property
    def whole(self) -> Tensor:
        """The weight (out, in); for a fused expert the parameter of all experts (experts, out, in)."""
        if self.expert is None:
            return self.weight
        experts: Tensor = getattr(self.module, self.parameter)
        return experts

    @property
    def bias(self) -> Tensor | None:  # (out,)
        """The layer's bias, or None."""
        bias: Tensor | None = getattr(self.module, "bias", None)
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

    @property
    def name(self) -> str:
        """model.layers.0"""
        return self.prefix.rstrip(".")

    @cached_property
    def names(self) -> list[str]:
        """Names of the block's parameters and buffers, without the prefix."""
        return list(self.module.state_dict())

    def views(self) -> list[View]:
        """The weight matrices that methods may edit, in the order of the model class. Packed weights are not among them."""
        views: list[View] = []
        for path, module in self.module.named_modules():
            views.extend(_views(module, (self.prefix + path).rstrip(".")))
        return [view for view in views if never(view.name) is None]

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
    """The decoder blocks in order: the list of modules of one class that holds the most parameters.

    Raises PareError if the model has no such list.
    """
    name, layers = _decoder(source.model)
    return [Block(i, f"{name}.{i}.", layer) for i, layer in enumerate(layers)]


def decoder_list(source: ModelSource) -> nn.ModuleList:
    """The list of decoder layers inside the model. Raises PareError as `blocks` does."""
    return _decoder(source.model)[1]


def known(source: ModelSource) -> bool:
    """Whether our tests cover the model's family."""
    return source.family in KNOWN_FAMILIES


def _decoder(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    ]
    if not lists:
        raise PareError(
            f"{type(model).__name__} has no list of equal blocks, so it cannot be walked block by block. "
            "Decoder-only models are supported: see the families in the README."
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _views(module: nn.Module, name: str) -> Iterator[View]:
    if isinstance(module, nn.Linear):
        yield View(name, module, "weight", "linear")
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' GPT-2 layer: weight is (in, out)
        yield View(name, module, "weight", "conv1d")
    elif not getattr(module, "is_transposed", True):  # transformers' fused experts: (expert, out, in)
        for parameter, tensor in module._parameters.items():
            if tensor is not None and tensor.dim() == 3:
                yield from (
                    View(f"{name}.{parameter}.{e}", module, parameter, "experts", e) for e in range(len(tensor))
                )
