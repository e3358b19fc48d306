"""A pruner is a mask, which chooses the weights that stay, and an update, which lets them make up for the removed ones.

Both are registered, so that a recipe can pair any two: `{method: masked, options: {mask: wanda, update: sparsegpt}}`.
A paper's method is a named pair.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Budget, Choice, Shape, Share, Shares, WeightMethod, check_needs
from paredown.compress.methods.pruning.curves import between, predicted_loss
from paredown.compress.numerics.edits import Masked, mask_spec
from paredown.compress.numerics.masks import NofM, Sparsity, check_width, kept_count, masked, parse_sparsity
from paredown.compress.numerics.moments import GRADIENT_NEEDS, INPUT_NEEDS, Need, Stats
from paredown.compress.numerics.precision import narrowed
from paredown.compress.numerics.sweep import Choose
from paredown.compress.registry import Registry
from paredown.compress.storage.spec import Spec


class Mask(Protocol):
    """Chooses which weights stay. A frozen dataclass whose fields are further options of the recipe."""

    @property
    def needs(self) -> frozenset[Need]: ...

    def choose(self, weight: Tensor, stats: Stats, sparsity: Sparsity) -> Choose:
        """For a weight (out, in): a mask that is fixed (`fixed_mask`), or one chosen while weights are updated."""
        ...


class Update(Protocol):
    """Changes the weights that stay. A frozen dataclass whose fields are further options of the recipe."""

    @property
    def needs(self) -> frozenset[Need]: ...

    def apply(self, weight: Tensor, choose: Choose, stats: Stats, sparsity: Sparsity) -> Masked:
        """The pruned weight (out, in) and its mask, which may differ from the one that `choose` gives."""
        ...


def _check(member: str) -> Callable[[str, type], None]:
    def check(name: str, cls: type) -> None:
        if missing := [m for m in ("needs", member) if not hasattr(cls, m)]:
            raise PareError(f"{name}: {cls.__qualname__} has no {' and no '.join(missing)}.")
        check_needs(name, cls)

    return check


MASKS: Registry[Mask] = Registry("mask", "paredown.compress.methods", _check("choose"), check_needs)
UPDATES: Registry[Update] = Registry("update", "paredown.compress.methods", _check("apply"), check_needs)


@UPDATES.register("none")
@dataclass(frozen=True)
class NoUpdate:
    """The weights stay as they are."""

    needs = frozenset[Need]()

    def apply(self, weight: Tensor, choose: Choose, stats: Stats, sparsity: Sparsity) -> Masked:
        keep = choose.whole()  # (out, in)
        edit = Masked(masked(weight, keep), keep, sparsity)
        if choose.inverse is None:
            return edit
        inverse = choose.inverse()
        return replace(edit, damping=inverse.damping, fallback=inverse.fallback)


MEASURED = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # sparsities whose losses are measured for an allocation


@dataclass(frozen=True)
class Pruner(WeightMethod):
    """A method is a subclass that names its mask and its update."""

    sparsity: Sparsity = 0.5  # the fraction removed, or "2:4" to keep 2 of every 4
    kept: Share | None = None  # of the targeted parameters: an allocation leaves some layers dense beside a pattern

    measured: ClassVar[Sequence[float]] = MEASURED
    weighs = True

    def __post_init__(self) -> None:
        if self.kept is None:
            return
        pattern = self.sparsity
        if not isinstance(pattern, NofM):
            raise PareError(
                f"kept {self.kept:g} goes with a pattern such as '2:4', beside which some layers stay dense. A fraction "
                f"says by itself how much stays: sparsity {1 - self.kept:g}."
            )
        if self.kept <= pattern.n / pattern.m:
            raise PareError(
                f"kept {self.kept:g} cannot be met: {pattern} in every layer leaves {pattern.n / pattern.m:g}. "
                "Ask for more, or leave kept out."
            )

    def pair(self) -> tuple[Mask, Update]:
        """The mask and the update, with their options."""
        raise NotImplementedError

    @property
    def strategy(self) -> str:
        return "uniform"

    @property
    def needs(self) -> frozenset[Need]:
        mask, update = self.pair()
        return mask.needs | update.needs

    def compress(self, weight: Tensor, stats: Stats) -> Masked:
        if self.sparsity == 0:
            return Masked(weight, torch.ones_like(weight, dtype=torch.bool), 0.0)
        goal = self.goal(weight, stats)
        mask, update = self.pair()
        edit = update.apply(goal, mask.choose(goal, stats, self.sparsity), stats, self.sparsity)
        if goal is weight:
            return edit
        return replace(edit, weight=masked(narrowed(edit.weight, weight.dtype), edit.keep), aim=goal)

    def goal(self, weight: Tensor, stats: Stats) -> Tensor:  # (out, in)
        """The dense weight that is pruned: the layer's own, or one in float32 that makes up for earlier errors."""
        return weight

    @property
    def budget(self) -> Budget:
        return Budget(self.kept if isinstance(self.sparsity, NofM) else 1 - self.sparsity, asked=True)

    @property
    def shares(self) -> Shares:
        return "few" if isinstance(self.sparsity, NofM) else "any"

    def at(self, option: float | str) -> Self:
        return replace(self, sparsity=parse_sparsity(option), kept=None)

    @property
    def surveyed(self) -> Self:
        """A pattern is measured itself, of fractions always the same ones."""
        return replace(self, kept=None) if isinstance(self.sparsity, NofM) else replace(self, sparsity=0.5)

    def choices(self, shape: Shape, weight: Tensor | None = None, stats: Stats | None = None) -> list[Choice]:
        """The pattern; or fractions in small steps, whose losses lie between those of the fractions that are measured."""
        measured = [self.sparsity] if isinstance(self.sparsity, NofM) else list(self.measured)
        removed_all, losses = nan, [nan] * len(measured)
        if weight is not None and stats is not None:
            removed_all = predicted_loss(weight, stats)
            tried = [replace(self, sparsity=s, kept=None).tried(weight, stats) for s in measured]
            losses = [predicted_loss(weight.float() - pruned.float(), stats) for pruned in tried]
        choices = [Choice(0, removed_all, None)]
        for sparsity, loss in between(measured, losses):
            numbers = kept_count(shape, sparsity)
            if choices[-1].numbers < numbers < shape[0] * shape[1]:  # of a small weight some are the same
                choices.append(Choice(numbers, loss, sparsity if isinstance(sparsity, float) else str(sparsity)))
        return choices

    def tried(self, weight: Tensor, stats: Stats) -> Tensor:  # (out, in)
        """The pruned weight by which an allocation predicts losses, from statistics of the dense model alone.

        An update that compares the dense model with the compressed one is left out.
        """
        mask, update = self.pair()
        if not update.needs <= INPUT_NEEDS | GRADIENT_NEEDS:
            update = NoUpdate()
        return update.apply(weight, mask.choose(weight, stats, self.sparsity), stats, self.sparsity).weight

    def expect(self, shape: Shape, element_size: int) -> Spec:
        check_width(shape[1], self.sparsity)
        return mask_spec(shape, kept_count(shape, self.sparsity), self.sparsity, element_size)

    def working_bytes(self, shape: Shape) -> int:
        """float32 scores, their columns and the mask; a sweep factors and inverts the Gram matrix in float64."""
        out, inner = shape
        return 10 * out * inner + (3 * 8 * inner * inner if Need.GRAM in self.needs else 0)
