"""RIA: prune by a weight's share of its column and of its row, times the input's norm to a power.

Zhang et al. 2024, Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models (ICLR 2024).
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from paredown.compress.methods.base import register
from paredown.compress.methods.pruning.base import MASKS, NoUpdate, Pruner
from paredown.compress.numerics.masks import Sparsity, keep_mask
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.scores import ria_score
from paredown.compress.numerics.sweep import Choose, fixed_mask

Power = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]  # of the input's norm


@MASKS.register("ria")
@dataclass(frozen=True)
class RIAMask:
    """`(|W| / column sum + |W| / row sum) * ||x||^power`, compared within each row."""

    power: Power = 0.5

    needs = frozenset({Need.SECOND_MOMENT})

    def choose(self, weight: Tensor, stats: Stats, sparsity: Sparsity) -> Choose:
        return fixed_mask(keep_mask(ria_score(weight, stats.inputs.rms, self.power), sparsity))


@register("ria")
@dataclass(frozen=True)
class RIA(Pruner):
    power: Power = 0.5

    def pair(self) -> tuple[RIAMask, NoUpdate]:
        return RIAMask(self.power), NoUpdate()
