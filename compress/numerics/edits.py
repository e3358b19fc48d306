"""A compressed weight: its dense form, the tensors that are stored, and the module that multiplies with them.

A new form of compressed weight is one more class here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.numerics.masks import NofM, Sparsity
from paredown.compress.numerics.moments import InputStats
from paredown.compress.storage import kinds
from paredown.compress.storage.install import packed_layer
from paredown.compress.storage.spec import DENSE, Layout, Spec


class WeightEdit(ABC):
    """An edited weight (out, in) in its original dtype."""

    damping: float | None  # that the solver used, as a fraction of the mean diagonal of H
    fallback: str | None  # a numerical fallback, as the report words it
    shift: Tensor | None  # (out,) float64: to be added to the layer's output, by its bias
    keep: Tensor | None  # (out, in) bool: weights that need not be zero; None: all
    # (out, in): what the edit stands for where that is not the original weight but one that makes up for earlier errors
    aim: Tensor | None

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight (out, in)."""

    @property
    @abstractmethod
    def numbers(self) -> int:
        """How many numbers are stored of the weight."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Further entries of the layer's report, beside the share kept and the error."""

    @abstractmethod
    def spec(self, layout: Layout) -> Spec | None:
        """How it is stored in a packed checkpoint; None where the dense weight is no larger."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors to store, under the names that the spec's kind gives them."""

    @abstractmethod
    def module(self, old: nn.Module, layout: Layout, bias: Tensor | None) -> nn.Module | None:
        """A replacement of the layer `old` that multiplies as the checkpoint will; None: `old` with the dense weight.

        bias (out,): the layer's new bias; None: it keeps its own.
        """

    @abstractmethod
    def tuned(self, weight: Tensor, parameters: Mapping[str, Tensor]) -> "WeightEdit":
        """The same edit with trained numbers: the layer's `weight` (out, in), or the `parameters` of its module, by name."""

    def missed(self, original: Tensor, inputs: InputStats) -> float:
        """The `relative_error` towards `aim`: its output, and not the original weight's, is what the layer should give."""
        return self.relative_error(original if self.aim is None else self.aim, inputs)

    @abstractmethod
    def final(self) -> "WeightEdit":
        """The same edit without what only `missed` needs."""

    def relative_error(self, original: Tensor, inputs: InputStats) -> float:
        """`tr(D H D^T) / tr(W H W^T)` with D = original - edited: the output's squared error relative to its square.

        H is the Gram matrix of the inputs, or its diagonal (as of uncorrelated inputs) where only that was collected.
        """
        return inputs.energy(original, minus=self.dense()) / max(inputs.energy(original), 1e-300)


@dataclass(frozen=True)
class Masked(WeightEdit):
    """A pruned weight (out, in): exactly +0.0 where `keep`, bool of the same shape, is False."""

    weight: Tensor
    keep: Tensor
    sparsity: Sparsity
    damping: float | None = None
    fallback: str | None = None
    aim: Tensor | None = field(default=None, repr=False)
    shift: None = field(default=None, init=False)

    def dense(self) -> Tensor:  # (out, in)
        return self.weight

    @cached_property
    def numbers(self) -> int:
        return int(torch.count_nonzero(self.keep))

    @property
    def facts(self) -> dict[str, Any]:
        return {"sparsity": self.sparsity if isinstance(self.sparsity, float) else str(self.sparsity)}

    def spec(self, layout: Layout = "linear") -> Spec | None:
        """The smallest exact storage: `sparse24`, `bitmap`, or None for dense."""
        spec = mask_spec(tuple(self.weight.shape), self.numbers, self.sparsity, self.weight.element_size())
        return None if spec.kind == DENSE else replace(spec, layout=layout)

    def tensors(self) -> Mapping[str, Tensor]:
        spec = self.spec()
        return {} if spec is None else kinds.pack(spec.kind, self.weight, self.keep)

    def module(self, old: nn.Module, layout: Layout, bias: Tensor | None) -> None:
        return None  # packed, a mask gives the same products bit for bit

    def final(self) -> "Masked":
        return replace(self, aim=None)

    def tuned(self, weight: Tensor, parameters: Mapping[str, Tensor]) -> "Masked":
        return replace(self, weight=weight)


