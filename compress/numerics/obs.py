"""Exact OBS, one weight of a row at a time. Frantar & Alistarh 2022, OBC, algorithm 1 (arXiv 2208.11580)."""

import torch
from torch import Tensor

from paredown.compress.numerics.masks import NofM, Sparsity, kept_count

ROW_BYTES = 1 << 29  # of the inverses, one for each row, that are downdated together


def obs_mask(weight: Tensor, gram: Tensor, sparsity: Sparsity) -> Tensor:  # (out, in) bool
    """Which weights stay: each step removes the weight of a row with the least `w_p^2 / [H^-1]_pp`, and updates the others.

    weight (out, in); gram H (in, in), damped; float64 inside. Every row keeps the same number; of n:m a group that has n
    left gives no more. It takes `in` squared numbers a row, and as many operations for each weight removed: for layers of a
    few hundred inputs.
    """
    inverse = torch.linalg.inv(gram.double())  # (in, in)
    rows = max(1, ROW_BYTES // (8 * inverse.numel()))
    return torch.cat([_rows_kept(part.double(), inverse, sparsity) for part in weight.split(rows)])


def _rows_kept(weight: Tensor, inverse: Tensor, sparsity: Sparsity) -> Tensor:
    out, inner = weight.shape
    each = torch.arange(out, device=weight.device)
    work, inverses = weight.clone(), inverse.expand(out, -1, -1).clone()  # (out, in, in)
    keep = torch.ones_like(work, dtype=torch.bool)
    for _ in range(inner - kept_count((1, inner), sparsity)):
        diagonal = inverses.diagonal(dim1=1, dim2=2)  # (out, in)
        loss = (work.square() / diagonal).masked_fill(~_removable(keep, sparsity), torch.inf)
        p = loss.argmin(1)  # (out,)
        column, pivot = inverses[each, :, p], inverses[each, p, p][:, None]  # (out, in), (out, 1)
        work -= column * (work[each, p][:, None] / pivot)
        inverses -= column[:, :, None] * (column / pivot)[:, None, :]
        inverses[each, p, p] = 1.0  # it takes no part any more
        keep[each, p] = False
    return keep


def _removable(keep: Tensor, sparsity: Sparsity) -> Tensor:
    if not isinstance(sparsity, NofM):
        return keep
    groups: Tensor = keep.unflatten(1, (-1, sparsity.m))
    return (groups & (groups.sum(-1, keepdim=True) > sparsity.n)).flatten(1)
