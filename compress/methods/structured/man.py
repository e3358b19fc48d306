"""MAN: the experts whose outputs are largest stay, however the router weighs them. A baseline, named by its score.

S_j = mean over the tokens x that the router sends to expert j of |f_j(x)|_2: the mean activation norm. REAP (Lasby et al.
2025, arXiv 2510.13999) multiplies with the router's weight inside the mean.
"""

from dataclasses import dataclass

from torch import Tensor

from paredown.compress.methods.base import register
from paredown.compress.methods.structured.experts import ExpertMethod, Experts, outputs_of


@register("man")
@dataclass(frozen=True)
class Man(ExpertMethod):
    def scores(self, experts: Experts) -> Tensor:
        return outputs_of(experts).norm
