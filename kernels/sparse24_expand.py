"""2:4 products on any device that Triton supports: weights are expanded in registers and multiplied as dense tiles.

Also `decompress`: with many tokens it is faster to write the dense weight first and multiply with that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from paredown.kernels.primitives import INTERPRETED, dot


@triton.jit
def dense_tile(
    values_ptr, indices_ptr, row, block, columns, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr
):
    """The dense weights (ROWS, 64 BLOCKS), as int16 bits, of the rows `row` (ROWS,), from the 64-column block `block` on.
    EVEN: all of these columns exist; otherwise columns beyond the last are 0."""
    n = row.to(tl.int64)[:, None, None]
    b = block + tl.arange(0, BLOCKS)[None, :, None]
    t = tl.arange(0, 4)[None, None, :]
    words = indices_ptr + n * (4 * tl.cdiv(columns, 64)) + 4 * b + t
    word = tl.load(words) if EVEN else tl.load(words, 64 * b < columns, other=0)
    word = word.to(tl.int32)
    parts = ()
    for j in tl.static_range(4):
        group = 16 * b + 4 * j + t
        pairs = values_ptr + n * (columns // 4) + group
        two = tl.load(pairs, eviction_policy="evict_first") if EVEN else tl.load(pairs, group < columns // 4, other=0)
        # the four columns of a group in 64 bits: each of its two values is shifted by 16 times its column
        place0 = ((word << 4) >> (4 * j)) & 48
        place1 = ((word << 2) >> (4 * j)) & 48
        four = ((two & 0xFFFF).to(tl.int64) << place0) | (((two >> 16) & 0xFFFF).to(tl.int64) << place1)
        even, odd = (
            tl.join(four.to(tl.int16), (four >> 32).to(tl.int16)),
            tl.join((four >> 16).to(tl.int16), (four >> 48).to(tl.int16)),
        )
        parts += (tl.join(even, odd),)  # (row, block, t, 2, 2)
    whole = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))  # .., 2, 2: j
    return tl.reshape(tl.permute(whole, (0, 1, 5, 6, 2, 3, 4)), (ROWS, 64 * BLOCKS))


@triton.jit(do_not_specialize=["tokens"])  # one kernel for every number of tokens of a bucket
def sparse24_expand(
    x_ptr, values_ptr, indices_ptr, left_ptr, hidden_ptr, bias_ptr, y_ptr, tokens, rows, columns, rank, splits,
    BIAS: tl.constexpr, RANKED: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCKS: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """x (tokens, columns), values (rows, columns / 4) as int32 pairs, indices as int16 words, y (tokens, rows).
    RANKED adds hidden @ left.T: left (rows, rank), hidden the sum of (splits, tokens, rank) float32.
    EVEN: columns are divisible by 64 BLOCKS. Rows and tokens beyond the last repeat the last and are not stored."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for block in range(0, tl.cdiv(columns, 64), BLOCKS):
        bits = dense_tile(values_ptr, indices_ptr, tl.minimum(row, rows - 1), block, columns, EVEN, ROWS, BLOCKS)
        column = 64 * block + tl.arange(0, 64 * BLOCKS)
        xs = x_ptr + tl.minimum(token, tokens - 1)[None, :] * columns + column[:, None]
        x = tl.load(xs) if EVEN else tl.load(xs, column[:, None] < columns, other=0)
        total = dot(bits.to(x_ptr.dtype.element_ty, bitcast=True), x, total, INTERP)
    if RANKED:
        near = tl.minimum(token, tokens - 1)[None, :]
        for first in range(0, rank, 32):
            k = first + tl.arange(0, 32)
            lefts = left_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * rank + k[None, :]
            hidden = tl.zeros((32, TOKENS), tl.float32)
            for split in range(splits):
                sums = hidden_ptr + (split * tokens + near) * rank + k[:, None]
                hidden += tl.load(sums, k[:, None] < rank, other=0)
            if not INTERP:
                hidden = hidden.to(x_ptr.dtype.element_ty)
            total = dot(tl.load(lefts, k[None, :] < rank, other=0), hidden, total, INTERP)
    if BIAS:
        total += tl.load(bias_ptr + row, row < rows, other=0).to(tl.float32)[:, None]
    y = y_ptr + token[None, :] * rows + row[:, None]
    tl.store(y, total.to(y_ptr.dtype.element_ty), (row < rows)[:, None] & (token < tokens)[None, :])


@triton.jit
def sparse24_dense(
    values_ptr, indices_ptr, dense_ptr, rows, columns, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr
):
    """Write the dense weight (rows, columns) as int16 bits."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1) * BLOCKS
    bits = dense_tile(values_ptr, indices_ptr, tl.minimum(row, rows - 1), block, columns, EVEN, ROWS, BLOCKS)
    column = 64 * block + tl.arange(0, 64 * BLOCKS)
    place = dense_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, bits, (row < rows)[:, None] & (column < columns)[None, :])


def matmul(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, y: Tensor,
    lowrank: tuple[Tensor, Tensor] | None = None,
    *, rows: int = 64, tokens: int = 16, blocks: int = 2, warps: int = 4, stages: int = 1,
) -> None:  # fmt: skip
    """y = x @ weight.T + bias. x (tokens, in), values (out, in / 2), indices (out, index_bytes(in)), y (tokens, out);
    all contiguous, x and values float16 or bfloat16. `lowrank`: left (out, rank), and x @ right.T as float32 partial
    sums (splits, tokens, rank); their product is added to y. Tile: `rows` x 64 `blocks` of the weight, `tokens` of x."""
    count, columns = x.shape
    left, hidden = lowrank or (y, y)
    sparse24_expand[(triton.cdiv(y.shape[1], rows), triton.cdiv(count, tokens))](
        x, values.view(torch.int32), indices.view(torch.int16), left, hidden, y if bias is None else bias, y,
        count, y.shape[1], columns, hidden.shape[-1], len(hidden), BIAS=bias is not None, RANKED=lowrank is not None,
        EVEN=columns % (64 * blocks) == 0, ROWS=rows, TOKENS=tokens, BLOCKS=blocks,
        INTERP=INTERPRETED, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def decompress(
    values: Tensor, indices: Tensor, dense: Tensor, *, rows: int = 16, blocks: int = 4, warps: int = 4
) -> None:
    """Write the dense weight to `dense` (out, in), bit for bit, with +0.0 for weights that were not kept. values (out, in /
    2), of 16 bits; indices (out, index_bytes(in)); all contiguous."""
    out, columns = dense.shape
    sparse24_dense[(triton.cdiv(out, rows), triton.cdiv(columns, 64 * blocks))](
        values.view(torch.int32), indices.view(torch.int16), dense.view(torch.int16), out, columns,
        EVEN=columns % (64 * blocks) == 0, ROWS=rows, BLOCKS=blocks, num_warps=warps,
    )  # fmt: skip
