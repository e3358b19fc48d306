"""Exact counts, whatever the ties, widths and patterns."""

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from paredown.compress.errors import PareError
from paredown.compress.numerics.masks import NofM, keep_mask, largest, parse_sparsity, row_wise


def slow_n_of_m(score, n, m):
    keep = torch.zeros_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        for first in range(0, score.shape[1], m):
            order = sorted(range(m), key=lambda j: (-score[row, first + j].item(), j))
            for j in order[:n]:
                keep[row, first + j] = True
    return keep


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.data())
def test_n_of_m_is_the_slow_loop_ties_included(m, data):
    n, seed = data.draw(st.integers(1, m)), data.draw(st.integers(0, 999))
    score = torch.randint(0, 4, (3, 2 * m), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(keep_mask(score, NofM(n, m)), slow_n_of_m(score, n, m))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 23), st.floats(0, 0.999), st.integers(0, 999))
def test_fractions_remove_exactly_so_many_and_the_lowest(rows, columns, sparsity, seed):
    score = torch.randint(0, 5, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    by_row, by_layer = keep_mask(score, sparsity, "row"), keep_mask(score, sparsity, "layer")
    assert ((~by_row).sum(1) == round(sparsity * columns)).all()
    assert (~by_layer).sum() == round(sparsity * score.numel())
    for kept, removed in (
        (score[by_layer], score[~by_layer]),
        *((s[k], s[~k]) for s, k in zip(score, by_row, strict=True)),
    ):
        if len(kept) and len(removed):
            assert kept.min() >= removed.max()


def test_of_equals_the_first_stays():
    assert keep_mask(torch.ones(1, 6), 0.5).tolist() == [[True] * 3 + [False] * 3]


def test_one_of_four_keeps_one():
    assert keep_mask(torch.rand(5, 16), NofM(1, 4)).view(5, 4, 4).sum(-1).eq(1).all()


def test_a_width_that_is_not_divisible_is_named():
    with pytest.raises(PareError, match="divisible by 4, and this layer has 6"):
        keep_mask(torch.rand(2, 6), NofM(2, 4))


def test_what_a_sparsity_may_be():
    assert parse_sparsity("2:4") == NofM(2, 4) and str(NofM(2, 4)) == "2:4"
    assert parse_sparsity(0) == 0.0 and parse_sparsity("0.7") == 0.7


@pytest.mark.parametrize(
    ("value", "said"),
    [(124, '"2:4"'), (1.0, "in .0, 1."), (-0.1, "in .0, 1."), ("3:2", "between 1 and m"), ("half", "neither"), (True, "must be"), ([2, 4], "must be")],
)  # fmt: skip
def test_what_it_may_not_be(value, said):
    with pytest.raises(PareError, match=said):
        parse_sparsity(value)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 999), st.sampled_from([0.0, 0.3, NofM(2, 4), NofM(3, 12)]))
def test_a_mask_does_not_depend_on_how_the_rows_are_split(rows, seed, sparsity):
    score = torch.randint(0, 3, (rows * 40, 24), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(row_wise(lambda part: keep_mask(part, sparsity), score), keep_mask(score, sparsity))


def test_sparsity_zero_keeps_everything_and_m_of_m_too():
    score = torch.zeros(3, 8)
    for sparsity in (0.0, NofM(4, 4), NofM(1, 1)):
        assert keep_mask(score, sparsity).all() and keep_mask(score, sparsity, "layer").all()


def test_layer_and_row_differ_where_one_row_is_larger():
    score = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])
    assert keep_mask(score, 0.5, "layer").sum(1).tolist() == [0, 4]
    assert keep_mask(score, 0.5, "row").sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, NofM(2, 4), NofM(4, 8)])
def test_the_largest_are_those_that_the_mask_of_magnitudes_keeps(sparsity):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(largest(weight, sparsity), weight * keep_mask(weight.abs(), sparsity, within="layer"))


def test_of_equal_magnitudes_at_the_border_none_is_among_the_largest():
    weight = torch.tensor([[1.0, -3.0, 2.0, -2.0, 2.0, 4.0]])
    assert largest(weight, 0.5).tolist() == [[0.0, -3.0, 0.0, 0.0, 0.0, 4.0]]


def test_unquoted_patterns_are_told_how_to_be_quoted_as_yaml_itself_reads_them():
    for pattern in ("2:4", "1:4", "4:8", "16:32"):
        with pytest.raises(PareError, match=f'Quote it: sparsity: "{pattern}"'):
            parse_sparsity(yaml.safe_load(pattern))


@pytest.mark.parametrize("value", ["0:4", "2:", ":4", "2:4:8", "-2:4", "nan", float("nan"), float("inf"), None, "", {}])
def test_other_nonsense_is_refused_too(value):
    with pytest.raises(PareError, match="sparsity"):
        parse_sparsity(value)


@pytest.mark.parametrize(("n", "m"), [(7, 16), (16, 32), (3, 64), (60, 100)])
def test_wide_groups_with_many_ties_are_the_slow_loop_too(n, m):
    score = torch.randint(0, 3, (3, 2 * m), generator=torch.Generator().manual_seed(m)).float()
    assert torch.equal(keep_mask(score, NofM(n, m)), slow_n_of_m(score, n, m))
