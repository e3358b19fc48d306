"""A pruner is a mask, which chooses the weights that stay, and an update, which lets them make up for the removed ones.

Both are registered, so that a recipe can pair any two: `{method: masked, options: {mask: wanda, update: sparsegpt}}`.
A paper's method is a named pair.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Shape, WeightMethod, check_needs
from paredown.compress.numerics.edits import Masked, mask_spec
from paredown.compress.numerics.masks import Sparsity, check_width, kept_count, masked
from paredown.compress.numerics.moments import Need, Stats
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


@dataclass(frozen=True)
class Pruner(WeightMethod):
    """A method is a subclass that names its mask and its update."""

    sparsity: Sparsity = 0.5  # the fraction removed, or "2:4" to keep 2 of every 4

    def pair(self) -> tuple[Mask, Update]:
        """The mask and the update, with their options."""
        raise NotImplementedError

    @property
    def needs(self) -> frozenset[Need]:
        mask, update = self.pair()
        return mask.needs | update.needs

    def compress(self, weight: Tensor, stats: Stats) -> Masked:
        if self.sparsity == 0:
            return Masked(weight, torch.ones_like(weight, dtype=torch.bool), 0.0)
        mask, update = self.pair()
        return update.apply(weight, mask.choose(weight, stats, self.sparsity), stats, self.sparsity)

    def expect(self, shape: Shape, element_size: int) -> Spec:
        check_width(shape[1], self.sparsity)
        return mask_spec(shape, kept_count(shape, self.sparsity), self.sparsity, element_size)

    def working_bytes(self, shape: Shape) -> int:
        """float32 scores, their columns and the mask; a sweep factors and inverts the Gram matrix in float64."""
        out, inner = shape
        return 10 * out * inner + (3 * 8 * inner * inner if Need.GRAM in self.needs else 0)
