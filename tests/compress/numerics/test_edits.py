"""What an edit says of itself: what it keeps, how wrong it is, and the fewest bytes that hold it exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paredown.compress.numerics.edits import Masked, mask_spec
from paredown.compress.numerics.masks import NofM, keep_mask
from paredown.compress.numerics.moments import InputStats


def stats_of(x, *needs):
    stats = InputStats(x.shape[1], frozenset(needs))
    stats.update(x)
    return stats


def edit_of(weight, sparsity):
    keep = keep_mask(weight.float().abs(), sparsity)
    return Masked(weight * keep, keep, sparsity)


def test_the_error_with_the_gram_is_that_of_the_outputs_themselves():
    torch.manual_seed(0)
    x, weight = torch.randn(200, 12) @ torch.randn(12, 12), torch.randn(150, 12)
    edit = edit_of(weight, 0.5)
    outputs, wrong = x.double() @ weight.double().T, x.double() @ (weight - edit.weight).double().T
    wanted = float(wrong.square().sum() / outputs.square().sum())
    assert edit.relative_error(weight, stats_of(x, "gram")) == pytest.approx(wanted, rel=1e-4)


def test_with_the_diagonal_alone_inputs_are_taken_as_uncorrelated():
    torch.manual_seed(0)
    x, weight = torch.randn(200, 12) * torch.arange(1, 13), torch.randn(5, 12)
    edit = edit_of(weight, NofM(2, 4))
    moments = x.double().square().mean(0)
    wanted = float(((weight - edit.weight).double() ** 2 @ moments).sum() / (weight.double() ** 2 @ moments).sum())
    assert edit.relative_error(weight, stats_of(x, "second_moment_diagonal")) == pytest.approx(wanted, rel=1e-4)


def test_nothing_removed_is_no_error_and_everything_removed_is_all_of_it():
    x, weight = torch.randn(50, 8), torch.randn(3, 8)
    stats = stats_of(x, "gram")
    keep = torch.ones(3, 8, dtype=torch.bool)
    assert Masked(weight, keep, 0.0).relative_error(weight, stats) == 0
    assert Masked(weight * 0, ~keep, 0.99).relative_error(weight, stats) == pytest.approx(1)


def test_a_weight_of_zeros_or_inputs_of_zeros_divide_by_nothing():
    keep = torch.ones(3, 8, dtype=torch.bool)
    zeros = Masked(torch.zeros(3, 8), keep, 0.0)
    assert zeros.relative_error(torch.zeros(3, 8), stats_of(torch.randn(9, 8), "gram")) == 0
    assert zeros.relative_error(torch.randn(3, 8), stats_of(torch.zeros(9, 8), "gram")) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_weight_is_measured_in_float32(dtype):
    torch.manual_seed(0)
    weight = torch.randn(64, 96).to(dtype)
    edit, stats = edit_of(weight, 0.5), stats_of(torch.randn(300, 96), "gram")
    wide = Masked(edit.weight.float(), edit.keep, 0.5)
    assert edit.relative_error(weight, stats) == wide.relative_error(weight.float(), stats)


def test_kept_counts_the_mask_and_not_the_zeros_of_the_weight():
    edit = Masked(torch.zeros(2, 4), torch.tensor([[True, True, False, False]] * 2), NofM(2, 4))
    assert edit.numbers == 4 and edit.dense() is edit.weight


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.floats(0, 1), st.sampled_from([2, 4]), st.integers(0, 3))
def test_bitmap_is_chosen_exactly_where_it_has_fewer_bytes(rows, columns, share, element, experts):
    shape = (experts, rows, columns) if experts else (rows, columns)
    kept = round(share * math.prod(shape))
    dense = math.prod(shape) * element
    packed = kept * element + math.prod(shape) // columns * -(-columns // 8)
    assert mask_spec(shape, kept, 0.5, element).kind == ("bitmap" if packed < dense else "dense")


def test_only_two_of_four_has_a_format_of_its_own():
    assert mask_spec((8, 16), 64, NofM(2, 4), 2).kind == "sparse24"
    assert mask_spec((8, 16), 32, NofM(1, 4), 2).kind == "bitmap"
    assert mask_spec((8, 16), 64, NofM(4, 8), 2).kind == "bitmap"
    assert mask_spec((8, 16), 128, NofM(4, 4), 2).kind == "dense"
