"""Products with low-rank weights for few tokens, in two kernels; for one linear or for several with the same input.

`down` writes `x @ right.T` as partial sums over parts of the columns: this gives enough programs to read at full bandwidth
without atomics. `up` adds the partial sums in a fixed order, rounds once to the dtype of the weights as the reference does,
and multiplies by `left`. From compute capability 9.0 on, `up` starts while `down` finishes (programmatic dependent launch):
it loads its first weights before the sums are ready.

A group is several linears with one input (q, k and v; gate and up), its members. Their `right` factors are stacked (sum of
ranks, in), their `left` factors (out_i, rank_i) follow one another in one flat tensor, and their outputs are side by side.
PIFA uses the same two kernels: the output of a pivot row is copied from the sums, and the coefficients of the other rows
are loaded in the order of the output, so the permutation costs nothing. CUR is `down`, `up` into float32, and `up` again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from paredown.kernels.primitives import INTERPRETED, dependent_launch, dot


@triton.jit(do_not_specialize=["tokens"])
def down(
    x_ptr, right_ptr, sums_ptr, tokens, ranks, columns,
    PDL: tl.constexpr, INTERP: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """x (tokens, columns); right (ranks, columns); sums (SPLITS, tokens, ranks). A split sums every SPLITS-th block of
    COLUMNS columns."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    split = tl.program_id(2)
    step = tl.arange(0, COLUMNS)
    if PDL:  # `up` may start as soon as the GPU has room for it; it waits for the end of this kernel itself
        tl.extra.cuda.gdc_launch_dependents()
    # ranks beyond the last are computed but not stored
    right = right_ptr + tl.minimum(rank, ranks - 1).to(tl.int64)[:, None] * columns + step[None, :]
    x = x_ptr + token[None, :] * columns + step[:, None]
    total = tl.zeros((RANKS, TOKENS), tl.float32)
    for column in tl.range(split * COLUMNS, columns, SPLITS * COLUMNS):
        here = step < columns - column
        weights = tl.load(right + column, here[None, :], other=0.0, eviction_policy="evict_first")
        total = dot(weights, tl.load(x + column, here[:, None] & (token < tokens)[None, :], other=0.0), total, INTERP)
    tl.store(
        sums_ptr + (split * tokens.to(tl.int64) + token)[None, :] * ranks + rank[:, None],
        total,
        (rank < ranks)[:, None] & (token < tokens)[None, :],
    )


