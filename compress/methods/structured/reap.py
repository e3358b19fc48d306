"""REAP: the experts whose weighted outputs are largest stay. Lasby et al. 2025 (arXiv 2510.13999).

S_j = mean over the tokens x that the router sends to expert j of g_j(x) |f_j(x)|_2, where g_j(x) is the weight with which the
block adds the expert's output f_j(x). It is the mean of what a token loses with the expert, whose place another one takes.
"""

from dataclasses import dataclass

from torch import Tensor

from paredown.compress.methods.base import register
from paredown.compress.methods.structured.experts import ExpertMethod, Experts, outputs_of


@register("reap")
@dataclass(frozen=True)
class Reap(ExpertMethod):
    def scores(self, experts: Experts) -> Tensor:
        return outputs_of(experts).gated
