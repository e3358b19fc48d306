"""Magnitude: keep the largest weights of a layer, whatever their inputs. Han et al. 2015 (arXiv 1506.02626)."""

from dataclasses import dataclass

from torch import Tensor

from paredown.compress.methods.base import register
from paredown.compress.methods.pruning.base import MASKS, NoUpdate, Pruner
from paredown.compress.numerics.masks import Sparsity, keep_mask
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.scores import magnitude_score
from paredown.compress.numerics.sweep import Choose, fixed_mask


@MASKS.register("magnitude")
@dataclass(frozen=True)
class MagnitudeMask:
    """`|W|`, compared over the whole layer."""

    needs = frozenset[Need]()

    def choose(self, weight: Tensor, stats: Stats, sparsity: Sparsity) -> Choose:
        return fixed_mask(keep_mask(magnitude_score(weight), sparsity, within="layer"))


@register("magnitude")
@dataclass(frozen=True)
class Magnitude(Pruner):
    def pair(self) -> tuple[MagnitudeMask, NoUpdate]:
        return MagnitudeMask(), NoUpdate()
