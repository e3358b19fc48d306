"""2:4 products for few tokens on NVIDIA's sparse tensor cores: `mma.sp`, called from plain Triton by inline assembly.

The kernel reads a packed weight exactly as it is stored in the checkpoint. A warp takes 16 rows and 64 columns of the weight
at a time, which are 16 groups per row. Lane `l`, with `t = l % 4`, loads the 16 bytes with groups `4 t .. 4 t + 3` of two
rows, `l // 4` and `l // 4 + 8`, and passes them to two `m16n8k32` steps. In step s, the group that the instruction calls
q is our group `4 q + 2 s` for q < 4, and `4 (q - 4) + 2 s + 1` for q >= 4: any order is correct, as long as activations
and indices follow it. With this one, lane `2 s + h` supplies the indices of groups `2 s + h, 4 + .., 8 + .., 12 + ..` for
both rows, one nibble each.

The weight is the operand with 16 rows and the tokens are the 8 columns, so that 1 to 8 tokens take one instruction.
The warps of a program split the columns, and their sums are added in a fixed order.

Source of the fragment layouts: PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16/.bf16 types".
"""

import re
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@cache
def mma_sp(dtype: str) -> str:
    """Assembly of two `mma.sp` steps over 64 columns; dtype "f16" or "bf16". Operands: 4 sums, 4 + 4 registers of weights,
    4 + 4 of tokens, the sums again, and the word of indices 4 times (Triton passes 4 registers of each operand; one of
    these is read)."""
    step = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32 {{$0,$1,$2,$3}},"
    return (
        f"{step}{{$4,$8,$5,$9}},{{$12,$13,$14,$15}},{{$20,$21,$22,$23}},$24,0x0;"
        f"{step}{{$6,$10,$7,$11}},{{$16,$17,$18,$19}},{{$0,$1,$2,$3}},$24,0x1;"
    )


@cache
def mma(dtype: str) -> str:
    """Assembly of two dense `m16n8k16` steps over 32 columns, of which a lane holds 8 neighbours. Operands: 4 sums, 4 + 4
    registers of weights, 4 of tokens, the sums again."""
    step = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{$0,$1,$2,$3}},"
    return f"{step}{{$4,$8,$5,$9}},{{$12,$13}},{{$16,$17,$18,$19}};{step}{{$6,$10,$7,$11}},{{$14,$15}},{{$0,$1,$2,$3}};"


# the first step writes the outputs before the second step reads its operands: the two must not share registers
CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 16 + ["f"] * 4 + ["r"] * 4))
DENSE_CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 12 + ["f"] * 4))


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


