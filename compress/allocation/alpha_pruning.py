"""AlphaPruning: blocks whose spectra have heavier tails keep more. Lu et al. 2024 (arXiv 2410.10912)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from paredown.compress.allocation.base import ALLOCATIONS, Budget
from paredown.compress.allocation.by_score import ByScore, scaled
from paredown.compress.allocation.shares import capped
from paredown.compress.numerics.moments import Stats

ROWS, ASPECT, PLACES = 100, 2, 10  # of FARMS' windows: rows, columns for each row, and how many along each side


@ALLOCATIONS.register("alpha_pruning")
@dataclass(frozen=True)
class AlphaPruning(ByScore):
    """The fraction removed grows with the exponent of the tail of the spectrum of `W^T W`, linearly from `1 - spread` to
    `1 + spread` times a common fraction. A block's exponent is the mean of its layers'.
    """

    spread: Annotated[float, Field(ge=0, lt=1)] = 0.3
    # over windows of one aspect ratio, which do not confound a tail with a shape: Hu et al. 2025, FARMS (arXiv 2506.06280)
    farms: bool = False

    def score(self, layers: Sequence[tuple[Tensor, Stats]]) -> float:
        return fmean(hill_exponent(eigenvalues(weight.float(), self.farms)) for weight, _ in layers)

    def shares(self, scores: Mapping[str, float], budget: Budget) -> Mapping[str, float]:
        wanted = {name: 1 - self.spread + 2 * self.spread * place for name, place in scaled(scores).items()}
        removed = capped(budget.layers, wanted, sum(layer.size for layer in budget.layers) - budget.numbers)
        return {name: 1 - share for name, share in removed.items()}


def hill_exponent(values: Tensor) -> float:
    """`1 + k / sum ln(value / least)` over the upper half, k values, of eigenvalues in any order."""
    upper = values.double().sort().values[len(values) // 2 :].clamp_min(1e-300)
    return 1 + len(upper) / max(float((upper / upper[0]).log().sum()), 1e-12)


def eigenvalues(weight: Tensor, farms: bool) -> Tensor:
    """Of W^T W, without those that are zero by shape; with `farms`, of windows evenly placed over the weight, together."""
    if not farms:
        values: Tensor = torch.linalg.svdvals(weight)
        return values.square()
    rows = min(ROWS, *weight.shape)
    columns = min(ASPECT * rows, weight.shape[1])
    windows = [
        weight[i : i + rows, j : j + columns]
        for i in _places(weight.shape[0] - rows)
        for j in _places(weight.shape[1] - columns)
    ]
    values = torch.linalg.svdvals(torch.stack(windows))  # (windows, rows)
    return values.square().flatten()


def _places(last: int) -> range:
    """At most PLACES from 0 on to about `last`, evenly spaced."""
    step = max(1, last // (PLACES - 1))
    return range(0, min(PLACES, last // step + 1) * step, step)
