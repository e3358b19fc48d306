"""Tensors of a group in which units become the mean of several."""

from collections.abc import Sequence

import torch
from torch import Tensor

from paredown.compress.methods.base import Part


def averaged(tensor: Tensor, parts: Sequence[Part], into: Tensor) -> Tensor:
    """A copy in which each unit is the mean of those that go `into` it, a unit's index for each (units,), itself among them.

    `parts` are those of this tensor. Means are float64, the result has the tensor's dtype. Units that nothing goes into
    become zeros.
    """
    result, units = tensor.clone(), len(into)
    sizes = into.bincount(minlength=units).clamp_min(1)
    for part in parts:
        span = result.narrow(part.dim, part.first, units * part.width).unflatten(part.dim, (units, part.width))
        total = torch.zeros_like(span, dtype=torch.float64).index_add_(part.dim, into, span.double())
        shape = [units if dim == part.dim else 1 for dim in range(span.dim())]
        span.copy_(total / sizes.view(shape))
    return result
