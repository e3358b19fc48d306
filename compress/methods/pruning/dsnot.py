"""DSnoT: exchange removed for kept weights until each row's expected output is that of the dense row; weights stay.

Zhang et al. 2023, Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs (arXiv 2310.08915). MLPs keep the
mask that they begin with, as in the authors' code unless it is told otherwise (`--skip_layer mlp`).
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from paredown.compress.methods.base import Damping, register
from paredown.compress.methods.pruning.base import UPDATES, Mask, NoUpdate, Pruner
from paredown.compress.methods.pruning.magnitude import MagnitudeMask
from paredown.compress.methods.pruning.sparsegpt import SparseGPTMask
from paredown.compress.methods.pruning.wanda import WandaMask
from paredown.compress.numerics.dynamic_masks import Expected, regrown
from paredown.compress.numerics.edits import Masked
from paredown.compress.numerics.masks import Sparsity
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.sweep import Choose

Threshold = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Cycles = Annotated[int, Field(ge=1, le=10_000)]
# the authors' code sums expected errors over the tokens of a window, and theirs have so many
WINDOW = 2048
# how MLPs and their linears are called in the families of transformers
MLPS = ("*mlp*", "*feed_forward*", "*ffn*", "*fc1", "*fc2", "*expert*", "*moe*")


@UPDATES.register("dsnot")
@dataclass(frozen=True)
class DSnoTUpdate:
    """Moves the mask by pairs that bring the expected error of a row's output to zero; the weights stay as they are."""

    threshold: Threshold = 0.1  # of the expected error, summed over a window of 2048 tokens
    cycles: Cycles = 50  # pairs of a row, at most

    needs = frozenset({Need.SECOND_MOMENT, Need.MEAN})

    def apply(self, weight: Tensor, choose: Choose, stats: Stats, sparsity: Sparsity) -> Masked:
        inputs = stats.inputs
        variance = inputs.second_moment_diagonal - inputs.mean.square()  # (in,)
        expected = Expected(inputs.mean, variance, inputs.rms)
        keep = regrown(weight, choose.whole(), expected, sparsity, self.threshold / WINDOW, self.cycles)
        return NoUpdate().apply(weight, replace(choose, whole=lambda: keep), stats, sparsity)


@register("dsnot")
@dataclass(frozen=True)
class DSnoT(Pruner):
    initial: Literal["wanda", "sparsegpt", "magnitude"] = "wanda"  # the mask that it starts from
    threshold: Threshold = 0.1  # of the expected error, summed over a window of 2048 tokens
    cycles: Cycles = 50  # pairs of a row, at most
    damping: Damping = 0.01  # of the initial mask sparsegpt
    still: tuple[str, ...] = MLPS  # patterns of the names of layers whose mask stays the initial one

    def for_layer(self, name: str) -> "DSnoT":
        return replace(self, cycles=0) if any(fnmatch(name, pattern) for pattern in self.still) else self

    def pair(self) -> tuple[Mask, DSnoTUpdate]:
        masks: dict[str, Mask] = {
            "wanda": WandaMask(),
            "sparsegpt": SparseGPTMask(self.damping),
            "magnitude": MagnitudeMask(),
        }
        return masks[self.initial], DSnoTUpdate(self.threshold, self.cycles)
