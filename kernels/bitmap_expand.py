"""Products with a bitmap weight for few tokens, and the dense weight for products with many tokens. Plain Triton.

A thread takes 32 columns of a row at a time: one word of the bitmap. It tracks the position of the next value of its row,
loads a value for each set bit, and uses zero for the other bits.

In the product, a warp processes 8 rows by 4 words per step. The tensor cores get the columns in the order in which the
threads hold them, and the activations in the same order, so threads exchange no data. The warps of a program split the
columns. First each warp counts the bits of its part; from these counts follows where the values of each warp start. At the
end their sums are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from paredown.kernels.primitives import INTERPRETED, dot


@triton.jit
def count(word):
    """How many bits of a uint32 are set. The compiler recognises the formula and emits one instruction."""
    pairs = word - ((word >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def load_word(bitmap_ptr, row, at, row_bytes, WORDS: tl.constexpr, EVEN: tl.constexpr):
    """The bits of columns 32 at .. 32 at + 31 of a row. WORDS: rows consist of whole words, and bitmap_ptr points to words
    instead of bytes; EVEN: every word asked for exists."""
    if WORDS:
        source = bitmap_ptr + row * (row_bytes // 4) + at
        if EVEN:
            return tl.load(source).to(tl.uint32, bitcast=True)
        else:
            return tl.load(source, 4 * at < row_bytes, other=0).to(tl.uint32, bitcast=True)
    else:
        word = tl.zeros_like(at).to(tl.uint32)
        for i in tl.static_range(4):
            byte = tl.load(bitmap_ptr + row * row_bytes + 4 * at + i, 4 * at + i < row_bytes, other=0)
            word |= byte.to(tl.uint32) << (8 * i)
        return word


@triton.jit
def stack(tiles, LEVELS: tl.constexpr):
    """2^LEVELS tiles as one tile with LEVELS more axes of size 2 at the end: the number of the tile in binary."""
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(2 ** (LEVELS - 1 - level)):
            joined += (tl.join(tiles[i], tiles[i + 2 ** (LEVELS - 1 - level)]),)
        tiles = joined
    return tiles[0]


@triton.jit
def expand(values_ptr, word, place):
    """The 32 weights of each word (threads,), as (threads, 2, 2, 2, 2, 2). Their values start at `place`."""
    weights = ()
    for j in tl.static_range(32):
        keep = (word & (1 << j)) != 0
        weights += (tl.load(values_ptr + place, keep, other=0),)
        place = tl.where(keep, place + 1, place)
    return stack(weights, 5)


@triton.jit
def before(counts, GROUP: tl.constexpr):
    """For each thread, in its group of GROUP neighbours: the sum of the counts before it, and of all. Both (threads,)."""
    SIZE: tl.constexpr = counts.shape[0]
    groups = tl.reshape(counts, (SIZE // GROUP, GROUP))
    total = tl.broadcast_to(tl.sum(groups, 1)[:, None], (SIZE // GROUP, GROUP))
    return tl.reshape(tl.cumsum(groups, 1) - groups, (SIZE,)), tl.reshape(total, (SIZE,))


@triton.jit
def before_parts(counts, WARPS: tl.constexpr):
    """For the row of each thread: the sum of the counts of all warps before its own. Both (threads,); in the thread number
    the lane varies fastest, then the row, then the warp."""
    parts = tl.sum(tl.reshape(counts, (WARPS, 8, 4)), 2)
    ahead = tl.cumsum(parts, 0) - parts
    return tl.reshape(tl.broadcast_to(ahead[:, :, None], (WARPS, 8, 4)), (32 * WARPS,))


@triton.jit(do_not_specialize=["tokens"])  # one kernel for every number of tokens of a bucket
def bitmap_matmul_kernel(
    x_ptr, values_ptr, bitmap_ptr, starts_ptr, bias_ptr, y_ptr, tokens, rows, columns, row_bytes,
    BIAS: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr, OCTETS: tl.constexpr, ROW_LEVELS: tl.constexpr,
    TOKEN_OCTETS: tl.constexpr, TOKEN_LEVELS: tl.constexpr, WARPS: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """x (tokens, columns), y (tokens, rows). A program computes 8 OCTETS rows for 8 TOKEN_OCTETS tokens."""
    thread = tl.arange(0, 32 * WARPS)
    warp, group, lane = thread // 32, thread % 32 // 4, thread % 4
    first_row = tl.program_id(0) * (8 * OCTETS)
    first_token = tl.program_id(1) * (8 * TOKEN_OCTETS)
    part = tl.cdiv(row_bytes, 16 * WARPS) * 4  # words of a row per warp
    mine = warp * part + lane
    row_of, counts = (), ()
    for r in tl.static_range(OCTETS):
        # rows beyond the last are computed but not stored
        row_of += (tl.minimum(first_row + 8 * r + group, rows - 1).to(tl.int64),)
        counts += (tl.zeros((32 * WARPS,), tl.int32),)
    for step in tl.range(0, part, 4, loop_unroll_factor=4):
        more = ()
        for r in tl.static_range(OCTETS):
            more += (counts[r] + count(load_word(bitmap_ptr, row_of[r], mine + step, row_bytes, WORDS, EVEN)),)
        counts = more
    places = ()
    for r in tl.static_range(OCTETS):
        places += (tl.load(starts_ptr + row_of[r]) + before_parts(counts[r], WARPS),)
    total = tl.zeros((WARPS, 8 * OCTETS, 8 * TOKEN_OCTETS), tl.float32)
    for step in range(0, part, 4):
        xs = ()
        column = 32 * (mine + step)[:, None] + tl.arange(0, 8)[None, :]
        for b in tl.static_range(TOKEN_OCTETS):
            token = tl.minimum(first_token + 8 * b + group, tokens - 1).to(tl.int64)
            for u in tl.static_range(4):
                source = x_ptr + token[:, None] * columns + column + 8 * u
                if EVEN:
                    xs += (tl.load(source),)
                else:
                    xs += (tl.load(source, column + 8 * u < columns, other=0),)
        next_places, ws = (), ()
        for r in tl.static_range(OCTETS):
            word = load_word(bitmap_ptr, row_of[r], mine + step, row_bytes, WORDS, EVEN)
            ahead, all_four = before(count(word), 4)
            ws += (expand(values_ptr, word, places[r] + ahead),)
            next_places += (places[r] + all_four,)
        places = next_places
        # the tensor cores see column 8 (column % 32 // 2) + 2 lane + column % 2: the order in which a lane holds its operand
        w = tl.reshape(stack(ws, ROW_LEVELS), (WARPS, 8, 4, 16, 2, OCTETS))
        w = tl.reshape(tl.permute(w, (0, 5, 1, 3, 2, 4)), (WARPS, 8 * OCTETS, 128))
        x = tl.reshape(stack(xs, TOKEN_LEVELS + 2), (WARPS, 8, 4, 4, 2, TOKEN_OCTETS, 4))
        x = tl.reshape(tl.permute(x, (0, 6, 3, 2, 4, 5, 1)), (WARPS, 128, 8 * TOKEN_OCTETS))
        total = dot(w, x, total, INTERP)
    y = tl.sum(total, 0)  # (rows, tokens)
    row = (first_row + tl.arange(0, 8 * OCTETS))[:, None]
    token = (first_token + tl.arange(0, 8 * TOKEN_OCTETS))[None, :]
    if BIAS:
        y += tl.load(bias_ptr + row, row < rows, other=0).to(tl.float32)
    target = y_ptr + token.to(tl.int64) * rows + row
    tl.store(target, y.to(y_ptr.dtype.element_ty), (row < rows) & (token < tokens))


@triton.jit
def bitmap_decompress_kernel(
    values_ptr, bitmap_ptr, starts_ptr, dense_ptr, rows, columns, row_bytes,
    WORDS: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """values and dense (rows, columns) as int16. LANES threads work on a row together, one word each per step."""
    thread = tl.arange(0, THREADS)
    # threads beyond the last row write the last row once more
    row = tl.minimum(tl.program_id(0) * (THREADS // LANES) + thread // LANES, rows - 1).to(tl.int64)
    place = tl.load(starts_ptr + row)
    for step in range(0, tl.cdiv(row_bytes, 4), LANES):
        at = step + thread % LANES
        word = load_word(bitmap_ptr, row, at, row_bytes, WORDS, EVEN)
        ahead, whole = before(count(word), LANES)
        w = tl.reshape(expand(values_ptr, word, place + ahead), (THREADS, 32))
        place += whole
        column = 32 * at[:, None] + tl.arange(0, 32)[None, :]
        tl.store(dense_ptr + row[:, None] * columns + column, w, column < columns)


def matmul(
    x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor, bias: Tensor | None, y: Tensor,
    *, row_octets: int = 2, token_octets: int = 0, warps: int = 8,
) -> None:  # fmt: skip
    """y = x @ weight.T + bias. x (tokens, in), values (kept,), bitmap (out, ceil(in / 8)), starts (out + 1,) of
    `row_starts`, y (tokens, out); all contiguous, x and values float16 or bfloat16. Any number of tokens, but it is fast
    for few only.

    A program computes 8 row_octets rows for 8 token_octets tokens; its warps split the columns. row_octets is at least 2;
    token_octets = 0 takes as many as the tokens need, at most 8. All three are powers of 2.
    """
    (tokens, columns), rows = x.shape, y.shape[1]
    # activations whose rows are not aligned to 16 bytes are loaded number by number: take fewer tokens at a time
    octets = token_octets or min(2 if columns % 16 else 8, triton.next_power_of_2(triton.cdiv(tokens, 8)))
    codes, words = _words(bitmap)
    bitmap_matmul_kernel[(triton.cdiv(rows, 8 * row_octets), triton.cdiv(tokens, 8 * octets))](
        x, values, codes, starts, y if bias is None else bias, y, tokens, rows, columns, bitmap.shape[1],
        BIAS=bias is not None, WORDS=words, EVEN=words and columns % (128 * warps) == 0,
        OCTETS=row_octets, ROW_LEVELS=row_octets.bit_length() - 1,
        TOKEN_OCTETS=octets, TOKEN_LEVELS=octets.bit_length() - 1,
        WARPS=warps, INTERP=INTERPRETED, num_warps=warps, num_stages=1,
    )  # fmt: skip


def decompress(
    values: Tensor, bitmap: Tensor, starts: Tensor, dense: Tensor, *, lanes: int = 32, warps: int = 4
) -> None:
    """Write the dense weight (out, in) to `dense`, bit for bit, with +0.0 for weights that were not kept; other arguments
    as in `matmul`.

    A program writes 32 warps / lanes rows, each with `lanes` threads. Both are powers of 2.
    """
    rows, columns = dense.shape
    codes, words = _words(bitmap)
    bitmap_decompress_kernel[(triton.cdiv(rows * lanes, 32 * warps),)](
        values.view(torch.int16), codes, starts, dense.view(torch.int16), rows, columns, bitmap.shape[1],
        WORDS=words, EVEN=words and columns % (32 * lanes) == 0,
        LANES=lanes, THREADS=32 * warps, num_warps=warps, num_stages=1,
    )  # fmt: skip


def _words(bitmap: Tensor) -> tuple[Tensor, bool]:
    """The bitmap as int32 words and True, if its rows are aligned and consist of whole words; else itself and False."""
    fits = bitmap.shape[1] % 4 == 0 and bitmap.storage_offset() % 4 == 0 and bitmap.data_ptr() % 4 == 0
    return (bitmap.view(torch.int32), True) if fits else (bitmap, False)
