"""Ours: the experts whose weighted outputs add up to most over all tokens stay, fitted to what the whole mixture gave.

S_j = sum over the tokens x that the router sends to expert j of g_j(x) |f_j(x)|_2: the score of REAP (Lasby et al. 2025,
arXiv 2510.13999) is the mean over these tokens, which does not ask how many there are. The fit is by least squares over the
last matrices of all experts that stay, with the router's new choice: see survey/expert_fit.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from paredown.compress.methods.base import Damping, register
from paredown.compress.methods.structured.experts import ExpertMethod, Experts, Fit, outputs_of


@register("paredown_experts")
@dataclass(frozen=True)
class ParedownExperts(ExpertMethod):
    refit: bool = True
    damping: Damping = 0.01
    rounds: Annotated[int, Field(ge=1)] = 3

    def scores(self, experts: Experts) -> Tensor:
        stats = outputs_of(experts)
        return stats.count * stats.gated

    @property
    def fit(self) -> Fit | None:
        return Fit(self.damping, self.rounds) if self.refit else None
