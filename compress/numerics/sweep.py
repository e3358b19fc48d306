"""Masks and weight updates as separate pieces; a paper's method is a named combination of one of each."""

from collections.abc import Callable

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.numerics.masks import NofM, Sparsity, check_width, keep_mask, row_wise
from paredown.compress.numerics.moments import InputStats, InverseCholesky

BLOCK = 128  # columns that are updated at once: errors reach the rest of the matrix as one product per block

# `choose(updated, scales, first)` -> the keep mask (out, columns) of one or more columns from column `first` on, given
# the updated weights (out, columns) from there to the end of the block and their `diag U` (columns,)
Choose = Callable[[Tensor, Tensor, int], Tensor]


def magnitude_score(weight: Tensor, stats: InputStats) -> Tensor:  # (out, in)
    """`|W|`."""
    return weight.float().abs()


def wanda_score(weight: Tensor, stats: InputStats) -> Tensor:  # (out, in)
    """`|W| * ||x||`. Sun et al. 2023, eq. 1 (arXiv 2306.11695)."""
    return weight.float().abs() * stats.rms.float()


def masked(weight: Tensor, keep: Tensor) -> Tensor:  # (out, in)
    """The kept weights bit for bit, and +0.0 elsewhere."""
    # as integers, so that a dropped negative weight becomes +0.0 and not -0.0
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return row_wise(lambda part, stays: part.view(bits) * stays, weight.contiguous(), keep).view(weight.dtype)


def narrowed(updated: Tensor, dtype: torch.dtype) -> Tensor:
    """Updated weights in the checkpoint's dtype. Raises PareError where one left its range."""
    narrow = updated.to(dtype)
    if not bool(torch.isfinite(narrow.sum(dtype=torch.float32))):
        raise PareError(f"the update gave values that {dtype} cannot hold: raise damping, or try --dtype float32.")
    return narrow


def sparsegpt_sweep(
    weight: Tensor, inverse: InverseCholesky, choose: Choose, width: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Prune column by column, each error made up for by the columns to its right. Frantar & Alistarh 2023, alg. 1.

    weight (out, in) any float dtype; computed in float32, `width` columns at a time. `choose` is asked whenever the
    next column has no mask yet.
    Returns the updated weight (out, in) float32 with zeros where dropped, and the mask.
    """
    factor, size = inverse.factor, weight.shape[1]
    work = weight.float().clone()  # (out, in)
    work[:, inverse.dead] = 0.0
    keep = torch.empty(work.shape, dtype=torch.bool, device=work.device)
    for begin in range(0, size, width):
        end = min(begin + width, size)
        local = factor[begin:end, begin:end].contiguous()  # (columns, columns)
        scales = local.diagonal().tolist()
        # columns are rows here: each step then touches contiguous memory
        block = work[:, begin:end].T.contiguous()  # (columns, out)
        errors = torch.empty_like(block)  # (columns, out)
        stays = torch.empty_like(block, dtype=torch.bool)  # (columns, out)
        chosen = 0
        for i in range(end - begin):
            if i == chosen:
                mask = choose(block[i:].T, local.diagonal()[i:], begin + i)  # (out, columns)
                chosen += mask.shape[1]
                stays[i:chosen] = mask.T
            torch.mul(block[i], ~stays[i], out=errors[i]).div_(scales[i])
            block[i].mul_(stays[i])
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1.0)
        work[:, begin:end], keep[:, begin:end] = block.T, stays.T
        work[:, end:].addmm_(errors.T, factor[begin:end, end:], alpha=-1.0)
    return work, keep


def block_columns(sparsity: Sparsity) -> int:
    """How many columns the sweep takes at a time: about BLOCK, and whole groups of m."""
    return max(BLOCK // sparsity.m, 1) * sparsity.m if isinstance(sparsity, NofM) else BLOCK


def adaptive_mask(sparsity: Sparsity, rows: int, size: int) -> Choose:
    """SparseGPT's own mask: `w^2 / diag(U)^2` of the updated weights, per block of columns over all rows jointly,
    or per group of m. Counts are exact for the whole matrix: what one block rounds off the next one makes good."""
    check_width(size, sparsity)

    def choose(updated: Tensor, scales: Tensor, first: int) -> Tensor:
        if isinstance(sparsity, NofM):
            return keep_mask((updated[:, : sparsity.m] / scales[: sparsity.m]).abs(), sparsity)
        score = (updated / scales).abs()  # (out, columns)
        before, after = (round(sparsity * rows * columns) for columns in (first, first + score.shape[1]))
        return keep_mask(score, (after - before) / score.numel(), within="layer")

    return choose


def fixed_mask(keep: Tensor) -> Choose:
    """A mask that was chosen before the sweep."""
    return lambda updated, scales, first: keep[:, first : first + updated.shape[1]]
