"""SparseGPT's update, column by column, under any mask. Frantar & Alistarh 2023 (arXiv 2301.00774)."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from paredown.compress.numerics.cholesky import InverseCholesky
from paredown.compress.numerics.masks import NofM, Sparsity, check_width, keep_mask

BLOCK = 128  # columns that are updated at once: errors reach the rest of the matrix as one product per block


@dataclass(frozen=True)
class Choose:
    """Which weights stay, chosen column by column while others are updated, or for the whole weight at once.

    `next_columns(updated, scales, first)` is the mask (out, columns) of one or more columns from column `first` on, given
    the updated weights (out, columns) from there to the end of the block and their `diag U` (columns,).
    `whole()` is the mask (out, in) for an update that does not go column by column; `inverse()` is the factor that
    computing it needs. `pattern`: `next_columns` chooses n of every m by `|updated / scales|`, as a kernel can too.
    """

    next_columns: Callable[[Tensor, Tensor, int], Tensor]
    whole: Callable[[], Tensor]
    inverse: Callable[[], InverseCholesky] | None = None
    pattern: NofM | None = None


def fixed_mask(keep: Tensor) -> Choose:
    """A mask that does not depend on updates. keep (out, in) bool."""
    return Choose(lambda updated, scales, first: keep[:, first : first + updated.shape[1]], lambda: keep)


def adaptive_mask(sparsity: Sparsity, weight: Tensor, inverse: Callable[[], InverseCholesky]) -> Choose:
    """SparseGPT's own mask: `w^2 / diag(U)^2` of the updated weights, per block of columns over all rows jointly,
    or per group of m. Counts are exact for the whole matrix: each block corrects for the rounding of those before.

    weight (out, in). `whole` takes a sweep of its own, for which it calls `inverse`. Raises PareError if m does not
    divide the width.
    """
    rows, size = weight.shape
    check_width(size, sparsity)
    pattern = sparsity if isinstance(sparsity, NofM) else None

    def next_columns(updated: Tensor, scales: Tensor, first: int) -> Tensor:
        if isinstance(sparsity, NofM):
            return keep_mask((updated[:, : sparsity.m] / scales[: sparsity.m]).abs(), sparsity)
        score = (updated / scales).abs()  # (out, columns)
        before, after = (round(sparsity * rows * columns) for columns in (first, first + score.shape[1]))
        return keep_mask(score, (after - before) / score.numel(), within="layer")

    def whole() -> Tensor:  # (out, in)
        # not `whole` itself: in a circle of references the weight and its moments would outlive the layer
        choose = Choose(next_columns, _not_needed, pattern=pattern)
        return sparsegpt_sweep(weight, inverse(), choose, block_columns(sparsity))[1]

    return Choose(next_columns, whole, inverse, pattern)


def _not_needed() -> Tensor:
    raise AssertionError("a sweep chooses column by column")


def sparsegpt_sweep(
    weight: Tensor, inverse: InverseCholesky, choose: Choose, width: int = BLOCK, fused: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Prune column by column; columns to the right make up for each error. Frantar & Alistarh 2023, algorithm 1.

    weight (out, in) any float dtype; computed in float32, `width` columns at a time. `choose.next_columns` is called
    whenever the next column has no mask yet. `fused`: the columns of a block in one Triton kernel, or in a Python loop;
    None takes the kernel on a GPU, where Triton is installed.
    Returns the updated weight (out, in) float32 with zeros where removed, and the mask.
    """
    factor, size = inverse.factor, weight.shape[1]
    if fused is None:
        fused = weight.is_cuda and find_spec("triton") is not None
    sweep_block = _fused_block if fused else _block
    work = weight.float().clone()  # (out, in)
    work[:, inverse.dead] = 0.0
    keep = torch.empty(work.shape, dtype=torch.bool, device=work.device)
    for begin in range(0, size, width):
        end = min(begin + width, size)
        local = factor[begin:end, begin:end].contiguous()  # (columns, columns)
        # columns are rows here: each step then touches contiguous memory
        block = work[:, begin:end].T.contiguous()  # (columns, out)
        errors, stays = sweep_block(block, local, choose, begin)  # (columns, out)
        work[:, begin:end], keep[:, begin:end] = block.T, stays.T
        work[:, end:].addmm_(errors.T, factor[begin:end, end:], alpha=-1.0)
    return work, keep


def _block(block: Tensor, local: Tensor, choose: Choose, first: int) -> tuple[Tensor, Tensor]:
    """Sweep a block (columns, out) in place, column by column. local (columns, columns): the block's part of U; first:
    the number of its first column. Returns the errors, which the columns to the right make up for, and the mask.
    """
    scales = local.diagonal().tolist()
    errors = torch.empty_like(block)  # (columns, out)
    stays = torch.empty_like(block, dtype=torch.bool)  # (columns, out)
    chosen = 0
    for i in range(len(block)):
        if i == chosen:
            mask = choose.next_columns(block[i:].T, local.diagonal()[i:], first + i)  # (out, columns)
            chosen += mask.shape[1]
            stays[i:chosen] = mask.T
        torch.mul(block[i], ~stays[i], out=errors[i]).div_(scales[i])
        block[i].mul_(stays[i])
        block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1.0)
    return errors, stays


def _fused_block(block: Tensor, local: Tensor, choose: Choose, first: int) -> tuple[Tensor, Tensor]:
    """As `_block`, with a kernel for all columns whose mask is known at once, or that can choose the mask itself."""
    from paredown.kernels import obs_sweep

    pattern = choose.pattern
    if pattern and pattern.m in obs_sweep.GROUPS:
        updated, errors, stays = obs_sweep.sweep(block, local, pattern=(pattern.n, pattern.m))
        block.copy_(updated)
        return errors, stays
    errors = torch.empty_like(block)  # (columns, out)
    stays = torch.empty_like(block, dtype=torch.bool)  # (columns, out)
    i = 0
    while i < len(block):
        mask = choose.next_columns(block[i:].T, local.diagonal()[i:], first + i).T  # (columns, out)
        end = i + len(mask)
        block[i:end], errors[i:end], stays[i:end] = obs_sweep.sweep(block[i:end], local[i:end, i:end], mask)
        block[end:].addmm_(local[i:end, end:].T, errors[i:end], alpha=-1.0)
        i = end
    return errors, stays


def block_columns(sparsity: Sparsity) -> int:
    """How many columns the sweep takes at a time: about BLOCK, and whole groups of m."""
    return max(BLOCK // sparsity.m, 1) * sparsity.m if isinstance(sparsity, NofM) else BLOCK
