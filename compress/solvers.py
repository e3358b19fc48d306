"""Masks and weight updates as separate pieces; a paper's method is a named combination of one of each."""

from collections.abc import Callable

import torch
from torch import Tensor

from paredown.compress.sparsity import NofM, Sparsity, check_width, keep_mask, row_wise
from paredown.compress.statistics import InputStats, InverseCholesky

BLOCK = 128  # columns that are updated at once: errors reach the rest of the matrix as one product per block


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


def sparsegpt_sweep(
    weight: Tensor, inverse: InverseCholesky, choose: Callable[[Tensor, Tensor, int], Tensor | None], width: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Prune column by column, each error made up for by the columns to its right. Frantar & Alistarh 2023, alg. 1.

    weight (out, in) any float dtype; computed in float32. `choose(updated, scales, first)` is asked before column
    `first`, with the block's updated weights (out, columns) from there and their `diag U`, and returns the keep mask of
    as many columns as it decides now, or None.
    Returns the updated weight (out, in) float32 with zeros where dropped, and the mask.
    """
    factor, size = inverse.factor, weight.shape[1]
    work = weight.float().clone()  # (out, in)
    work[:, inverse.dead] = 0.0
    keep = torch.empty(work.shape, dtype=torch.bool, device=work.device)
    for begin in range(0, size, width):
        end = min(begin + width, size)
        local = factor[begin:end, begin:end]  # (columns, columns)
        # columns are rows here: each step then touches contiguous memory
        block = work[:, begin:end].T.contiguous()  # (columns, out)
        errors = torch.zeros_like(block)  # (columns, out)
        scales = local.diagonal().tolist()
        for i in range(end - begin):
            decided = choose(block[i:].T, local.diagonal()[i:], begin + i)
            if decided is not None:
                keep[:, begin + i : begin + i + decided.shape[1]] = decided
            dropped = ~keep[:, begin + i]  # (out,)
            torch.div(block[i] * dropped, scales[i], out=errors[i])
            block[i].masked_fill_(dropped, 0.0)
            if i + 1 < end - begin:
                block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1.0)
        work[:, begin:end] = block.T
        if end < size:
            work[:, end:].addmm_(errors.T, factor[begin:end, end:], alpha=-1.0)
    return work, keep


def adaptive_mask(sparsity: Sparsity, rows: int, size: int) -> Callable[[Tensor, Tensor, int], Tensor | None]:
    """SparseGPT's own mask: `w^2 / diag(U)^2` of the updated weights, per block of columns over all rows jointly,
    or per group of m. Counts are exact for the whole matrix: what one block rounds off the next one makes good."""
    check_width(size, sparsity)

    def per_group(updated: Tensor, scales: Tensor, first: int) -> Tensor | None:
        assert isinstance(sparsity, NofM)
        if first % sparsity.m:
            return None
        group = updated[:, : sparsity.m] / scales[: sparsity.m]  # (out, m)
        return keep_mask(group.square(), sparsity)

    decided = 0  # columns that have their mask: the sweep's blocks may have any width

    def per_block(updated: Tensor, scales: Tensor, first: int) -> Tensor | None:
        nonlocal decided
        assert not isinstance(sparsity, NofM)
        if 0 < first < decided:
            return None
        decided = first + updated.shape[1]
        score = (updated / scales).square()  # (out, columns)
        before, after = (round(sparsity * rows * columns) for columns in (first, first + score.shape[1]))
        return keep_mask(score, (after - before) / score.numel(), within="layer")

    return per_group if isinstance(sparsity, NofM) else per_block


def fixed_mask(keep: Tensor) -> Callable[[Tensor, Tensor, int], Tensor | None]:
    """A mask that was chosen before the sweep."""
    return lambda updated, scales, first: keep if first == 0 else None
