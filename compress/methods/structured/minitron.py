"""Minitron: the channels or heads with the largest activations stay. Muralidharan et al. 2024 (arXiv 2407.14679).

F_j = (sum over windows of (mean over tokens of |a_j|)^2)^(1/2), the paper's best pair of aggregations: L2 over windows of a
mean over tokens. a_j is what the channel hands to the reader; of a head the norm of its output stands for |a_j|, and a key
and value that several query heads share have the sum of their scores. The paper goes on with distillation.
"""

from dataclasses import dataclass

from torch import Tensor

from paredown.compress.methods.base import Units, register
from paredown.compress.methods.structured.width import Scored
from paredown.compress.numerics.moments import Need


@register("minitron")
@dataclass(frozen=True)
class Minitron(Scored):
    reads = frozenset({Need.WINDOW_MEAN})

    def scores(self, units: Units) -> Tensor:
        return units.stats.inputs.window_mean.sqrt()
