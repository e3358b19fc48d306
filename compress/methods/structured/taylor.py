"""What the loss loses without a channel, to first order. Ma et al. 2023, LLM-Pruner (arXiv 2305.11627).

I_j = sum_i |W_ij dL/dW_ij|, or with `vector` |sum_i W_ij dL/dW_ij|, over the column of the reader, the last of the weights
that a channel couples: the paper's aggregation "last-only". L is the loss summed over the calibration text.
"""

from dataclasses import dataclass

from torch import Tensor

from paredown.compress.methods.base import Units, register
from paredown.compress.methods.structured.width import Scored
from paredown.compress.numerics.moments import Need


@register("taylor")
@dataclass(frozen=True)
class Taylor(Scored):
    vector: bool = False  # a column's terms may cancel

    reads = frozenset({Need.WEIGHT_GRADIENT})

    def scores(self, units: Units) -> Tensor:
        terms = units.weight.double() * units.stats.gradient(Need.WEIGHT_GRADIENT)  # (out, in)
        return terms.sum(0).abs() if self.vector else terms.abs().sum(0)
