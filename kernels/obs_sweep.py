"""SparseGPT's sweep over a block of columns in one launch. Frantar & Alistarh 2023 (arXiv 2301.00774), algorithm 1.

From the left to the right, with U the upper Cholesky factor of the inverse Hessian, for column j and all k > j:

    e_j = 0 where the weight stays, else w_j / U_jj;    w_k <- w_k - U_jk e_j

Rows of the weight do not depend on each other, so each thread owns a row and threads exchange nothing. A thread holds TILE
columns in registers. These first receive the errors of all columns before them, which it has written to memory, and then
send on their own. Every weight is corrected column after column, in the same order as in a plain loop. Plain Triton.
"""

# Triton's language is untyped, and a tuple may grow in a loop that is unrolled

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 16  # columns in registers: a multiple of each m in GROUPS
ROWS = 32  # rows of a program, which is one warp
GROUPS = (1, 2, 4, 8)  # the m of the n:m patterns that the kernel can choose


@triton.jit
def send_on(weights, error, factor_ptr, first, last, START: tl.constexpr, EVEN: tl.constexpr):
    """`weights` (columns first, first + 1, ... of a row) after the error of a column. factor_ptr: the row of U of that
    column. START: how many of the weights lie to the left of the error's effect, and stay as they are."""
    after = ()
    for j in tl.static_range(len(weights)):
        if j < START:
            after += (weights[j],)
        else:
            # columns beyond the last are computed but not stored
            at = first + j if EVEN else tl.minimum(first + j, last)
            after += (weights[j] - tl.load(factor_ptr + at) * error,)
    return after


@triton.jit
def highest(scores, FIRST: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """Which of scores FIRST .. FIRST + M - 1 are among the N highest of these M; of equal scores the first. M masks."""
    keeps = ()
    for i in tl.static_range(M):
        beaten = tl.zeros_like(scores[0]).to(tl.int32)
        for j in tl.static_range(M):
            if j < i:
                beaten += tl.where(scores[FIRST + i] > scores[FIRST + j], 0, 1)
            elif j > i:
                beaten += tl.where(scores[FIRST + j] > scores[FIRST + i], 1, 0)
        keeps += (beaten < N,)
    return keeps


@triton.jit
def scored(weights, scales):
    """The square root of what removing each weight costs: `|w / U_jj|`."""
    scores = ()
    for j in tl.static_range(len(weights)):
        scores += (tl.abs(tl.div_rn(weights[j], scales[j])),)
    return scores


@triton.jit(do_not_specialize=["columns", "rows"])  # one kernel for every size of layer
def obs_sweep_kernel(
    block_ptr, factor_ptr, keep_ptr, updated_ptr, errors_ptr, columns, rows,
    N: tl.constexpr, M: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """block, keep (uint8), updated, errors (columns, rows), factor (columns, columns). N = 0: keep is read; else it is
    written: N of every M columns. EVEN: TILE divides columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here, last = row < rows, columns - 1
    stride = rows.to(tl.int64)
    for first in range(0, columns, TILE):
        weights, scales = (), ()
        for j in tl.static_range(TILE):
            at = first + j if EVEN else tl.minimum(first + j, last)
            weights += (tl.load(block_ptr + at * stride + row, here, other=0),)
            scales += (tl.load(factor_ptr + at * columns + at),)
        for k in tl.range(0, first, loop_unroll_factor=4):
            error = tl.load(errors_ptr + k * stride + row, here, other=0)
            weights = send_on(weights, error, factor_ptr + k * columns, first, last, 0, EVEN)
        for j in tl.static_range(TILE):
            place, inside = (first + j) * stride + row, here & (first + j <= last)
            if N == 0:
                keep = tl.load(keep_ptr + place, inside, other=1) != 0
            else:
                if j % M == 0:
                    keeps = highest(scored(weights, scales), j, N, M)
                keep = keeps[j % M]
                tl.store(keep_ptr + place, keep.to(tl.uint8), inside)
            error = tl.where(keep, 0.0, tl.div_rn(weights[j], scales[j]))
            tl.store(updated_ptr + place, tl.where(keep, weights[j], 0.0), inside)
            tl.store(errors_ptr + place, error, inside)
            row_of_factor = factor_ptr + tl.minimum(first + j, last) * columns
            weights = send_on(weights, error, row_of_factor, first, last, j + 1, EVEN)
        tl.debug_barrier()  # what this warp has written is seen by its loads above


def sweep(
    block: Tensor, factor: Tensor, keep: Tensor | None = None, pattern: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune the columns of a block one after another; those to the right make up for each error. One launch.

    block (columns, out) float32: columns of the weight as rows; factor (columns, columns) float32: their part of U, of which
    the upper triangle is read. Either `keep` (columns, out) bool says what stays, or `pattern` (n, m) with
    m in GROUPS: of every m columns, each row keeps the n of the highest `(w / U_jj)^2` when the sweep arrives there; of
    equal ones the first.
    Returns new tensors (columns, out): the updated block with zeros where removed, the errors e, and the mask. Raises
    ValueError for a pattern that the kernel cannot choose, and unless exactly one of `keep` and `pattern` is given.
    """
    _check(block, keep, pattern)
    (columns, rows), (n, m) = block.shape, pattern or (0, 1)
    block, factor = block.contiguous(), factor.contiguous()
    mask = torch.empty_like(block, dtype=torch.bool) if keep is None else keep.contiguous()  # (columns, out)
    updated, errors = torch.empty_like(block), torch.empty_like(block)  # (columns, out)
    with torch.cuda.device_of(block):
        obs_sweep_kernel[(triton.cdiv(rows, ROWS),)](
            block, factor, mask.view(torch.uint8), updated, errors, columns, rows,
            N=n, M=m, EVEN=columns % TILE == 0, TILE=TILE, ROWS=ROWS, num_warps=1, num_stages=1,
        )  # fmt: skip
    return updated, errors, mask


def naive(
    block: Tensor, factor: Tensor, keep: Tensor | None = None, pattern: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `sweep` computes, as a plain loop, in the precision of its arguments: float32 or float64."""
    _check(block, keep, pattern)
    n, m = pattern or (0, 1)
    updated, errors = block.clone(), torch.empty_like(block)  # (columns, out)
    mask = torch.empty_like(block, dtype=torch.bool) if keep is None else keep  # (columns, out)
    scales = factor.diagonal()[:, None]  # (columns, 1)
    for j in range(len(block)):
        if keep is None and j % m == 0:
            scores = (updated[j : j + m] / scales[j : j + m]).abs()  # (m, out)
            order = scores.argsort(dim=0, descending=True, stable=True)
            mask[j : j + m] = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, order[:n], True)
        errors[j] = torch.where(mask[j], 0.0, updated[j] / scales[j])
        updated[j] = torch.where(mask[j], updated[j], 0.0)
        updated[j + 1 :] -= factor[j, j + 1 :, None] * errors[j]
    return updated, errors, mask


def _check(block: Tensor, keep: Tensor | None, pattern: tuple[int, int] | None) -> None:
    if (keep is None) == (pattern is None):
        raise ValueError("a sweep needs either a mask or a pattern n:m")
    if pattern and (pattern[1] not in GROUPS or not 1 <= pattern[0] <= pattern[1] or len(block) % pattern[1]):
        n, m = pattern
        raise ValueError(f"{n}:{m} of {len(block)} columns: m must be one of {GROUPS} and divide the columns, n 1 to m")
