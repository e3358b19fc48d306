"""DSnoT's moves of a mask: pairs of a weight that comes back and one that goes, without a change of weights.

Zhang et al. 2023, Dynamic Sparse No Training (arXiv 2310.08915), in the form of the authors' code. With m = E[x], the
output of a row misses `e = sum of w_j m_j over the removed weights`. Back comes the removed weight of the highest
`w_j m_j / Var[x_j]` where e > 0, and of the lowest where e < 0. In exchange goes, of the kept weights with `w_j m_j` of
the other sign, the one of the lowest `|w_j| ||x_j||`: both lower e where it is positive, and raise it where it is negative.
Under n:m the one of the lowest `|w_j| ||x_j||` in the group of the weight that comes back goes, whatever its sign.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.compress.numerics.masks import NofM, Sparsity, check_width, row_wise


@dataclass(frozen=True)
class Expected:
    """What is known of a layer's inputs, all (in,) float64: means, variances and root mean squares."""

    mean: Tensor
    variance: Tensor
    rms: Tensor


def regrown(
    weight: Tensor, keep: Tensor, inputs: Expected, sparsity: Sparsity, threshold: float, cycles: int
) -> Tensor:  # (out, in) bool
    """The mask after at most so many `cycles` of one pair in each row; every row keeps as many weights as before.

    weight (out, in), keep bool (out, in). A row ends once `|e| <= threshold`, or once no weight is left that would bring
    it nearer; under n:m also before e would change its sign. A weight moves once at most. Raises PareError if m does not
    divide the width.
    """
    check_width(weight.shape[1], sparsity)
    if isinstance(sparsity, NofM):
        m = sparsity.m
        return row_wise(lambda w, k: _within_groups(w, k, inputs, m, threshold, cycles), weight, keep)
    return row_wise(lambda w, k: _within_rows(w, k, inputs, threshold, cycles), weight, keep)


def _within_rows(weight: Tensor, keep: Tensor, inputs: Expected, threshold: float, cycles: int) -> Tensor:
    share = weight.double() * inputs.mean  # (rows, in): what each weight adds to the expected output
    error = (share * ~keep).sum(1, keepdim=True)  # (rows, 1)
    keep = keep.clone()
    back = _Queue(_return_order(share, keep, inputs))
    cheap = (weight.double().abs() * inputs.rms).clamp_min(torch.finfo(torch.float64).tiny)
    gone = _Queue(share.sign() / cheap * keep)
    active = torch.ones_like(error, dtype=torch.bool)
    for _ in range(cycles):
        missing = error > 0
        added, can_add = back.next(missing)
        removed, can_remove = gone.next(~missing)
        active = active & (error.abs() > threshold) & can_add & can_remove
        if not bool(active.any()):
            break
        _exchange(keep, added, removed, active)
        error += (share.gather(1, removed) - share.gather(1, added)) * active
        back.take(missing)
        gone.take(~missing)
    return keep


def _within_groups(weight: Tensor, keep: Tensor, inputs: Expected, m: int, threshold: float, cycles: int) -> Tensor:
    share = weight.double() * inputs.mean  # (rows, in)
    error = (share * ~keep).sum(1, keepdim=True)  # (rows, 1)
    missing = error > 0
    back = _Queue(_return_order(share, keep, inputs))
    cost = (weight.double().abs() * inputs.rms).masked_fill(~keep, torch.inf)  # of those that may still go
    keep = keep.clone()
    active = torch.ones_like(error, dtype=torch.bool)
    for _ in range(cycles):
        added, can_add = back.next(missing)
        group = added - added % m + torch.arange(m, device=added.device)  # (rows, m)
        least, place = cost.gather(1, group).min(1, keepdim=True)
        removed = group.gather(1, place)
        after = error + share.gather(1, removed) - share.gather(1, added)
        possible = least < torch.inf  # a group whose kept weights all went gives no more: the next one may
        active = active & can_add & (error.abs() > threshold) & (~possible | (after.sign() == error.sign()))
        if not bool(active.any()):
            break
        taken = active & possible
        _exchange(keep, added, removed, taken)
        cost.scatter_(1, removed, torch.where(taken, torch.inf, least))
        error = torch.where(taken, after, error)
        back.take(missing)
    return keep


def _return_order(share: Tensor, keep: Tensor, inputs: Expected) -> Tensor:
    """`w_j m_j / Var[x_j]` of the removed weights, and zero of the kept ones."""
    return share / inputs.variance.clamp_min(1e-30) * ~keep


class _Queue:
    """The entries of each row by a key (rows, in), from both ends: first those of the greatest key, or of the least.

    Of equal keys the first of the row lies nearer to the least. Entries of key zero are never given.
    """

    def __init__(self, key: Tensor) -> None:
        self._keys, self._order = key.sort(dim=1, stable=True)
        self._taken = torch.zeros(len(key), 2, dtype=torch.long, device=key.device)  # from the least, from the greatest

    def next(self, greatest: Tensor) -> tuple[Tensor, Tensor]:
        """The next entry of each row from the end that `greatest`, bool (rows, 1), says, and whether there is one."""
        end = greatest.long()
        taken = self._taken.gather(1, end).clamp_max(self._keys.shape[1] - 1)
        place = torch.where(greatest, self._keys.shape[1] - 1 - taken, taken)
        key = self._keys.gather(1, place)
        return self._order.gather(1, place), torch.where(greatest, key > 0, key < 0)

    def take(self, greatest: Tensor) -> None:
        """Go on to the entry behind the last that `next` gave."""
        self._taken.scatter_add_(1, greatest.long(), torch.ones_like(self._taken[:, :1]))


def _exchange(keep: Tensor, added: Tensor, removed: Tensor, rows: Tensor) -> None:
    """Let one weight of each of these `rows` come back and another one go, in place; all (rows, 1) but `keep`."""
    keep.scatter_(1, added, keep.gather(1, added) | rows)
    keep.scatter_(1, removed, keep.gather(1, removed) & ~rows)
