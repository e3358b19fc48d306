"""An emulator of `mma.sp`, after the fragment tables of the PTX ISA: Triton's interpreter has no inline assembly."""

import re

import numpy as np
import pytest
import torch

HALVES = {"f16": lambda bits: bits.astype(np.uint16).view(np.float16).astype(np.float32),
          "bf16": lambda bits: (bits.astype(np.uint32) << 16).view(np.float32)}  # fmt: skip
LANE = np.arange(32)
GROUP, T = LANE // 4, LANE % 4


def pair(register, dtype):
    """Both 16-bit numbers of a register (..., 32) as float32 (..., 32, 2)."""
    return np.stack([HALVES[dtype](register & 0xFFFF), HALVES[dtype](register >> 16 & 0xFFFF)], axis=-1)


def dense_operand(a, word, selector, dtype):
    """A (warp, 16, 32) of mma.sp.m16n8k32: registers a (4 of (warp, 32)), indices from lanes 2 selector, + 1 of a quad."""
    dense = np.zeros((len(word), 16, 32), np.float32)
    for register, (row, chunk) in enumerate([(0, 0), (8, 0), (0, 4), (8, 4)]):
        kept = pair(a[register], dtype)  # (warp, lane, 2)
        for lane in LANE:
            group, quad = lane // 4, lane % 4 + chunk  # quad: the 4 columns that the two values of this lane belong to
            source = word[:, 4 * group + 2 * selector + quad // 4] >> (16 if row else 0)
            nibble = source >> 4 * (quad % 4) & 15
            warps = np.arange(len(word))
            assert ((nibble & 3) < (nibble >> 2)).all(), "ordered metadata"
            dense[warps, group + row, 4 * quad + (nibble & 3)] += kept[:, lane, 0]
            dense[warps, group + row, 4 * quad + (nibble >> 2)] += kept[:, lane, 1]
    return dense


def token_operand(b, dtype):
    """B (warp, 32, 8): register r of lane l holds rows 8 r + 2 (l % 4), + 1 of column l // 4."""
    dense = np.zeros((len(b[0]), 32, 8), np.float32)
    for register in range(4):
        numbers = pair(b[register], dtype)
        for half in (0, 1):
            dense[:, 8 * register + 2 * T + half, GROUP] = numbers[..., half]
    return dense


def sparse_step(text, registers):
    """One mma.sp on registers {number: (warp, 32)}."""
    pattern = r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(b?f16)\.\1\.f32 "
    dtype, *fields, word, selector = re.fullmatch(pattern + FOUR + r",\$(\d+),0x([01])", text).groups()
    d, a, b, c = numbers(fields)
    dense = dense_operand(bits(registers, a), bits(registers, [int(word)])[0], int(selector), dtype)
    return d, c, dense @ token_operand(bits(registers, b), dtype)


def dense_step(text, registers):
    """One dense mma. A: a0 and a1 hold columns 2 t, 2 t + 1, a2 and a3 columns 2 t + 8, 2 t + 9; B: the same for rows."""
    pattern = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32 "
    dtype, *fields = re.fullmatch(pattern + FOUR, text).groups()
    d, a, b, c = numbers(fields)
    left, right = (
        np.zeros((len(registers[a[0]]), 16, 16), np.float32),
        np.zeros((len(registers[a[0]]), 16, 8), np.float32),
    )
    for place, register in enumerate(bits(registers, a)):
        for half in (0, 1):
            left[:, GROUP + 8 * (place % 2), 8 * (place // 2) + 2 * T + half] = pair(register, dtype)[..., half]
    for place, register in enumerate(bits(registers, b)):
        for half in (0, 1):
            right[:, 8 * place + 2 * T + half, GROUP] = pair(register, dtype)[..., half]
    return d, c, left @ right


FOUR = r"\{(.*?)\},\{(.*?)\},\{(.*?)\},\{(.*?)\}"


def numbers(fields):
    return [[int(name[1:]) for name in field.split(",")] for field in fields]


def bits(registers, names):
    return [registers[name].view(np.uint32).astype(np.int64) for name in names]


def run(asm, operands):
    """Executes every instruction of `asm` on registers {number: (warp, 32)}; returns the four outputs."""
    registers = dict(operands)
    for text in asm.rstrip(";").split(";"):
        d, c, product = (sparse_step if "mma.sp" in text else dense_step)(text, registers)  # (warp, 16, 8)
        before = [registers[i] for i in c]
        for place, register in enumerate(d):
            registers[register] = before[place] + product[:, GROUP + 8 * (place // 2), 2 * T + place % 2]
    return [registers[i] for i in range(4)]


@pytest.fixture
def mma_sp_emulated(monkeypatch):
    """Interpreted kernels run their inline assembly in the emulator; yields the list of the assembly texts it ran."""
    import triton.language as tl
    from triton.runtime import interpreter

    seen = []

    def create_inline_asm(self, asm, constraints, values, types, is_pure, pack):
        seen.append(asm)
        assert pack == 4 and constraints.count("=") == 4
        warps = values[0].data.shape[0] // 32
        columns = [np.ascontiguousarray(v.data.reshape(warps, 32, 4)[..., i]) for v in values for i in range(4)]
        out = np.stack(run(asm, dict(enumerate(columns, start=4))), axis=-1).reshape(warps * 32, 4)
        handle = interpreter.TensorHandle(out.astype(np.float32), tl.float32)
        return type("Call", (), {"get_result": lambda self, i: handle})()

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm, raising=False)
    yield seen


@pytest.fixture
def random_24():
    """`random_24(rows, columns, dtype)`: a random dense 2:4 weight, some -0.0 among its kept values, and its mask."""

    def make(rows, columns, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)
        keep = (
            torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1).argsort(-1).lt(2).reshape(rows, columns)
        )
        weight = torch.randn(rows, columns, generator=generator)
        weight[torch.rand(rows, columns, generator=generator) < 0.05] = -0.0
        return (weight * keep).to(dtype), keep

    return make
