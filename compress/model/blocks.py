"""A model seen as a row of decoder blocks, and each weight matrix of a block seen as `(out, in)`, whatever its class."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.storage.modules import PACKED

Layout = Literal["linear", "conv1d", "experts"]

# Families whose tiny models our tests compress, save, reload and compare. Others are tried by structure, and say so.
KNOWN_FAMILIES = frozenset(
    {
        "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "opt",
        "gpt2", "gpt_neox", "bloom", "falcon", "mixtral", "qwen3_moe", "mamba", "mamba2",
    }
)  # fmt: skip
# Linears that are never compressed: they steer, and weigh next to nothing.
NEVER = {
    "router": "a router: choosing the wrong expert costs more than it saves",
    "shared_expert_gate": "a gate with one output",
    "dt_proj": "used as a bare matrix by the state-space scan, not called as a layer",
}


@dataclass(frozen=True)
class View:
    """One weight matrix: what methods see is `(out, in)`; what the module holds may be transposed or a slice of 3-D."""

    name: str  # model.layers.0.self_attn.q_proj; of a fused expert: model.layers.0.mlp.experts.gate_up_proj.3
    module: nn.Module
    parameter: str  # the attribute of `module` that holds it
    layout: Layout
    expert: int | None = None

    @property
    def raw(self) -> Tensor:
        """The tensor as the module multiplies with it (a view: its storage is the module's)."""
        tensor: Tensor = getattr(self.module, self.parameter)
        return tensor if self.expert is None else tensor[self.expert]

    @property
    def weight(self) -> Tensor:  # (out, in)
        return self.raw.T if self.layout == "conv1d" else self.raw

    def assign(self, weight: Tensor) -> None:
        """Put an edited weight `(out, in)` in place."""
        weight = weight.T.contiguous() if self.layout == "conv1d" else weight
        if self.expert is None:
            setattr(self.module, self.parameter, nn.Parameter(weight, requires_grad=False))
        else:
            self.raw.copy_(weight)

    @property
    def shape(self) -> tuple[int, int]:  # (out, in)
        out, inner = self.weight.shape
        return out, inner

    @property
    def owner(self) -> str:
        """Under which name the packed weight is written: the layer, or the fused parameter of all experts."""
        return self.name if self.expert is None else self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Block:
    """One decoder layer of the skeleton."""

    index: int
    prefix: str  # model.layers.0.
    module: nn.Module

    @cached_property
    def names(self) -> list[str]:
        """Names of its weights, relative to the prefix."""
        return list(self.module.state_dict())

    def views(self) -> list[View]:
        """Its weight matrices as `(out, in)`, in the order of the model class. Packed ones are not edited again."""
        found: list[View] = []
        for path, module in self.module.named_modules():
            found.extend(_views(module, (self.prefix + path).rstrip(".")))
        return [v for v in found if never(v.name) is None]

    def others(self) -> list[str]:
        """Matrices of the block that no method sees: kept as they are, and named in plan and report."""
        seen = {(id(v.module), v.parameter) for v in self.views()}
        return [
            self.prefix + (f"{path}.{name}" if path else name)
            for path, module in self.module.named_modules()
            for name, p in module._parameters.items()
            if p is not None and p.dim() >= 2 and (id(module), name) not in seen and not _is_packed(module)
        ]


def blocks(source: ModelSource) -> list[Block]:
    """The decoder blocks in order.

    Found by structure: the one list of equal modules that holds most of the model. Raises PareError if there is none.
    """
    name, layers = _decoder(source.model)
    return [Block(i, f"{name}.{i}.", layer) for i, layer in enumerate(layers)]


def decoder_list(source: ModelSource) -> nn.ModuleList:
    return _decoder(source.model)[1]


def known(source: ModelSource) -> bool:
    return source.family in KNOWN_FAMILIES


def never(name: str) -> str | None:
    """Why a linear of this name is never compressed, or None."""
    return next((why for part, why in NEVER.items() if part in name.split(".")), None)


def select(views: list[View], include: list[str], skip: list[str], head: str) -> tuple[list[View], list[View]]:
    """Split into targeted and left-out views. Patterns are globs on the full name or any dotted part of it.

    The output head is no part of a block and is never targeted; its name (and `lm_head`) may stand in `skip` all the same.
    Raises PareError for a pattern that matches nothing.
    """
    names = [v.name for v in views]
    for pattern in [*include, *skip]:
        if not any(matches(n, pattern) for n in names) and not (matches(head, pattern) or pattern == "lm_head"):
            parts = sorted({part for n in names for part in n.split(".") if not part.isdigit()})
            raise PareError(
                f"the target pattern {pattern!r} matches no linear layer.{did_you_mean(pattern, parts)} "
                f"Layers are named like {names[0]!r}; parts that a pattern can match: {', '.join(parts)}."
            )
    chosen = [
        v for v in views if any(matches(v.name, p) for p in include) and not any(matches(v.name, p) for p in skip)
    ]
    return chosen, [v for v in views if v not in chosen]


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches the whole name or a run of dotted parts: `q_proj`, `layers.0.*`, `self_attn.*`."""
    return fnmatch(name, pattern) or fnmatch(f".{name}.", f"*.{pattern}.*")


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
    elif (
        hasattr(module, "is_transposed") and not module.is_transposed
    ):  # transformers' fused experts: (expert, out, in)
        for parameter, tensor in module._parameters.items():
            if tensor is not None and tensor.dim() == 3:
                yield from (
                    View(f"{name}.{parameter}.{e}", module, parameter, "experts", e) for e in range(len(tensor))
                )


def _is_packed(module: Any) -> bool:
    return isinstance(module, PACKED)
