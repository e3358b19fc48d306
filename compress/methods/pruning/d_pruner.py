"""D-Pruner: what a weight means to a domain, by a loss that also guards what is important in general.

Zhang et al. 2024, Pruning as a Domain-specific LLM Extractor (arXiv 2405.06275). The general importance of a weight is
SparseGPT's `G = w^2 / [H^-1]_jj` on general text. The domain's loss gains `regularization * sum of G (w' - w)^2`, with the
weights `w' = w - step * g` after a step of gradient descent, so that its gradient becomes
`g' = g + 2 regularization step^2 G F` with the diagonal Fisher F. Kept are the weights of the highest `|w g' + w^2 F / 2|`.

The terms are those of the authors' code, which adds the scores of the steps of a fine-tuning up; here nothing is tuned, and
the gradients are those of the dense model. `regularization` and `step` are theirs by default; G then changes little.
"""

from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from paredown.compress.methods.base import Damping, register
from paredown.compress.methods.pruning.base import MASKS, NoUpdate, Pruner
from paredown.compress.numerics.masks import Sparsity, keep_mask
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.sweep import Choose, fixed_mask

Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
WINDOW = 2 * 2048  # the authors' H is twice the sum over the tokens of a window, and not their mean


@MASKS.register("d_pruner")
@dataclass(frozen=True)
class DPrunerMask:
    """`|w g' + w^2 F / 2|`, compared over the whole layer; g and F are taken on the text `calibration.domain`."""

    regularization: Positive = 0.1  # lambda: how much the general importance counts
    step: Positive = 0.03  # alpha: the learning rate
    damping: Damping = 0.01  # relative to the mean diagonal of H

    needs = frozenset({Need.GRAM, Need.WEIGHT_GRADIENT, Need.FISHER})

    def choose(self, weight: Tensor, stats: Stats, sparsity: Sparsity) -> Choose:
        wide, inverse = weight.float(), stats.inputs.inverse_cholesky(self.damping)
        fisher = stats.gradient(Need.FISHER).float()  # (out, in)
        general = WINDOW * (wide / inverse.factor.diagonal()).square()  # (out, in)
        general[:, inverse.dead] = 0.0
        guarded = 2 * self.regularization * self.step**2 * general * fisher
        score = wide * (stats.gradient(Need.WEIGHT_GRADIENT).float() + guarded) + wide.square() * fisher / 2
        return replace(fixed_mask(keep_mask(score.abs(), sparsity, within="layer")), inverse=lambda: inverse)


@register("d_pruner")
@dataclass(frozen=True)
class DPruner(Pruner):
    regularization: Positive = 0.1  # lambda: how much the general importance counts
    step: Positive = 0.03  # alpha: the learning rate
    damping: Damping = 0.01  # relative to the mean diagonal of H

    def pair(self) -> tuple[DPrunerMask, NoUpdate]:
        return DPrunerMask(self.regularization, self.step, self.damping), NoUpdate()
