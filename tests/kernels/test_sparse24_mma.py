"""The `mma.sp` kernel in Triton's interpreter, its assembly emulated; what it compiles to is checked by test_aot.py."""

import pytest
import torch

from paredown.kernels import sparse24_mma
from paredown.kernels.sparse24 import pack24


def relative_error(y, x, dense, bias):
    wanted = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    return float((y.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "tile"),
    [
        (16, 64, 1, {"warps": 1}),
        (32, 512, 8, {"warps": 4}),
        (48, 256, 3, {"row_tiles": 2, "warps": 2}),
        (64, 128, 9, {"row_tiles": 4, "warps": 2}),
        (5, 256, 33, {"warps": 4}),
        (33, 100, 65, {"warps": 2}),
        (17, 4, 2, {"warps": 4}),
        (20, 72, 16, {"row_tiles": 2, "warps": 1, "unroll": 2}),
        (70, 640, 17, {"row_tiles": 2, "warps": 4, "row_warps": 2}),
        (70, 1344, 4, {"warps": 4, "row_warps": 4, "unroll": 2}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_it_equals_the_float64_product(mma_sp_emulated, random_24, rows, columns, tokens, tile, dtype, biased):
    dense, keep = random_24(rows, columns, dtype)
    torch.manual_seed(1)
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype) if biased else None
    y = torch.full((tokens, rows), torch.nan)
    sparse24_mma.matmul(x, *pack24(dense, keep), bias, y, **tile)
    assert relative_error(y, x, dense, bias) < 1e-6
    assert mma_sp_emulated


@pytest.mark.parametrize(("rows", "tokens", "rank", "splits"), [(16, 1, 2, 1), (40, 9, 64, 3), (33, 17, 70, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_rank_product_is_added_to_the_same_sums(mma_sp_emulated, random_24, rows, tokens, rank, splits, dtype):
    dense, keep = random_24(rows, 128, dtype)
    torch.manual_seed(1)
    x, left, bias = torch.randn(tokens, 128).to(dtype), torch.randn(rows, rank).to(dtype), torch.randn(rows).to(dtype)
    hidden = torch.randn(splits, tokens, rank)
    y = torch.full((tokens, rows), torch.nan)
    sparse24_mma.matmul(x, *pack24(dense, keep), bias, y, (left, hidden), warps=2, row_tiles=2)
    rounded = hidden.sum(0).to(dtype).double()  # what enters the tensor core is rounded, as between two products
    wanted = x.double() @ dense.double().T + rounded @ left.double().T + bias.double()
    assert float((y.double() - wanted).norm() / wanted.norm()) < 1e-4  # a sum may round the other way


def test_a_kept_negative_zero_counts_as_zero(mma_sp_emulated):
    keep = torch.tensor([True, False, True, False]).repeat(2, 16)
    y = torch.full((1, 2), torch.nan)
    sparse24_mma.matmul(
        torch.ones(1, 64).bfloat16(), *pack24(torch.full((2, 64), -0.0).bfloat16(), keep), None, y, warps=1
    )
    assert y.tolist() == [[0.0, 0.0]]


def test_the_layout_guard_reads_the_compilers_text():
    good = "#blocked = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [32, 1], warpsPerCTA = [4, 1], order = [1, 0]}>\n"
    asm = "%d = tt.elementwise_inline_asm ... -> tensor<128x4xf32, #blocked> loc(1)"
    assert sparse24_mma.layout_fault(good + asm) is None
    assert sparse24_mma.layout_fault(good.replace("[1, 4]", "[1, 1]") + asm) is None  # the same registers
    assert "[16, 2]" in sparse24_mma.layout_fault(good.replace("[32, 1]", "[16, 2]") + asm)
    assert "[2, 4]" in sparse24_mma.layout_fault(good.replace("[1, 4]", "[2, 4]") + asm)
    assert sparse24_mma.layout_fault(good) == "no mma.sp in it"