@triton.jit(do_not_specialize=["tokens"])  # one kernel for every number of tokens of a bucket
def sparse24_mma(
    x_ptr, values_ptr, indices_ptr, left_ptr, hidden_ptr, bias_ptr, y_ptr, tokens, rows, columns, rank, splits,
    ASM: tl.constexpr, DENSE_ASM: tl.constexpr, BF16: tl.constexpr,
    BIAS: tl.constexpr, RANKED: tl.constexpr, EVEN: tl.constexpr,
    ROW_TILES: tl.constexpr, TOKEN_TILES: tl.constexpr, WARPS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """x (tokens, columns) and values (rows, columns / 2) as int32 pairs, indices (rows, ceil(columns / 64) * 8) as int16;
    EVEN: columns are divisible by 64 WARPS; y (tokens, rows). A program computes 16 ROW_TILES rows for 8 TOKEN_TILES tokens.
    RANKED adds hidden @ left.T: left (rows, rank) as int32 pairs, hidden the sum of (splits, tokens, rank) float32."""
    thread = tl.arange(0, 32 * WARPS)[:, None].to(tl.int64)
    slot = tl.arange(0, 4)[None, :].to(tl.int64)
    warp, group, lane = thread // 32, thread % 32 // 4, thread % 4
    first = tl.program_id(0) * (16 * ROW_TILES)
    first_token = tl.program_id(1) * (8 * TOKEN_TILES)
    blocks = tl.cdiv(columns, 64)
    # register `slot` of lane t: columns t % 2 of group slot // 2 (+ 2 in the second step) of chunk 2 (slot % 2) + t // 2
    pair = 8 * (lane // 2) + lane % 2 + 16 * (slot % 2) + 2 * (slot // 2)  # in units of two columns
    chunk = 4 * lane + slot  # in units of one group, which are two values
    sums = ()
    for _ in tl.static_range(ROW_TILES * TOKEN_TILES):
        sums += (tl.zeros((32 * WARPS, 4), tl.float32),)
    for block in tl.range(0, blocks, WARPS, loop_unroll_factor=UNROLL):
        k = block + warp
        xs = ()
        for t in tl.static_range(TOKEN_TILES):
            token = tl.minimum(first_token + 8 * t + group, tokens - 1)  # tokens beyond the last repeat it
            x = x_ptr + token * (columns // 2) + 32 * k + pair
            if EVEN:
                xs += (tl.load(x), tl.load(x + 4))
            else:
                here = 32 * k + pair < columns // 2
                xs += (tl.load(x, here, other=0), tl.load(x + 4, 32 * k + pair + 4 < columns // 2, other=0))
        new = ()
        for r in tl.static_range(ROW_TILES):
            upper = tl.minimum(first + 16 * r + group, rows - 1)  # rows beyond the last repeat it and are not stored
            lower = tl.minimum(first + 16 * r + group + 8, rows - 1)
            v0 = values_ptr + upper * (columns // 4) + 16 * k + chunk
            v1 = values_ptr + lower * (columns // 4) + 16 * k + chunk
            e0 = indices_ptr + upper * (4 * blocks) + 4 * k + lane
            e1 = indices_ptr + lower * (4 * blocks) + 4 * k + lane
            if EVEN:
                a = tl.load(v0, eviction_policy="evict_first")
                b = tl.load(v1, eviction_policy="evict_first")
                e = (tl.load(e0).to(tl.int32) & 0xFFFF) | (tl.load(e1).to(tl.int32) << 16)
            else:
                a = tl.load(v0, 16 * k + chunk < columns // 4, other=0)
                b = tl.load(v1, 16 * k + chunk < columns // 4, other=0)
                e = (tl.load(e0, k < blocks, other=0x4444).to(tl.int32) & 0xFFFF) | (
                    tl.load(e1, k < blocks, other=0x4444).to(tl.int32) << 16
                )
            e = tl.broadcast_to(e, (32 * WARPS, 4))
            for t in tl.static_range(TOKEN_TILES):
                new += (
                    tl.inline_asm_elementwise(
                        ASM, CONSTRAINTS, [a, b, xs[2 * t], xs[2 * t + 1], sums[r * TOKEN_TILES + t], e],
                        dtype=tl.float32, is_pure=True, pack=4,
                    ),
                )  # fmt: skip
        sums = new
    if RANKED:
        for block in range(0, tl.cdiv(rank, 32), WARPS):
            place = 16 * (block + warp) + chunk  # in units of two columns, 4 a lane
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
    for r in tl.static_range(ROW_TILES):
        for t in tl.static_range(TOKEN_TILES):
            total = tl.sum(tl.reshape(sums[r * TOKEN_TILES + t], (WARPS, 32, 4)), 0)
            one = tl.arange(0, 32)[:, None]
            row = first + 16 * r + one // 4 + 8 * (slot // 2)
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
    *, row_tiles: int = 1, warps: int = 8, unroll: int = 4,
) -> Any:  # fmt: skip
    """y = x @ weight.T + bias. x (tokens, in), values (out, in / 2), indices (out, index_bytes(in)), y (tokens, out);
    all contiguous, x and values float16 or bfloat16. Meant for at most 64 tokens; more are processed 64 at a time.
    `lowrank`: left (out, rank) with an even rank, and x @ right.T as float32 partial sums (splits, tokens, rank); their
    product is added to y. Returns the compiled kernel, for `layout_fault`; None under Triton's interpreter."""
    tokens, columns = x.shape
    left, hidden = (lowrank[0].view(torch.int32), lowrank[1]) if lowrank else (y, y)
    dtype = "bf16" if x.dtype == torch.bfloat16 else "f16"
    token_tiles = min(8, triton.next_power_of_2(triton.cdiv(tokens, 8)))
    return sparse24_mma[(triton.cdiv(y.shape[1], 16 * row_tiles), triton.cdiv(tokens, 8 * token_tiles))](
        x.view(torch.int32), values.view(torch.int32), indices.view(torch.int16), left, hidden,
        y if bias is None else bias, y, tokens, y.shape[1], columns, hidden.shape[-1], len(hidden),
        ASM=mma_sp(dtype), DENSE_ASM=mma(dtype), BF16=dtype == "bf16",
        BIAS=bias is not None, RANKED=lowrank is not None, EVEN=columns % (64 * warps) == 0,
        ROW_TILES=row_tiles, TOKEN_TILES=token_tiles, WARPS=warps, UNROLL=unroll,
        num_warps=warps, num_stages=1,
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
