"""An arithmetic progression over depth: each block is sparser than the one before by the same step.

Huang et al. 2025, Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective
(arXiv 2502.14770).
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from paredown.compress.allocation.base import ALLOCATIONS, Allocation, Budget, Options
from paredown.compress.allocation.shares import options_for, shifted


@ALLOCATIONS.register("progression")
@dataclass(frozen=True)
class Progression(Allocation):
    """One number, which the paper finds by a search; below zero the first blocks are the sparsest."""

    # the fraction removed from the last block less that of the first: the paper's beta times (blocks - 1)
    slope: Annotated[float, Field(ge=-1, le=1)] = 0.2

    def allocate(self, budget: Budget) -> Options:
        blocks = sorted({layer.block for layer in budget.layers})
        step = self.slope / max(len(blocks) - 1, 1)
        wanted = {layer.name: -step * blocks.index(layer.block) for layer in budget.layers}
        return options_for(budget, shifted(budget.layers, wanted, budget.numbers))