@dataclass(frozen=True)
class Factored(WeightEdit):
    """A weight that is stored as a product of smaller ones, its `parts`, and multiplied part by part."""

    kind: str
    shape: tuple[int, ...]  # (out, in), of all experts of a fused weight (experts, out, in)
    rank: int
    parts: Mapping[str, Tensor]  # by the names of the kind
    shift: Tensor | None = None  # (out,) float64: the mean of the layer's output that the parts miss
    loss: float | None = None  # in the method's own metric, relative to that of a weight of zeros
    spectrum: Mapping[str, Any] = field(default_factory=dict, repr=False)  # that was cut, as `outlined` has it
    damping: float | None = None
    fallback: str | None = None
    aim: Tensor | None = field(default=None, repr=False)
    keep: None = field(default=None, init=False)

    def dense(self) -> Tensor:  # (out, in)
        return kinds.kind_of(self.kind).unpack(self.parts, self.shape)

    def spec(self, layout: Layout = "linear") -> Spec:
        values = self.parts["values"].numel() if "values" in self.parts else None
        return Spec(self.kind, self.shape, layout, self.rank, values)

    def tensors(self) -> Mapping[str, Tensor]:
        return self.parts

    @property
    def numbers(self) -> int:
        return kinds.stored_numbers(self.spec())

    @property
    def facts(self) -> dict[str, Any]:
        facts = {"kind": self.kind, "rank": self.rank, "measured_loss": self.loss}
        return {**facts, "spectrum": self.spectrum} if self.spectrum else facts

    def module(self, old: nn.Module, layout: Layout, bias: Tensor | None) -> nn.Module:
        added = bias is not None and old.bias is None
        return packed_layer(old, replace(self.spec(layout), bias=added), self.parts, bias)

    def tuned(self, weight: Tensor, parameters: Mapping[str, Tensor]) -> "Factored":
        return replace(self, parts={name: parameters.get(name, part) for name, part in self.parts.items()})

    def final(self) -> "Factored":
        return replace(self, aim=None)

    def missed(self, original: Tensor, inputs: InputStats) -> float:
        """A shift gives the mean of the output of `aim`, so that only what varies around it is missed."""
        if self.aim is None:
            return self.relative_error(original, inputs)
        error = replace(self, shift=None).relative_error(self.aim, inputs)
        if self.shift is None:
            return error
        missing = (self.aim.double() - self.dense().double()) @ inputs.mean  # (out,)
        total = inputs.energy(self.aim)
        return max(error - float(missing @ missing) / max(total, 1e-300), 0.0)

    def relative_error(self, original: Tensor, inputs: InputStats) -> float:
        error = super().relative_error(original, inputs)
        if self.shift is None:
            return error
        # E|D x - s|^2 = E|D x|^2 - 2 s . D E[x] + |s|^2
        missing = (original.double() - self.dense().double()) @ inputs.mean  # (out,)
        total = inputs.energy(original)
        return error + float(self.shift @ (self.shift - 2 * missing)) / max(total, 1e-300)


def joined(whole: Tensor, edits: Sequence[WeightEdit | None]) -> WeightEdit:
    """One edit of a fused weight (experts, out, in) from one edit per expert; None: that expert stays dense.

    Factors are all of one kind and rank, and no expert stays dense beside them: ValueError otherwise.
    """
    factored = [edit for edit in edits if isinstance(edit, Factored)]
    if factored:
        return _stacked(factored, len(edits))
    masks = [None if edit is None else edit.keep for edit in edits]
    everything = torch.ones_like(whole[0], dtype=torch.bool)  # (out, in)
    patterns = {edit.sparsity if isinstance(edit, Masked) else 0.0 for edit in edits}
    sparsity = patterns.pop() if len(patterns) == 1 else 0.0
    keep = torch.stack([everything if mask is None else mask for mask in masks])  # (experts, out, in)
    return Masked(whole.contiguous(), keep, sparsity)


def _stacked(edits: Sequence[Factored], experts: int) -> Factored:
    first = edits[0]
    if len(edits) < experts or len({(edit.kind, edit.rank) for edit in edits}) > 1:
        raise ValueError("the experts of a fused weight are factored with one kind and one rank, or not at all")
    parts = {}
    for name in first.parts:
        own = [edit.parts[name] for edit in edits]
        # the values of bitmaps lie one after another
        parts[name] = torch.cat(own) if name == "values" and own[0].dim() == 1 else torch.stack(own)
    return Factored(first.kind, (experts, *first.shape), first.rank, parts)


def mask_spec(shape: tuple[int, ...], numbers: int, sparsity: Sparsity, element_size: int) -> Spec:
    """How a weight of which `numbers` stay is stored in the fewest bytes; kind `dense` where packing saves none.

    shape ([experts,] out, in).
    """
    if sparsity == NofM(2, 4) and shape[-1] % 4 == 0:
        return Spec("sparse24", shape, values=numbers)
    bitmap = Spec("bitmap", shape, values=numbers)
    smaller = kinds.stored_bytes(bitmap, element_size) < prod(shape) * element_size
    return bitmap if smaller else Spec(DENSE, shape, values=numbers)
