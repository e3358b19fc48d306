"""OWL: blocks with more outliers keep more. Yin et al. 2024, Outlier Weighed Layerwise Sparsity (arXiv 2310.05175)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from paredown.compress.allocation.base import ALLOCATIONS, Budget
from paredown.compress.allocation.by_score import ByScore, scaled
from paredown.compress.allocation.shares import shifted
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.scores import wanda_score


@ALLOCATIONS.register("owl")
@dataclass(frozen=True)
class OWL(ByScore):
    """The share of outliers, weights whose `|W| * ||x||` exceeds `threshold` times their block's mean, scaled to a range of
    twice `spread` around the common share. The mean is weighted by size.
    """

    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0  # the paper's M
    spread: Annotated[float, Field(ge=0, le=0.5)] = 0.08  # the paper's lambda

    needs = frozenset({Need.SECOND_MOMENT})

    def score(self, layers: Sequence[tuple[Tensor, Stats]]) -> float:
        scores = [wanda_score(weight, stats.inputs.rms) for weight, stats in layers]
        count = sum(score.numel() for score in scores)
        mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
        return sum(int((score > self.threshold * mean).sum()) for score in scores) / count

    def shares(self, scores: Mapping[str, float], budget: Budget) -> Mapping[str, float]:
        wanted = {name: 2 * self.spread * share for name, share in scaled(scores).items()}
        return shifted(budget.layers, wanted, budget.numbers)
