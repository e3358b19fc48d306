"""Prune by what the gradient of the model's loss says of a weight: what its removal costs, or whether it goes to zero.

Ma et al. 2023, LLM-Pruner: On the Structural Pruning of Large Language Models (arXiv 2305.11627), for single weights;
Sanh et al. 2020, Movement Pruning: Adaptive Sparsity by Fine-Tuning (arXiv 2005.07683), for a single step.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from paredown.compress.methods.pruning.base import MASKS
from paredown.compress.numerics.masks import Sparsity, keep_mask
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.sweep import Choose, fixed_mask


@MASKS.register("taylor")
@dataclass(frozen=True)
class TaylorMask:
    """`|w g|`, or `|w g - w^2 F / 2|` with the diagonal Fisher F for the curvature, compared over the whole layer.

    g is the gradient of the loss summed over tokens, and F the sum over sequences of each one's squared gradient: a
    second-order model of that loss. LLM-Pruner scores single weights so, and adds up the scores of a unit.
    """

    terms: Literal["first", "both"] = "first"  # of the expansion; the second alone is the mask `fisher`

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.WEIGHT_GRADIENT} | ({Need.FISHER} if self.terms == "both" else set()))

    def choose(self, weight: Tensor, stats: Stats, sparsity: Sparsity) -> Choose:
        change = weight.float() * stats.gradient(Need.WEIGHT_GRADIENT).float()  # (out, in)
        if self.terms == "both":
            change -= weight.float().square() * stats.gradient(Need.FISHER).float() / 2
        return fixed_mask(keep_mask(change.abs(), sparsity, within="layer"))


@MASKS.register("movement")
@dataclass(frozen=True)
class MovementMask:
    """`-w g`, compared over the whole layer: a step of gradient descent would make the weights that stay larger.

    Movement pruning sums this score over the steps of a fine-tuning. Here nothing is tuned: it is the score of one step
    on the whole calibration text, in which a trained model hardly moves, and it tells much less than in the paper.
    """

    needs = frozenset({Need.WEIGHT_GRADIENT})

    def choose(self, weight: Tensor, stats: Stats, sparsity: Sparsity) -> Choose:
        score = -weight.float() * stats.gradient(Need.WEIGHT_GRADIENT).float()  # (out, in)
        return fixed_mask(keep_mask(score, sparsity, within="layer"))
