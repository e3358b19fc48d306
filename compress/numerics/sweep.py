"""SparseGPT's update, column by column, under any mask. Frantar & Alistarh 2023 (arXiv 2301.00774)."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from paredown.compress.numerics.cholesky import InverseCholesky
from paredown.compress.numerics.masks import SMALL_GROUP, NofM, Sparsity, beaten_in_group, check_width, keep_mask
from paredown.compress.numerics.precision import short_products

BLOCK = 128  # columns that are updated at once: errors reach the rest of the matrix as one product per block
LEAF = 8  # columns within a block that are updated one by one


@dataclass(frozen=True)
class Choose:
    """Which weights stay, chosen column by column while others are updated, or for the whole weight at once.

    `next_columns(updated, scales, first)` is the mask (out, columns) of one or more columns from column `first` on, given
    the updated weights (out, columns) from there to the end of the block and their `diag U` (columns,).
    `whole()` is the mask (out, in) for an update that does not go column by column; `inverse()` is the factor that
    computing it needs. `pattern`: `next_columns` chooses n of every m by `|updated / scales|`, as a kernel can too.
    `start` are weights (out, in) near the best ones on a fixed mask, from which an update may begin.
    """

    next_columns: Callable[[Tensor, Tensor, int], Tensor]
    whole: Callable[[], Tensor]
    inverse: Callable[[], InverseCholesky] | None = None
    pattern: NofM | None = None
    start: Tensor | None = None


def fixed_mask(keep: Tensor, start: Tensor | None = None) -> Choose:
    """A mask that does not depend on updates. keep (out, in) bool."""
    return Choose(lambda updated, scales, first: keep[:, first : first + updated.shape[1]], lambda: keep, start=start)


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

    weight (out, in) any float dtype; computed in float32, `width` columns at a time, whose errors reach the rest by a short
    product. `choose.next_columns` is called whenever the next column has no mask yet. `fused`: the columns of a block in one
    Triton kernel, or in a Python loop; None takes the kernel on a GPU, where Triton is installed.
    Returns the updated weight (out, in) float32 with zeros where removed, and the mask.
    """
    factor, size = inverse.factor, weight.shape[1]
    if fused is None:
        fused = weight.is_cuda and find_spec("triton") is not None
    sweep_block = _fused_block if fused else _block
    if choose.pattern and not fused:  # whose masks do not depend on blocks: fewer passes over what is to come
        width *= 2
    # columns are rows here: each step then touches contiguous memory
    work = torch.empty(size, len(weight), dtype=torch.float32, device=weight.device).copy_(weight.T)  # (in, out)
    if bool(inverse.dead.any()):
        work[inverse.dead] = 0.0
    keep = torch.empty(work.shape, dtype=torch.bool, device=work.device)  # (in, out)
    for begin in range(0, size, width):
        end = min(begin + width, size)
        local = factor[begin:end, begin:end].contiguous()  # (columns, columns)
        errors, keep[begin:end] = sweep_block(work[begin:end], local, choose, begin)  # (columns, out)
        with short_products(work.device.type):
            work[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1.0)
    return work.T.contiguous(), keep.T.contiguous()


def _block(block: Tensor, local: Tensor, choose: Choose, first: int) -> tuple[Tensor, Tensor]:
    """Sweep a block (columns, out) in place. local (columns, columns): the block's part of U; first: the number of its
    first column. Returns the errors, which the columns to the right make up for, and the mask.
    """
    errors = torch.empty_like(block)  # (columns, out)
    removed = torch.empty_like(block, dtype=torch.bool)  # (columns, out)
    scales, pattern = local.diagonal()[:, None], choose.pattern  # (columns, 1)

    def ask(i: int) -> int:
        """Choose the mask of the next columns; `errors` becomes the share of each weight that is its error."""
        if pattern and pattern.m <= SMALL_GROUP:  # as `next_columns` does, without turning a few rows around
            end = i + pattern.m
            removed[i:end] = beaten_in_group((block[i:end] / scales[i:end]).abs_(), pattern.n)
        else:
            mask = choose.next_columns(block[i:].T, scales[i:, 0], first + i)  # (out, columns)
            end = i + mask.shape[1]
            torch.logical_not(mask.T, out=removed[i:end])
        torch.div(removed[i:end], scales[i:end], out=errors[i:end])
        return end

    def columns(begin: int, end: int) -> None:
        if pattern:
            ask(begin)
        for i in range(begin, end):
            errors[i].mul_(block[i])
            block[i + 1 : end].addr_(local[i, i + 1 : end], errors[i], alpha=-1.0)

    def carry(begin: int, middle: int, end: int) -> None:
        block[middle:end].addmm_(local[begin:middle, middle:end].T, errors[begin:middle], alpha=-1.0)

    if pattern:  # the mask of a group depends on its own columns alone: later ones can wait
        _by_halves(0, len(block), pattern.m, columns, carry)
    else:
        i = 0
        while i < len(block):
            end = ask(i)
            _by_halves(i, end, LEAF, columns, carry)
            carry(i, end, len(block))
            i = end
    stays = ~removed
    block.view(torch.int32).mul_(stays)  # +0.0 where removed
    return errors, stays


def _by_halves(
    begin: int, end: int, leaf: int, columns: Callable[[int, int], None], carry: Callable[[int, int, int], None]
) -> None:
    """Call `columns(begin, end)` for every `leaf` columns in order, and `carry(begin, middle, end)` between two halves of
    any more: errors then pass on as products of matrices, which go over memory fewer times than single columns would.
    """
    if end - begin <= leaf:
        columns(begin, end)
        return
    middle = begin + max((end - begin) // 2 // leaf, 1) * leaf
    _by_halves(begin, middle, leaf, columns, carry)
    carry(begin, middle, end)
    _by_halves(middle, end, leaf, columns, carry)


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
