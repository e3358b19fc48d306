"""Compress the layers of one block and put each edit in its place, where the next layers and blocks see it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn

from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, View
from paredown.compress.numerics.edits import Edit, LowRank, Masked
from paredown.compress.numerics.moments import GRADIENT_NEEDS, PAIRED_NEEDS, InputStats
from paredown.compress.recipe import Recipe
from paredown.compress.run.write import Edited
from paredown.compress.storage import modules
from paredown.compress.survey.survey import Survey, of_layer


@dataclass
class Editor:
    """Works on one block at a time: `edit` its views, then `restore` the skeleton once the block is written."""

    recipe: Recipe
    method: Any
    survey: Survey
    device: torch.device
    format: str
    layers: list[dict[str, Any]] = field(default_factory=list)  # what the report tells of each layer
    fallbacks: list[str] = field(default_factory=list)
    targeted: int = 0
    kept: int = 0
    edits: dict[str, Edit] = field(default_factory=dict)  # of this block, by view name
    tuned: bool = False  # the block's parameters were changed after they were edited
    doing: Callable[[str], None] = lambda text: None
    _views: list[View] = field(default_factory=list)
    _biases: dict[str, Tensor] = field(default_factory=dict)  # new ones, by full name
    _specs: dict[str, Any] = field(default_factory=dict)  # of the packed layers that stand in the block, by view name
    _gradients: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    _replaced: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    def begin(self, block: Block) -> None:
        self._gradients, self._views = self.survey.gradients(block, self.device), block.views()

    def edit(self, block: Block, views: list[View], stats: Mapping[str, InputStats]) -> None:
        """Compress each view and put the edit in place. A layer that no token reached follows the recipe's policy."""
        for view in views:
            began, weight = perf_counter(), view.weight
            if view.expert is not None and hasattr(self.method, "spec"):
                self.fallbacks.append(f"{view.name}: fused experts are not factored; left dense")
                self.targeted, self.kept = self.targeted + weight.numel(), self.kept + weight.numel()
                continue
            seen = self._seen(view, stats)
            if seen is None:
                continue
            self.targeted += weight.numel()
            self.doing(f"compressing {view.name}")
            edit = self._compress(view, weight, seen)
            if edit is None:
                self.kept += weight.numel()
                continue
            if edit.fallback:
                self.fallbacks.append(f"{view.name}: {edit.fallback}")
            error = edit.relative_error(weight, seen)
            added = self._place(block, view, edit)
            kept = edit.kept + added
            rank = edit.told.get("rank")
            predicted = {} if rank is None else {"predicted_loss": self.survey.predicted(view.name, rank)}
            self.layers.append(
                {
                    "name": view.name,
                    "method": self.recipe.method,
                    "kept": kept / weight.numel(),
                    "relative_error": error,
                    "damping": edit.damping,
                    "flops_per_token": 2 * kept,  # of each token that reaches the layer; masks skip what they dropped
                    "seconds": perf_counter() - began,
                    **edit.told,
                    **predicted,
                }
            )
            self.kept += kept
            self.edits[view.name] = edit

    def written(self, block: Block) -> Edited:
        """The block's changes as they are now."""
        if not self.tuned:
            return Edited(self._views, self.edits, self._biases, self._specs)
        live = dict(block.module.named_parameters())
        edits = {v.name: _live(v, self.edits[v.name], block, live) for v in self._views if v.name in self.edits}
        packed_parts = {f"{v.name}.{part}" for v in self._views if v.name in edits for part in _parts(edits[v.name])}
        vectors: dict[str, Tensor] = {block.prefix + name: p for name, p in live.items() if p.dim() == 1}
        vectors = {name: p for name, p in vectors.items() if name not in packed_parts}
        return Edited(self._views, edits, vectors, self._specs)

    def restore(self) -> None:
        """Give the skeleton its own layers back, and forget the block."""
        for parent, leaf, original in self._replaced:
            setattr(parent, leaf, original)
        self._replaced.clear()
        self.edits, self._biases, self._specs, self.tuned = {}, {}, {}, False

    def _seen(self, view: View, stats: Mapping[str, InputStats]) -> InputStats | None:
        """The statistics of a view, or None if it is left as it is, which is told."""
        seen, needs = stats.get(view.name), self.method.needs
        if seen is not None:
            return seen.with_gradient(self._gradients.get(view.name, {}))
        if view.expert is None:
            self.fallbacks.append(f"{view.name}: never called as a layer, so it was left as it is")
        elif self.recipe.idle == "dense" or needs & GRADIENT_NEEDS:
            why = "idle: dense" if self.recipe.idle == "dense" else "no gradient either"
            self.fallbacks.append(f"{view.name}: no calibration token reached this expert; left dense ({why})")
        else:
            self.fallbacks.append(f"{view.name}: no calibration token reached this expert; scored without data")
            return InputStats.uniform(view.shape[1], needs & PAIRED_NEEDS, self.device)
        return None

    def _compress(self, view: View, weight: Tensor, seen: InputStats) -> Edit | None:
        method = of_layer(self.survey, self.method, view.name)
        if method is None:
            self.fallbacks.append(f"{view.name}: left dense by the allocation")
            return None
        try:
            edit: Edit | None = method.compress(weight, seen)
        except PareError as fault:
            raise PareError(f"{view.name}: {fault}") from fault
        if edit is None:
            self.fallbacks.append(f"{view.name}: left dense, because factors would store no less")
        return edit

    def _place(self, block: Block, view: View, edit: Edit) -> int:
        """Put the edit where the layer is; returns how many numbers a new bias adds."""
        bias = self._bias(view, edit)
        if not isinstance(edit, LowRank) or self.format == "dense":
            view.assign(edit.dense())
            if bias is not None:
                view.module.bias = nn.Parameter(bias, requires_grad=False)
            return 0
        added = bias is not None and _own_bias(view) is None
        self._specs[view.name] = {**edit.spec, "layout": view.layout, **({"bias": True} if added else {})}
        path, _, leaf = view.name.removeprefix(block.prefix).rpartition(".")
        parent = block.module.get_submodule(path)
        self._replaced.append((parent, leaf, view.module))
        setattr(parent, leaf, modules.packed_layer(view.module, self._specs[view.name], edit.tensors, bias))
        return view.shape[0] if added else 0

    def _bias(self, view: View, edit: Edit) -> Tensor | None:
        shift = getattr(edit, "shift", None)
        if shift is None:
            return None
        own = _own_bias(view)
        weight = view.weight
        bias: Tensor = (shift if own is None else own.double() + shift).to(weight.dtype)
        self._biases[f"{view.name}.bias"] = bias
        return bias


def _parts(edit: Edit) -> Mapping[str, Tensor]:
    return edit.tensors if isinstance(edit, LowRank) else {}


def _own_bias(view: View) -> Tensor | None:
    return cast(Tensor | None, view.module.bias)


def _live(view: View, edit: Edit, block: Block, parameters: Mapping[str, Tensor]) -> Edit:
    """The edit with the numbers that its module holds now."""
    if isinstance(edit, Masked):
        return replace(edit, weight=view.weight)
    assert isinstance(edit, LowRank)
    path = view.name.removeprefix(block.prefix)
    return replace(edit, tensors={name: parameters.get(f"{path}.{name}", t) for name, t in edit.tensors.items()})
