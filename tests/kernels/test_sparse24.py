"""The 2:4 reference: exact to the bit, strict about its mask."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from paredown.kernels.sparse24 import BLOCK, count_invalid24, index_bytes, pack24, sparse24_matmul, unpack24

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_mask(*shape):
    groups = torch.rand(*shape[:-1], shape[-1] // 4, 4).argsort(-1) < 2
    return groups.reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (5, 64), (2, 3, 20), (130, 4096)])
def test_what_is_packed_comes_back_bit_for_bit(shape, dtype):
    torch.manual_seed(0)
    weight, keep = torch.randn(shape).to(dtype), random_mask(*shape)
    values, indices = pack24(weight, keep)
    assert values.shape == (*shape[:-1], shape[-1] // 2) and values.dtype == dtype
    assert indices.shape == (*shape[:-1], index_bytes(shape[-1])) and indices.dtype == torch.uint8
    dense = unpack24(values, indices)
    assert torch.equal(dense[keep], weight[keep]) and not dense[~keep].any()
    assert not torch.signbit(dense[~keep]).any()


def test_every_pair_of_columns_has_its_documented_nibble():
    for low, high in itertools.combinations(range(4), 2):
        keep = torch.zeros(1, 4, dtype=torch.bool)
        keep[0, [low, high]] = True
        values, indices = pack24(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), keep)
        assert indices[0].tolist() == [low | high << 2 | 0x40, *[0x44] * 7]  # padded with the pair (0, 1)
        assert values.tolist() == [[low + 1.0, high + 1.0]]


def test_a_lanes_word_holds_every_fourth_group():
    keep = random_mask(3, 192)
    words = pack24(torch.ones(3, 192), keep)[1].view(torch.int16)
    for row, group in itertools.product(range(3), range(48)):
        block, j, t = group // 16, group % 16 // 4, group % 4
        low, high = keep[row, 4 * group : 4 * group + 4].nonzero().flatten().tolist()
        assert int(words[row, 4 * block + t]) >> 4 * j & 15 == low | high << 2


def test_negative_zero_and_zero_are_values_like_any_other():
    weight = torch.tensor([[-0.0, 0.0, 5.0, 6.0]])
    dense = unpack24(*pack24(weight, torch.tensor([[True, True, False, False]])))
    assert torch.signbit(dense).tolist() == [[True, False, False, False]]


def test_blocks_of_rows_change_nothing():
    rows = 2 * BLOCK // 4096 + 5  # two whole blocks and a part of one
    weight, keep = torch.randn(rows, 4096), random_mask(rows, 4096)
    values, indices = pack24(weight, keep)
    parts = [pack24(w, k) for w, k in zip(weight.split(37), keep.split(37), strict=True)]  # less than a block each
    assert torch.equal(values, torch.cat([v for v, _ in parts])) and torch.equal(
        indices, torch.cat([i for _, i in parts])
    )
    assert torch.equal(unpack24(values, indices), torch.cat([unpack24(*part) for part in parts]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [(), (1,), (5,), (2, 3)])
def test_matmul_is_bit_equal_to_linear(dtype, tokens):
    torch.manual_seed(1)
    weight, bias, x = torch.randn(24, 40).to(dtype), torch.randn(24).to(dtype), torch.randn(*tokens, 40).to(dtype)
    keep = random_mask(24, 40)
    assert torch.equal(sparse24_matmul(x, *pack24(weight, keep), bias), F.linear(x, weight * keep, bias))


def test_nine_bits_a_weight():
    values, indices = pack24(torch.randn(64, 128).bfloat16(), random_mask(64, 128))
    assert (values.numel() * 2 + indices.numel()) * 8 / (64 * 128) == 9


@pytest.mark.parametrize("kept", [1, 3])
def test_a_group_that_does_not_keep_two_is_named(kept):
    keep = random_mask(3, 8)
    keep[2, 4:] = torch.arange(4) < kept
    with pytest.raises(ValueError, match="row 2, columns 4 to 7"):
        pack24(torch.randn(3, 8), keep)


def test_widths_and_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="divisible by 4"):
        pack24(torch.randn(2, 6), torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="keep must be bool"):
        pack24(torch.randn(2, 8), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="uint8 indices"):
        unpack24(torch.randn(2, 4), torch.zeros(2, 2, dtype=torch.uint8))


def test_damaged_indices_are_counted():
    indices = pack24(torch.randn(4, 24), random_mask(4, 24))[1]
    assert count_invalid24(indices) == 0
    indices[1, 0] = 0
    assert count_invalid24(indices) == 2
    indices[0, -1] |= 0xF0
    assert count_invalid24(indices) == 3