@triton.jit
def hidden(sums, split_size, SPLITS: tl.constexpr, there, DTYPE: tl.constexpr):
    """The sum of the splits, in order, rounded to DTYPE. sums: pointers into the first split; there: which are valid."""
    total = tl.load(sums, there, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(sums + split * split_size, there, other=0.0)
    return total.to(DTYPE)


@triton.jit(do_not_specialize=["tokens"])
def up(
    sums_ptr, left_ptr, order_ptr, bias_ptr, y_ptr, tokens, ranks, outs,
    MEMBERS: tl.constexpr, PIFA: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr, INTERP: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """sums (SPLITS, tokens, sum of ranks); left flat; y (tokens, sum of outs); ranks and outs: tuples with one number per
    member. PIFA: left holds the coefficients, and order is (sum of outs,)."""
    # the member that this tile belongs to: its rank and rows, and where its tiles, ranks, rows and weights start
    tile = tl.program_id(1)
    zero = tl.full((), 0, tl.int64)
    rank, out = ranks[0], outs[0]
    first_tile, first_rank, first_out, first_weight = 0, 0, 0, zero
    all_tiles, all_ranks, all_outs, all_weights = 0, 0, 0, zero
    for i in tl.static_range(MEMBERS):
        mine = tile >= all_tiles
        rank, out = tl.where(mine, ranks[i], rank), tl.where(mine, outs[i], out)
        first_tile, first_rank = tl.where(mine, all_tiles, first_tile), tl.where(mine, all_ranks, first_rank)
        first_out, first_weight = tl.where(mine, all_outs, first_out), tl.where(mine, all_weights, first_weight)
        all_tiles, all_ranks, all_outs = all_tiles + tl.cdiv(outs[i], ROWS), all_ranks + ranks[i], all_outs + outs[i]
        all_weights += (zero + outs[i] - ranks[i] if PIFA else zero + outs[i]) * ranks[i]

    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = (tile - first_tile) * ROWS + tl.arange(0, ROWS)
    step = tl.arange(0, RANKS)
    if PIFA:
        place = tl.load(order_ptr + first_out + row, row < out, other=0)
        pivot = place < rank
        source, stored = tl.maximum(place - rank, 0), ~pivot
    else:
        source, stored = tl.minimum(row, out - 1), row < out
    left = left_ptr + first_weight + source.to(tl.int64)[:, None] * rank + step[None, :]
    split_size = tokens.to(tl.int64) * all_ranks
    sums = sums_ptr + token[None, :] * all_ranks + first_rank
    dtype: tl.constexpr = left_ptr.dtype.element_ty
    known = (token < tokens)[None, :]

    weights = tl.load(left, stored[:, None] & (step < rank)[None, :], other=0.0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PIFA:
        own = hidden(sums + place[:, None], split_size, SPLITS, known & (pivot & (row < out))[:, None], dtype)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    h = hidden(sums + step[:, None], split_size, SPLITS, known & (step < rank)[:, None], dtype)
    total = dot(weights, h, total, INTERP)
    for first in tl.range(RANKS, rank, RANKS):
        here = step < rank - first
        weights = tl.load(left + first, stored[:, None] & here[None, :], other=0.0, eviction_policy="evict_first")
        h = hidden(sums + (first + step)[:, None], split_size, SPLITS, known & here[:, None], dtype)
        total = dot(weights, h, total, INTERP)
    if PIFA:
        total = tl.where(pivot[:, None], own.to(tl.float32), total)
    if BIAS:
        total += tl.load(bias_ptr + first_out + row, row < out, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y_ptr + token[None, :] * all_outs + (first_out + row)[:, None],
        total.to(y_ptr.dtype.element_ty),
        known & (row < out)[:, None],
    )
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@dataclass(frozen=True)
class Tile:
    """Launch parameters of a product. None: chosen from the sizes. All are powers of two, except `splits` and `stages`."""

    block_tokens: int | None = None  # at least 16
    down_ranks: int = 32
    down_columns: int | None = None  # per step
    splits: int | None = None  # number of partial sums, each over a part of the columns
    up_rows: int = 32
    up_ranks: int | None = None  # per step
    warps: int = 4
    stages: int = 3

    def tokens_for(self, tokens: int) -> int:
        return self.block_tokens or min(64, max(16, triton.next_power_of_2(tokens)))


def lowrank_matmul(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, y: Tensor,
    ranks: Sequence[int], outs: Sequence[int], **tile: int,
) -> None:  # fmt: skip
    """y = x @ (left_i @ right_i).T + bias for each member i of a group, side by side. A single linear is a group of one.

    x (tokens, in); right (sum of ranks, in); left: the (out_i, rank_i) of all members, flat (of a single one, in any shape);
    bias (sum of outs,); y (tokens, sum of outs), in the dtype of x or float32. All contiguous, on one device. `tile`: fields
    of Tile; another name raises TypeError.
    """
    _up(partial_sums(x, right, **tile), left, None, bias, y, ranks, outs, Tile(**tile))


def pifa_matmul(
    x: Tensor, pivots: Tensor, coefficients: Tensor, order: Tensor, bias: Tensor | None, y: Tensor,
    ranks: Sequence[int], outs: Sequence[int], **tile: int,
) -> None:  # fmt: skip
    """The same for members in the form of PIFA: pivots (sum of ranks, in); coefficients: the (out_i - rank_i, rank_i) of all
    members, flat; order (sum of outs,) int32: the place of each row in the list of its own member's pivots followed by
    that member's other rows."""
    _up(partial_sums(x, pivots, **tile), coefficients, order, bias, y, ranks, outs, Tile(**tile))


def cur_matmul(
    x: Tensor, columns: Tensor, link: Tensor, rows: Tensor, bias: Tensor | None, y: Tensor, **tile: int
) -> None:
    """y = x @ (columns @ link @ rows).T + bias. x (tokens, in); columns (out, c); link (c, r); rows (r, in); bias (out,); y
    (tokens, out)."""
    launch, (out, width), rank = Tile(**tile), columns.shape, link.shape[1]
    linked = torch.empty(1, len(x), width, dtype=torch.float32, device=x.device)
    _up(partial_sums(x, rows, **tile), link, None, None, linked, [rank], [width], launch)
    _up(linked, columns, None, bias, y, [width], [out], launch)


def partial_sums(x: Tensor, right: Tensor, **tile: int) -> Tensor:  # (splits, tokens, ranks)
    """float32 partial sums: added over the splits they are `x @ right.T`. x (tokens, in); right (ranks, in)."""
    (tokens, columns), ranks, launch = x.shape, len(right), Tile(**tile)
    block = launch.tokens_for(tokens)
    step = launch.down_columns or max(64, 4096 // block)
    programs = triton.cdiv(tokens, block), triton.cdiv(ranks, launch.down_ranks)
    # enough programs to fill a large GPU; but every further split is one more set of sums for `up` to read
    busy = triton.next_power_of_2(triton.cdiv(128, programs[0] * programs[1]))
    splits = launch.splits or min(busy, 8, max(1, 256 // block))
    splits = min(splits, triton.cdiv(columns, step))
    sums = torch.empty(splits, tokens, ranks, dtype=torch.float32, device=x.device)
    down[(*programs, splits)](
        x, right, sums, tokens, ranks, columns,
        PDL=dependent_launch(x.device), INTERP=INTERPRETED,
        TOKENS=block, RANKS=launch.down_ranks, COLUMNS=step, SPLITS=splits,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return sums


def _up(
    sums: Tensor, left: Tensor, order: Tensor | None, bias: Tensor | None, y: Tensor,
    ranks: Sequence[int], outs: Sequence[int], tile: Tile,
) -> None:  # fmt: skip
    splits, tokens, _ = sums.shape
    block = tile.tokens_for(tokens)
    # the partial sums of a step take at most 16 KB of shared memory
    most_ranks = triton.next_power_of_2(4096 // (block * splits) + 1) // 2
    step = tile.up_ranks or max(16, min(triton.next_power_of_2(max(ranks)), most_ranks))
    dependent = dependent_launch(sums.device)
    options: dict[str, Any] = {"launch_pdl": True} if dependent else {}
    up[(triton.cdiv(tokens, block), sum(triton.cdiv(out, tile.up_rows) for out in outs))](
        sums, left, y if order is None else order, y if bias is None else bias, y, tokens, tuple(ranks), tuple(outs),
        MEMBERS=len(ranks), PIFA=order is not None, BIAS=bias is not None, PDL=dependent, INTERP=INTERPRETED,
        TOKENS=block, ROWS=tile.up_rows, RANKS=step, SPLITS=splits,
        num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip
