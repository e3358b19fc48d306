"""The bitmap reference: any mask, any width, exact to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from paredown.kernels.bitmap import bitmap_matmul, count_bits, pack_bitmap, unpack_bitmap


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), density=st.floats(0, 1), seed=st.integers(0, 999))
def test_any_mask_of_any_width_comes_back(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    keep = torch.rand(rows, columns, generator=generator) < density
    values, bitmap = pack_bitmap(weight, keep)
    assert values.numel() == int(keep.sum()) and bitmap.shape == (rows, -(-columns // 8))
    dense = unpack_bitmap(values, bitmap, columns)
    assert torch.equal(dense[keep], weight[keep])
    assert not dense[~keep].any() and not torch.signbit(dense[~keep]).any()
    assert torch.equal(count_bits(bitmap), keep.sum(-1))


def test_bits_are_little_endian():
    keep = torch.zeros(1, 10, dtype=torch.bool)
    keep[0, [0, 3, 9]] = True
    assert pack_bitmap(torch.ones(1, 10), keep)[1].tolist() == [[0b1001, 0b10]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matmul_is_bit_equal_to_linear(dtype):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(17, 33).to(dtype), torch.randn(17).to(dtype), torch.randn(2, 5, 33).to(dtype)
    keep = torch.rand(17, 33) < 0.4
    assert torch.equal(bitmap_matmul(x, *pack_bitmap(weight, keep), bias), F.linear(x, weight * keep, bias))


def test_experts_share_one_row_of_values():
    weight, keep = torch.randn(3, 4, 9), torch.rand(3, 4, 9) < 0.5
    values, bitmap = pack_bitmap(weight, keep)
    assert torch.equal(unpack_bitmap(values, bitmap, 9), weight * keep)


def test_what_does_not_belong_together_is_refused():
    values, bitmap = pack_bitmap(torch.randn(2, 9), torch.rand(2, 9) < 2)
    with pytest.raises(ValueError, match="marks 18 weights and 17"):
        unpack_bitmap(values[:-1], bitmap, 9)
    with pytest.raises(ValueError, match="3 bytes per row"):
        unpack_bitmap(values, bitmap, 17)
    with pytest.raises(ValueError, match="keep must be bool"):
        pack_bitmap(torch.randn(2, 9), torch.ones(2, 9))
