"""2:4 products for few tokens on NVIDIA's sparse tensor cores: `mma.sp`, called from plain Triton by inline assembly.

The kernel reads a packed weight exactly as it is stored in the checkpoint. A warp takes 16 rows and 4 blocks of 64 columns
at a time. Lane `l`, with `t = l % 4`, loads of two rows, `l // 4` and `l // 4 + 8`, the 16 bytes with groups `4 t .. 4 t + 3`
of each block, and the indices of block t: four words, of which word j holds groups `j, 4 + j, 8 + j, 12 + j`. With these
registers the warp takes 4 times two `m16n8k32` steps. In step s of the j-th time, the group that the instruction calls q
is group `j + 4 (q % 4)` of block `2 s + q // 4`: any order is correct, as long as activations and indices follow it. So a
lane has all that it supplies, and reads every sector of memory once.

The weight is the operand with 16 rows and the tokens are the 8 columns, so that 1 to 8 tokens take one instruction. Tokens
are first written in the order of the fragments (`order_tokens`): a lane then loads its 8 registers at once, where it would
need 8 loads of 4 bytes. The warps of a program split rows and columns, and their sums are added in a fixed order. From
compute capability 9.0 on, the kernel loads its first weights while `order_tokens` runs (programmatic dependent launch).

Source of the fragment layouts: PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16/.bf16 types".
"""

import re
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from paredown.kernels.primitives import dependent_launch


@cache
def mma_sp(dtype: str, turn: int) -> str:
    """Assembly of the two `mma.sp` steps of a turn, 0 to 3, over 64 of 256 columns; dtype "f16" or "bf16". Operands: 4 sums;
    4 registers of weights for each of 4 blocks, then those of the lower row; 4 + 4 of tokens; the sums again; and 4 words of
    indices. Triton passes all of them to every turn, which reads its own."""
    step = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32 {{$0,$1,$2,$3}},"

    def weights(s: int) -> str:
        blocks = (4 + 4 * block + turn for block in (2 * s, 2 * s + 1))
        return ",".join(f"${upper},${upper + 16}" for upper in blocks)

    word = 48 + turn
    return (
        f"{step}{{{weights(0)}}},{{$36,$37,$38,$39}},{{$44,$45,$46,$47}},${word},0x0;"
        f"{step}{{{weights(1)}}},{{$40,$41,$42,$43}},{{$0,$1,$2,$3}},${word},0x1;"
    )


@cache
def mma(dtype: str) -> str:
    """Assembly of two dense `m16n8k16` steps over 32 columns, of which a lane holds 8 neighbours. Operands: 4 sums, 4 + 4
    registers of weights, 4 of tokens, the sums again."""
    step = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{$0,$1,$2,$3}},"
    return f"{step}{{$4,$8,$5,$9}},{{$12,$13}},{{$16,$17,$18,$19}};{step}{{$6,$10,$7,$11}},{{$14,$15}},{{$0,$1,$2,$3}};"


# the first step writes the outputs before the second step reads its operands: the two must not share registers
CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 40 + ["f"] * 4 + ["r"] * 4))
DENSE_CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 12 + ["f"] * 4))


VALID = tl.constexpr(0x4444444444444444)  # indices that the instruction accepts


@triton.jit
def _rounded_bits(number, BF16: tl.constexpr):
    """float32 numbers rounded to nearest even, as 16 bits in an int32 (the interpreter's own cast truncates)."""
    if BF16:
        bits = number.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    else:
        return number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _hidden_pair(hidden_ptr, splits, size, place, inside, BF16: tl.constexpr):
    """Elements `place` and `place + 1` of `x @ right.T`: partial sums added, rounded, and packed into one int32."""
    even = tl.load(hidden_ptr + place, inside, other=0)
    odd = tl.load(hidden_ptr + place + 1, inside, other=0)
    for split in range(1, splits):
        even += tl.load(hidden_ptr + split * size + place, inside, other=0)
        odd += tl.load(hidden_ptr + split * size + place + 1, inside, other=0)
    return _rounded_bits(even, BF16) | (_rounded_bits(odd, BF16) << 16)


