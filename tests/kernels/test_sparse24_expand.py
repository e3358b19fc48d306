"""The portable 2:4 kernels in Triton's interpreter."""

import pytest
import torch

from paredown.kernels import sparse24_expand
from paredown.kernels.sparse24 import index_bytes, pack24

SHAPES = [(1, 4, 1), (16, 64, 2), (70, 128, 16), (5, 300, 17), (33, 100, 65), (64, 256, 33)]


@pytest.mark.parametrize(("rows", "columns", "tokens"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_it_equals_the_float64_product(random_24, rows, columns, tokens, dtype, biased):
    dense, keep = random_24(rows, columns, dtype)
    torch.manual_seed(1)
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype) if biased else None
    y = torch.full((tokens, rows), torch.nan)
    sparse24_expand.matmul(x, *pack24(dense, keep), bias, y, rows=32, blocks=1)
    wanted = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    assert float((y.double() - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize(("rows", "tokens", "rank", "splits"), [(1, 1, 1, 1), (40, 9, 64, 3), (33, 17, 71, 2)])
def test_a_low_rank_product_is_added_to_the_same_sums(random_24, rows, tokens, rank, splits):
    dense, keep = random_24(rows, 100, torch.bfloat16)
    torch.manual_seed(1)
    x, left, bias = (
        torch.randn(tokens, 100).bfloat16(),
        torch.randn(rows, rank).bfloat16(),
        torch.randn(rows).bfloat16(),
    )
    hidden = torch.randn(splits, tokens, rank)
    y = torch.full((tokens, rows), torch.nan)
    sparse24_expand.matmul(x, *pack24(dense, keep), bias, y, (left, hidden), rows=32)
    wanted = x.double() @ dense.double().T + hidden.double().sum(0) @ left.double().T + bias.double()
    assert float((y.double() - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("shape", [(1, 4), (70, 300), (33, 256)])
def test_decompressing_is_exact_to_the_bit(random_24, shape):
    dense, keep = random_24(*shape, torch.bfloat16)
    out = torch.full(shape, torch.nan).bfloat16()
    sparse24_expand.decompress(*pack24(dense, keep), out)
    # what is not kept is +0.0, what is kept keeps its sign
    assert torch.equal(out.view(torch.int16), torch.where(keep, dense, 0.0).view(torch.int16))
    assert torch.signbit(out[keep & (dense == 0)]).any() or shape == (1, 4)


def test_every_bit_of_an_infinite_or_missing_value_survives():
    keep = torch.tensor([True, False, False, True]).repeat(1, 16)
    odd = torch.tensor([0x7F81, 0x7F80, -1, 0x0001], dtype=torch.int16).repeat(1, 8)  # two NaNs, infinity, subnormal
    indices = pack24(torch.zeros(1, 64).bfloat16(), keep)[1]
    assert indices.shape == (1, index_bytes(64))
    out = torch.empty(1, 64, dtype=torch.bfloat16)
    sparse24_expand.decompress(odd.view(torch.bfloat16), indices, out)
    assert out.view(torch.int16)[keep].tolist() == odd.flatten().tolist()
