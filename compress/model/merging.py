"""Tensors of a group in which units become the mean of several."""

from collections.abc import Sequence

import torch
from torch import Tensor

from paredown.compress.methods.base import Part


def averaged(tensor: Tensor, parts: Sequence[Part], into: Tensor, weights: Tensor | None = None) -> Tensor:
    """A copy in which each unit is the mean of those that go `into` it, a unit's index for each (units,), itself among them.

    `parts` are those of this tensor. `weights` (units,) say how much each unit counts, by default all the same; where those
    of a mean are all zero, and of what nothing else goes into, the unit is left alone. Means are float64, one at a time, and
    the result has the tensor's dtype.
    """
    result, units = tensor.clone(), len(into)
    counts = torch.ones(units, dtype=torch.float64) if weights is None else weights.double()
    for unit in (into.bincount(minlength=units) > 1).nonzero()[:, 0].tolist():
        members = (into == unit).nonzero()[:, 0].to(tensor.device)
        share = counts.to(tensor.device)[members]
        if bool(share.sum() > 0):
            for part in parts:
                own, dim = by_unit(tensor, part, units), part.dim
                mean = torch.tensordot(share / share.sum(), own.index_select(dim, members).double(), ([0], [dim]))
                by_unit(result, part, units).select(dim, unit).copy_(mean)
    return result


def reordered(tensor: Tensor, inner: Sequence[Part], order: Tensor) -> Tensor:
    """A copy in which each unit's channels stand in another order: place -> channel, of each unit (units, channels).

    The units are the first dimension of the tensor; `inner` says where the channels of each of them lie.
    """
    result, channels = tensor.clone(), order.shape[1]
    for unit in (order != torch.arange(channels, device=order.device)).any(1).nonzero()[:, 0].tolist():
        for part in inner:
            own = by_unit(result, part, channels)[unit]
            own.copy_(own.index_select(part.dim - 1, order[unit].to(tensor.device)))
    return result


def by_unit(tensor: Tensor, part: Part, units: int) -> Tensor:
    """The entries of a part, with dimensions for the units and for their width; it shares memory."""
    entries = tensor.narrow(part.dim, part.first, units * part.width)
    separate: Tensor = entries.unflatten(part.dim, (units, part.width))
    return separate
