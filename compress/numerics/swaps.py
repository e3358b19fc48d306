"""Exchange a kept weight for a removed one where the layer loss falls, and fit the others again, until nothing is gained.

With e the error of a row, r = e A its gradient and A the Gram matrix of the inputs, removing the kept weight x_p changes the
loss by `x_p^2 A_pp + 2 x_p r_p`, and putting the removed weight q at its best value then by `-(r_q + x_p A_pq)^2 / A_qq`:
both are exact, so a swap is chosen by what it gains and not by a heuristic as in DSnoT (Zhang et al. 2023, arXiv 2310.08915).
"""

import torch
from einops import rearrange
from torch import Tensor

from paredown.compress.numerics.masked_least_squares import fitted, row_losses
from paredown.compress.numerics.masks import NofM, Sparsity

SHARE = 0.1  # of the groups of a row that may swap at once: their gains are not independent
WHOLE_ROW = 128  # columns among which a mask without groups is swapped


def swapped(
    target: Tensor, keep: Tensor, gram: Tensor, sparsity: Sparsity, rounds: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """The weights (out, in) and mask after at most `rounds` of swaps, each with a fit of so many `iterations`.

    target (out, in) and gram (in, in), damped, float32. A swap stays within a group of m, so that n:m holds, and within
    WHOLE_ROW columns else. A row takes the swaps of a round only if its loss is then lower, so no round makes it worse;
    a row that gains nothing tries fewer swaps in the next.
    """
    width = sparsity.m if isinstance(sparsity, NofM) else _group_width(target.shape[1])
    x = fitted(target, keep, gram, iterations)
    losses = row_losses(target, x, gram)
    groups = target.shape[1] // width
    allowed = torch.full_like(losses, max(1, round(SHARE * groups)), dtype=torch.long)
    for _ in range(rounds):
        proposed = _proposed(target, x, keep, gram, width, allowed)
        if torch.equal(proposed, keep):
            break
        fit = fitted(target, proposed, gram, iterations, start=x)
        after = row_losses(target, fit, gram)
        better = after < losses
        x, keep = torch.where(better[:, None], fit, x), torch.where(better[:, None], proposed, keep)
        losses = torch.where(better, after, losses)
        allowed = torch.where(better, allowed, allowed // 2)
    return x, keep


def _proposed(target: Tensor, x: Tensor, keep: Tensor, gram: Tensor, width: int, allowed: Tensor) -> Tensor:
    """The mask after the best swap in each of a row's `allowed` groups that gain most; the others stay."""
    gains, removed, added = _best_swaps(target, x, keep, gram, width)  # (out, groups)
    order = gains.argsort(dim=1, descending=True)
    rank = order.argsort(dim=1)
    taken = (gains > 0) & (rank < allowed[:, None])
    groups = rearrange(keep, "out (group m) -> out group m", m=width).clone()
    groups.scatter_(
        2, removed[..., None], torch.where(taken, False, groups.gather(2, removed[..., None])[..., 0])[..., None]
    )
    groups.scatter_(
        2, added[..., None], torch.where(taken, True, groups.gather(2, added[..., None])[..., 0])[..., None]
    )
    return rearrange(groups, "out group m -> out (group m)")


def _best_swaps(target: Tensor, x: Tensor, keep: Tensor, gram: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the best swap of each group gains, the weight that it removes and the one that it adds; all (out, groups)."""
    gradient = (target - x) @ gram  # (out, in)
    gains, removed, added = [], [], []
    for first in range(0, target.shape[1], width):
        part = slice(first, first + width)
        stays, r, values, local = keep[:, part], gradient[:, part], x[:, part], gram[part, part]
        diagonal = local.diagonal()
        cost = values.square() * diagonal + 2 * values * r  # (out, p)
        gain = (r[:, None, :] + values[:, :, None] * local).square() / diagonal - cost[:, :, None]  # (out, p, q)
        gain.masked_fill_(~(stays[:, :, None] & ~stays[:, None, :]), -torch.inf)
        best, place = gain.flatten(1).max(1)
        gains.append(best)
        removed.append(place // width)
        added.append(place % width)
    return torch.stack(gains, 1), torch.stack(removed, 1), torch.stack(added, 1)


def _group_width(inner: int) -> int:
    """The widest number of columns up to WHOLE_ROW that divides a row."""
    return next(width for width in range(min(WHOLE_ROW, inner), 0, -1) if inner % width == 0)
