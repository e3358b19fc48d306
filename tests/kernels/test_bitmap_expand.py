"""The bitmap kernels in Triton's interpreter: against the float64 product, and bit for bit against the reference."""

import pytest
import torch

from paredown.kernels.bitmap import MOST_VALUES, pack_bitmap, row_starts, unpack_bitmap
from paredown.kernels.bitmap_expand import decompress, matmul

DTYPES = [torch.bfloat16, torch.float16]
TOKENS = [1, 2, 8, 9, 17, 33, 65]
# (out, in): a whole tile; odd; one byte; one word; rows of whole words that are no whole step; ragged rows; one number
SHAPES = [(16, 512), (7, 33), (1, 4), (5, 32), (19, 160), (33, 200), (9, 131), (1, 1)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def weight_and_mask(rows, columns, dtype, density=0.4, seed=0):
    """Random; some weights are -0.0. Some rows keep nothing, some everything, the others a share of `density`."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw).to(dtype)
    weight[torch.rand(rows, columns, generator=draw) < 0.1] = -0.0
    keep = torch.rand(rows, columns, generator=draw) < density
    keep[rows // 2 :: 5] = False
    keep[rows // 3 :: 7] = True
    return weight, keep


def packed(weight, keep):
    values, bitmap = pack_bitmap(weight, keep)
    return values, bitmap, row_starts(bitmap)


def check(weight, keep, tokens, biased=False, seed=1, **tile):
    rows, columns = weight.shape
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=draw).to(weight.dtype)
    bias = torch.randn(rows, generator=draw).to(weight.dtype) if biased else None
    y = torch.full((tokens, rows), torch.nan)
    matmul(x, *packed(weight, keep), bias, y, **tile)
    dense = torch.where(keep, weight, 0).double()
    wanted = x.double() @ dense.T + (0 if bias is None else bias.double())
    assert float((y.double() - wanted).norm()) <= 1e-6 * float(wanted.norm()) + 1e-30
    return y


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_float64_product(shape, dtype):
    check(*weight_and_mask(*shape, dtype), tokens=3, biased=True)


@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens_is_multiplied(tokens):
    check(*weight_and_mask(18, 96, torch.bfloat16), tokens)
    check(*weight_and_mask(3, 21, torch.float16), tokens, biased=True)


@pytest.mark.parametrize(
    "tile",
    [
        {"warps": 1},
        {"warps": 2, "token_octets": 1},
        {"warps": 4, "row_octets": 4, "token_octets": 2},
        {"warps": 16, "row_octets": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(21, 256), (40, 84)], ids=str)
def test_every_tile_gives_the_same_product(tile, shape):
    check(*weight_and_mask(*shape, torch.bfloat16), tokens=11, biased=True, **tile)


@pytest.mark.parametrize("density", [0.01, 0.5, 1.1])
@pytest.mark.parametrize("columns", [640, 100])
def test_any_density_is_expanded(density, columns):
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(17, columns, generator=draw).bfloat16()
    check(weight, torch.rand(17, columns, generator=draw) < density, tokens=2, warps=2)


def test_each_column_meets_its_own_activation():
    weight = (torch.arange(3 * 140).reshape(3, 140) % 97 + 1).bfloat16()
    _, keep = weight_and_mask(3, 140, torch.bfloat16, density=0.5)
    y = torch.full((140, 3), torch.nan)
    matmul(torch.eye(140).bfloat16(), *packed(weight, keep), None, y, warps=1)
    assert torch.equal(y, torch.where(keep, weight, 0).float().T)


@dtypes
def test_two_runs_give_the_same_bits(dtype):
    weight, keep = weight_and_mask(20, 160, dtype)
    assert torch.equal(check(weight, keep, 5), check(weight, keep, 5))


def test_a_dropped_weight_leaves_the_bias_alone():
    weight, _ = weight_and_mask(10, 64, torch.bfloat16)
    values, bitmap, starts = packed(weight, torch.zeros(10, 64, dtype=torch.bool))
    bias, y = torch.arange(10.0).bfloat16(), torch.full((2, 10), torch.nan)
    matmul(torch.randn(2, 64).bfloat16(), values, bitmap, starts, bias, y)
    assert torch.equal(y, bias.float().expand(2, 10))


def test_numbers_beyond_the_last_column_are_not_read():
    """x is in the middle of a buffer of infinities: anything read beyond its end shows in the result."""
    weight, keep = weight_and_mask(6, 41, torch.bfloat16, density=1.1)
    buffer = torch.full((5 * 41,), torch.inf).bfloat16()
    x = buffer[41:164].view(3, 41)
    x.copy_(torch.randn(3, 41))
    y = torch.full((3, 6), torch.nan)
    matmul(x, *packed(weight, keep), None, y)
    wanted = x.double() @ torch.where(keep, weight, 0).double().T
    assert float((y.double() - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_bitmap_may_begin_at_any_byte(cut):
    weight, keep = weight_and_mask(9, 64, torch.bfloat16)
    values, bitmap, starts = packed(weight, keep)
    shifted = torch.full((bitmap.numel() + 8,), 255, dtype=torch.uint8)
    moved = shifted[cut : cut + bitmap.numel()].view(bitmap.shape)
    moved.copy_(bitmap)
    dense = torch.full((9, 64), torch.nan).bfloat16()
    decompress(values, moved, starts, dense)
    assert torch.equal(dense, unpack_bitmap(values, bitmap, 64))


@pytest.mark.parametrize("shape", [*SHAPES, (10, 1024), (3, 1057)], ids=str)
@pytest.mark.parametrize("tile", [{}, {"lanes": 4, "warps": 1}], ids=str)
def test_the_dense_weight_is_the_references_bit_for_bit(shape, tile):
    weight, keep = weight_and_mask(*shape, torch.bfloat16)
    values, bitmap, starts = packed(weight, keep)
    dense = torch.full(shape, torch.nan).bfloat16()
    decompress(values, bitmap, starts, dense, **tile)
    assert torch.equal(dense.view(torch.int16), unpack_bitmap(values, bitmap, shape[1]).view(torch.int16))


@dtypes
def test_every_bit_pattern_comes_back(dtype):
    """NaN payloads, infinities, subnormal numbers and -0.0 are copied as bits; what is not kept is +0.0."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(64, 1024)
    keep = torch.rand(64, 1024, generator=torch.Generator().manual_seed(4)) < 0.5
    dense = torch.full((64, 1024), torch.nan).to(dtype)
    decompress(*packed(patterns.view(dtype), keep), dense)
    assert torch.equal(dense.view(torch.int16), torch.where(keep, patterns, 0))


def test_starts_are_the_numbers_of_values_before_each_row():
    _, keep = weight_and_mask(23, 37, torch.bfloat16)
    starts = row_starts(pack_bitmap(torch.ones(23, 37), keep)[1])
    counts = [sum(row) for row in keep.tolist()]
    assert starts.dtype == torch.int32
    assert starts.tolist() == [sum(counts[:i]) for i in range(24)]


def test_more_values_than_int32_counts_are_refused():
    bitmap = torch.full((3, 2), 255, dtype=torch.uint8)
    assert torch.iinfo(torch.int32).max == MOST_VALUES
    assert row_starts(bitmap, most_values=48).tolist() == [0, 16, 32, 48]
    with pytest.raises(ValueError, match="48 values are stored"):
        row_starts(bitmap, most_values=47)