@triton.jit
def order_tokens(x_ptr, ordered_ptr, tokens, columns, PDL: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr):
    """x (tokens, columns) as int32 pairs; ordered (programs, ceil(columns / 256), 4 turns, TILES, ROWS, 4 lanes, 8): the
    registers of each lane for `mma.sp`. A program has 8 TILES tokens, or ROWS if that is less; what is beyond the last token
    or column is 0."""
    if PDL:  # in this order: what is started now may rely on all that came before this kernel
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    SIZE: tl.constexpr = 4 * TILES * ROWS * 32
    place = tl.arange(0, SIZE)
    register, lane, row = place % 8, place // 8 % 4, place // 32 % ROWS
    tile, turn = place // (32 * ROWS) % TILES, place // (32 * ROWS * TILES)
    token = ((tl.program_id(1) * TILES + tile) * ROWS + row).to(tl.int64)
    group = turn + 4 * (lane // 2 + 2 * (register % 2))
    block = 4 * tl.program_id(0) + register // 2
    pair = 32 * block + 2 * group + lane % 2
    x = tl.load(x_ptr + token * (columns // 2) + pair, (token < tokens) & (pair < columns // 2), other=0)
    start = (tl.program_id(1).to(tl.int64) * tl.cdiv(columns, 256) + tl.program_id(0)) * SIZE
    tl.store(ordered_ptr + start + place, x)


@triton.jit
def _weights(values_ptr, indices_ptr, row, rows, columns, k, chunk, lane, slot, FULL: tl.constexpr):
    """What a lane holds of the rows `row` and `row + 8` in the 256 columns from 256 k on: the values of 4 blocks for both,
    and the words of indices. Rows beyond the last repeat it; what is beyond the last column is 0."""
    upper, lower = tl.minimum(row, rows - 1), tl.minimum(row + 8, rows - 1)
    blocks = tl.cdiv(columns, 64)
    v0 = values_ptr + upper * (columns // 4) + 64 * k + chunk
    v1 = values_ptr + lower * (columns // 4) + 64 * k + chunk
    places = ()
    for b in tl.static_range(8):
        places += ((v0 if b < 4 else v1) + 16 * (b % 4),)
    e0_ptr = indices_ptr + upper * blocks + 4 * k + lane
    e1_ptr = indices_ptr + lower * blocks + 4 * k + lane
    loaded = ()
    if FULL:  # what is loaded beyond the last column is not used: it need not be 0
        inside = k < tl.cdiv(columns, 256)
        for b in tl.static_range(8):
            loaded += (tl.load(places[b], inside, eviction_policy="evict_first"),)
        loaded += (tl.load(e0_ptr, inside), tl.load(e1_ptr, inside))
    else:
        for b in tl.static_range(8):
            inside = 16 * (4 * k + b % 4) + chunk < columns // 4
            loaded += (tl.load(places[b], inside, other=0, eviction_policy="evict_first"),)
        there = 4 * k + lane < blocks
        loaded += (tl.load(e0_ptr, there, other=VALID), tl.load(e1_ptr, there, other=VALID))
    return loaded


@triton.jit(do_not_specialize=["tokens"])  # one kernel for every number of tokens of a bucket
def sparse24_mma(
    x_ptr, values_ptr, indices_ptr, left_ptr, hidden_ptr, bias_ptr, y_ptr, tokens, rows, columns, rank, splits,
    ASM: tl.constexpr, DENSE_ASM: tl.constexpr, BF16: tl.constexpr, PDL: tl.constexpr,
    BIAS: tl.constexpr, RANKED: tl.constexpr, FULL: tl.constexpr,
    ROW_TILES: tl.constexpr, TOKEN_TILES: tl.constexpr, TOKEN_ROWS: tl.constexpr,
    WARPS: tl.constexpr, ROW_WARPS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """x as `order_tokens` writes it; values (rows, columns / 2) as int32 pairs, indices (rows, ceil(columns / 64)) as int64;
    y (tokens, rows). A warp computes 16 ROW_TILES rows for 8 TOKEN_TILES tokens; ROW_WARPS of the WARPS take other rows, the
    others other columns. FULL: all of these have the same number of columns. RANKED adds hidden @ left.T: left (rows, rank)
    as int32 pairs, hidden the sum of (splits, tokens, rank) float32."""
    thread = tl.arange(0, 32 * WARPS)[:, None].to(tl.int64)
    slot = tl.arange(0, 4)[None, :].to(tl.int64)
    warp, group, lane = thread // 32, thread % 32 // 4, thread % 4
    K_WARPS: tl.constexpr = WARPS // ROW_WARPS
    part = warp % K_WARPS
    first_row = tl.program_id(0) * (16 * ROW_TILES * ROW_WARPS)
    first = first_row + 16 * ROW_TILES * (warp // K_WARPS)
    first_token = tl.program_id(1) * (8 * TOKEN_TILES)
    chunk = 4 * lane + slot  # in units of one group, which are two values
    steps = tl.cdiv(columns, 256)
    ahead = ()  # the weights of the first step
    for u in tl.static_range(UNROLL):
        for r in tl.static_range(ROW_TILES):
            k = u * K_WARPS + part
            row = first + 16 * r + group
            ahead += (_weights(values_ptr, indices_ptr, row, rows, columns, k, chunk, lane, slot, FULL),)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sums = ()
    for _ in tl.static_range(ROW_TILES * TOKEN_TILES):
        sums += (tl.zeros((32 * WARPS, 4), tl.float32),)
    own = 32 * (group % TOKEN_ROWS) + 8 * lane + slot
    for step in tl.range(0, steps, K_WARPS * UNROLL):
        for u in tl.static_range(UNROLL):
            k = step + u * K_WARPS + part
            start = (tl.program_id(1).to(tl.int64) * steps + k) * (4 * TOKEN_TILES * TOKEN_ROWS * 32)
            for turn in tl.static_range(4):
                xs = ()
                for t in tl.static_range(TOKEN_TILES):
                    x = x_ptr + start + (turn * TOKEN_TILES + t) * (TOKEN_ROWS * 32) + own
                    if FULL:
                        xs += ((tl.load(x), tl.load(x + 4)),)
                    else:
                        xs += ((tl.load(x, k < steps, other=0), tl.load(x + 4, k < steps, other=0)),)
                new = ()
                for r in tl.static_range(ROW_TILES):
                    a0, a1, a2, a3, b0, b1, b2, b3, e0, e1 = ahead[u * ROW_TILES + r]
                    e = ((e0 >> 16 * slot).to(tl.int32) & 0xFFFF) | ((e1 >> 16 * slot).to(tl.int32) << 16)
                    for t in tl.static_range(TOKEN_TILES):
                        new += (
                            tl.inline_asm_elementwise(
                                ASM[turn], CONSTRAINTS,
                                [a0, a1, a2, a3, b0, b1, b2, b3, xs[t][0], xs[t][1], sums[r * TOKEN_TILES + t], e],
                                dtype=tl.float32, is_pure=True, pack=4,
                            ),
                        )  # fmt: skip
                sums = new
        ahead = ()
        for u in tl.static_range(UNROLL):
            for r in tl.static_range(ROW_TILES):
                k = step + (UNROLL + u) * K_WARPS + part
                row = first + 16 * r + group
                ahead += (_weights(values_ptr, indices_ptr, row, rows, columns, k, chunk, lane, slot, FULL),)
    if RANKED:
        for block in range(0, tl.cdiv(rank, 32), K_WARPS):
            place = 16 * (block + part) + chunk  # in units of two columns, 4 a lane
            inside = 2 * place < rank
            hs = ()
            for t in tl.static_range(TOKEN_TILES):
                token = tl.minimum(first_token + 8 * t + group, tokens - 1)
                hs += (_hidden_pair(hidden_ptr, splits, tokens * rank, token * rank + 2 * place, inside, BF16),)
            new = ()
            for r in tl.static_range(ROW_TILES):
                upper = tl.minimum(first + 16 * r + group, rows - 1)
                lower = tl.minimum(first + 16 * r + group + 8, rows - 1)
                a = tl.load(left_ptr + upper * (rank // 2) + place, inside, other=0)
                b = tl.load(left_ptr + lower * (rank // 2) + place, inside, other=0)
                for t in tl.static_range(TOKEN_TILES):
                    new += (
                        tl.inline_asm_elementwise(
                            DENSE_ASM, DENSE_CONSTRAINTS, [a, b, hs[t], sums[r * TOKEN_TILES + t]],
                            dtype=tl.float32, is_pure=True, pack=4,
                        ),
                    )  # fmt: skip
            sums = new
    one = tl.arange(0, 32 * ROW_WARPS)[:, None]
    for r in tl.static_range(ROW_TILES):
        for t in tl.static_range(TOKEN_TILES):
            total = tl.sum(tl.reshape(sums[r * TOKEN_TILES + t], (ROW_WARPS, K_WARPS, 32, 4)), 1)
            total = tl.reshape(total, (32 * ROW_WARPS, 4))
            row = first_row + 16 * (ROW_TILES * (one // 32) + r) + one % 32 // 4 + 8 * (slot // 2)
            token = first_token + 8 * t + 2 * (one % 4) + slot % 2
            if BIAS:
                total += tl.load(bias_ptr + row, row < rows, other=0).to(tl.float32)
            tl.store(
                y_ptr + token.to(tl.int64) * rows + row,
                total.to(y_ptr.dtype.element_ty),
                (row < rows) & (token < tokens),
            )


def matmul(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, y: Tensor,
    lowrank: tuple[Tensor, Tensor] | None = None,
    *, row_tiles: int = 1, warps: int = 4, row_warps: int = 1, unroll: int = 1,
) -> Any:  # fmt: skip
    """y = x @ weight.T + bias. x (tokens, in), values (out, in / 2), indices (out, index_bytes(in)), y (tokens, out);
    all contiguous, x and values float16 or bfloat16. Meant for at most 64 tokens; more are processed 64 at a time.
    `lowrank`: left (out, rank) with an even rank, and x @ right.T as float32 partial sums (splits, tokens, rank); their
    product is added to y. `row_warps` of the `warps` take other rows, the others other columns. Returns the compiled
    kernel, for `layout_fault`; None under Triton's interpreter."""
    tokens, columns = x.shape
    left, hidden = (lowrank[0].view(torch.int32), lowrank[1]) if lowrank else (y, y)
    dtype = "bf16" if x.dtype == torch.bfloat16 else "f16"
    token_tiles = min(8, triton.next_power_of_2(triton.cdiv(tokens, 8)))
    token_rows = 8 if token_tiles > 1 else triton.next_power_of_2(tokens)
    programs, steps = triton.cdiv(tokens, 8 * token_tiles), triton.cdiv(columns, 256)
    dependent = dependent_launch(x.device)
    options: dict[str, Any] = {"launch_pdl": True} if dependent else {}
    ordered = torch.empty(programs * steps * 128 * token_tiles * token_rows, dtype=torch.int32, device=x.device)
    order_tokens[(steps, programs)](
        x.view(torch.int32), ordered, tokens, columns, PDL=dependent, TILES=token_tiles, ROWS=token_rows, **options
    )
    return sparse24_mma[(triton.cdiv(y.shape[1], 16 * row_tiles * row_warps), programs)](
        ordered, values.view(torch.int32), indices.view(torch.int64), left, hidden,
        y if bias is None else bias, y, tokens, y.shape[1], columns, hidden.shape[-1], len(hidden),
        ASM=tuple(mma_sp(dtype, turn) for turn in range(4)), DENSE_ASM=mma(dtype), BF16=dtype == "bf16", PDL=dependent,
        BIAS=bias is not None, RANKED=lowrank is not None, FULL=columns % (256 * unroll * (warps // row_warps)) == 0,
        ROW_TILES=row_tiles, TOKEN_TILES=token_tiles, TOKEN_ROWS=token_rows,
        WARPS=warps, ROW_WARPS=row_warps, UNROLL=unroll, num_warps=warps, num_stages=1, **options,
    )  # fmt: skip


def layout_fault(ttgir: str) -> str | None:
    """What is wrong with the register layout of a compiled kernel, or None. ttgir: Triton's GPU code of the kernel.

    `mma.sp` needs each lane to hold, in order, the 4 elements of its row of every operand. Triton does not guarantee any
    layout, so it is checked by python -m paredown.kernels.aot, and before the first result of a kernel is used.
    """
    layouts = dict(re.findall(r"(#\w+) = (#ttg\.blocked<\{.*?\}>)", ttgir))
    used = re.findall(r"elementwise_inline_asm.*?-> tensor<\d+x4xf32, (#\w+)>", ttgir)
    # with 1, 2 or 4 elements at a time the registers are the same: the 4 of a row never spread over lanes or warps
    row_per_lane = r"sizePerThread = \[1, [124]\], threadsPerWarp = \[32, 1\], warpsPerCTA = \[\d+, 1\]"
    if not used:
        return "no mma.sp in it"
    wrong = [layouts.get(name, name) for name in used if not re.search(row_per_lane, layouts.get(name, ""))]
    return f"mma.sp works on {wrong[0]}" if wrong else None
