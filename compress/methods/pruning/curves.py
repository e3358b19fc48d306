"""What a layer is predicted to lose at each sparsity, for allocations that spend one budget on all layers."""

from collections.abc import Sequence
from itertools import pairwise
from math import exp, log

from torch import Tensor

from paredown.compress.numerics.masks import NofM
from paredown.compress.numerics.moments import Need, Stats

STEP = 0.025  # of the sparsities between two measured ones
LEAST = 1e-300  # of which a logarithm is taken


def predicted_loss(change: Tensor, stats: Stats) -> float:
    """The rise of the model's loss to second order in nats per token, `tr(G D H D^T) / 2`, for a change D (out, in).

    H is the moment of the layer's input, and G the diagonal of its output gradient's, without which this is the layer's
    own loss `tr(D H D^T)`. G off its diagonal hardly counts for pruned weights, whose errors are not aligned across rows.
    """
    if Need.OUTPUT_GRADIENT_DIAGONAL not in stats.gradients:
        return stats.inputs.energy(change)
    scale = stats.gradient(Need.OUTPUT_GRADIENT_DIAGONAL).sqrt()  # (out,)
    return stats.inputs.energy(change.float() * scale[:, None].float()) / 2


def between(sparsities: Sequence[float | NofM], losses: Sequence[float]) -> list[tuple[float | NofM, float]]:
    """Measured losses, and between fractions further ones in steps of STEP at most: their logarithms are interpolated."""
    curve = list(zip(sparsities, losses, strict=True))[:1]
    for (a, loss), (b, next_loss) in pairwise(zip(sparsities, losses, strict=True)):
        if isinstance(a, float) and isinstance(b, float):
            steps = round(abs(a - b) / STEP)
            for part in (i / steps for i in range(1, steps)):
                mixed = (1 - part) * log(max(loss, LEAST)) + part * log(max(next_loss, LEAST))
                curve.append((round(a + part * (b - a), 6), exp(mixed)))
        curve.append((b, next_loss))
    return curve
