"""The experts that the router chooses most often stay. A baseline of Lasby et al. 2025 (arXiv 2510.13999).

S_j = number of tokens that the router sends to expert j.
"""

from dataclasses import dataclass

from torch import Tensor

from paredown.compress.methods.base import register
from paredown.compress.methods.structured.experts import ExpertMethod, Experts, outputs_of


@register("expert_frequency")
@dataclass(frozen=True)
class ExpertFrequency(ExpertMethod):
    def scores(self, experts: Experts) -> Tensor:
        return outputs_of(experts).count
