"""How factors are stored: pivot rows and coefficients, balanced pairs, and what a rank costs."""

import pytest
import torch
from factoring import COMBINATIONS, SHAPES, data, made, moment, pifa_matrix, slow_loss, weighed_by
from hypothesis import given, settings
from hypothesis import strategies as st

from paredown.compress.numerics.factorize import Factors, balanced, cost, factorize, largest_rank
from paredown.compress.numerics.metric import Metric, Target
from paredown.compress.numerics.pifa import pivoted
from paredown.compress.storage.kinds import stored_numbers
from paredown.compress.storage.spec import Spec
from paredown.kernels.lowrank import pifa_dense


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize(("shape", "input_side", "output_side"), COMBINATIONS)
def test_pivot_rows_and_coefficients_are_the_same_matrix_in_fewer_numbers(shape, input_side, output_side, rank):
    weight, x, delta = data(*SHAPES[shape])
    out, inner = weight.shape
    metric, _, _ = weighed_by(weight, x, delta, input_side, output_side)
    factors = factorize(Target(weight), metric, lambda losses: rank)
    stored = pivoted(factors, metric, torch.float64)
    assert stored["pivots"].numel() + stored["coefficients"].numel() == rank * (out + inner - rank)
    assert stored["order"].dtype == torch.int32 and sorted(stored["order"].tolist()) == list(range(out))
    wanted = made(factors)
    torch.testing.assert_close(pifa_matrix(stored), wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))


def test_pivots_are_rows_of_the_matrix_bit_for_bit():
    weight, x, _ = data(14, 9)
    metric = Metric(moment(x))
    factors = factorize(Target(weight), metric, lambda losses: 4)
    stored = pivoted(factors, metric, torch.bfloat16)
    wanted = made(factors).bfloat16()
    places = stored["order"].tolist()
    for row in range(14):
        if places[row] < 4:
            assert torch.equal(stored["pivots"][places[row]], wanted[row])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(64, 96, 16), (64, 96, 48), (96, 64, 32)])
def test_coefficients_are_small_because_pivots_are_chosen(shape, seed):
    out, inner, rank = shape
    weight, x, _ = data(out, inner, tokens=400, seed=seed)
    factors = factorize(Target(weight), Metric(moment(x)), lambda losses: rank)
    chosen = pivoted(factors, Metric(moment(x)), torch.float64)["coefficients"].abs().max()
    first = (factors.left[rank:] @ torch.linalg.inv(factors.left[:rank])).abs().max()  # the first k rows as pivots
    assert chosen < 4 and chosen < first


def test_more_pivots_than_the_data_has_directions_are_stored_all_the_same():
    """Fewer distinct tokens than features, summed in float32: the moment is singular and, by rounding, not even positive."""
    torch.manual_seed(0)
    x = torch.randn(20, 96, dtype=torch.float64).mul(torch.logspace(2, 0, 20, dtype=torch.float64)[:, None])
    noise = torch.randn(96, 96, dtype=torch.float64)
    moment = x.T @ x / 20 + 3e-5 * (noise + noise.T)
    assert torch.linalg.eigvalsh(moment).min() < -1e-4
    weight, metric = torch.randn(64, 96, dtype=torch.float64), Metric(moment)
    factors = factorize(Target(weight), metric, lambda losses: 60)
    stored = pivoted(factors, metric, torch.bfloat16)
    made = pifa_dense(*(stored[name].double() for name in ("pivots", "coefficients")), stored["order"])
    aim = factors.left @ factors.right
    assert float(((made - aim) @ x.T).norm() / (aim @ x.T).norm()) < 0.02  # bfloat16 of the pivots


def test_rows_that_repeat_are_never_pivots_together():
    weight, x, _ = data(6, 14)
    weight = torch.cat((weight, weight, torch.zeros(2, 14)))  # rank 6 of 14 rows
    stored = pivoted(factorize(Target(weight), Metric(moment(x)), lambda losses: 6), Metric(moment(x)), torch.float64)
    pivots = [row for row, place in enumerate(stored["order"].tolist()) if place < 6]
    assert sorted(row % 6 for row in pivots) == list(range(6)) and max(pivots) < 12
    torch.testing.assert_close(pifa_matrix(stored), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_pivoted_storage_survives_bfloat16_as_factors_do(shape, seed):
    weight, x, _ = data(*shape, tokens=400, seed=seed)
    a, none = moment(x), torch.eye(shape[0]).double()
    factors = factorize(Target(weight), Metric(a), lambda losses: 12)
    least = float(factors.losses[12:].sum())
    left, right = (t.bfloat16().double() for t in balanced(factors))
    narrow = slow_loss(weight - left @ right, a, none) - least
    stored = pivoted(factors, Metric(a), torch.bfloat16)
    assert stored["pivots"].dtype == stored["coefficients"].dtype == torch.bfloat16
    mine = slow_loss(weight - pifa_matrix(stored), a, none) - least
    assert mine < 4 * narrow and mine < 1e-3 * float(factors.losses.sum())


def test_coefficients_are_fitted_to_the_pivots_as_they_are_stored_where_the_metric_looks():
    better = torch.zeros(2)
    for seed in range(8):
        weight, x, _ = data(48, 64, tokens=400, seed=seed)
        a, none = moment(x), torch.eye(48).double()
        factors = factorize(Target(weight), Metric(a), lambda losses: 12)
        wanted, fitted = made(factors), pivoted(factors, Metric(a), torch.bfloat16)
        exact = pivoted(factors, Metric(a), torch.float64)["coefficients"]
        others = wanted[fitted["order"].long().argsort()[12:]]
        blind = torch.linalg.lstsq(fitted["pivots"].double().T, others.T).solution.T
        tried = [fitted, *({**fitted, "coefficients": c.bfloat16()} for c in (exact, blind))]
        lost = [slow_loss(wanted - pifa_matrix(t), a, none) for t in tried]
        better += torch.tensor([lost[0] < lost[1], lost[0] < lost[2]])
    assert better.min() >= 6


def test_pivoted_storage_is_lossless_off_the_data_too():
    weight, x, _ = data(9, 14, tokens=3)
    metric = Metric(moment(x))
    factors = factorize(Target(weight), metric, lambda losses: 6)
    wanted = made(factors)
    stored = pifa_matrix(pivoted(factors, metric, torch.float64))
    torch.testing.assert_close(stored, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize(("shape", "input_side", "output_side"), COMBINATIONS)
def test_balanced_factors_are_the_same_product_with_equal_sizes(shape, input_side, output_side):
    weight, x, delta = data(*SHAPES[shape])
    metric, _, _ = weighed_by(weight, x, delta, input_side, output_side)
    factors = factorize(Target(weight), metric, lambda losses: 5)
    left, right = balanced(factors)
    torch.testing.assert_close(left @ right, made(factors), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-10, atol=0)


def test_a_component_of_nothing_is_balanced_into_nothing():
    factors = Factors(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0], [2.0]]).double(), torch.zeros(1))
    left, right = balanced(factors)
    assert torch.isfinite(left).all() and torch.isfinite(right).all() and not (left @ right).any()


def extra_loss(factors, dtype, split):
    left, right = (t.to(dtype).double() for t in split)
    return float((left @ right - made(factors)).square().sum())


def splits(factors):
    """sqrt(Sigma) on both sides; all of it on the right; all of it on the left."""
    size = factors.right.norm(dim=1)
    return balanced(factors), (factors.left, factors.right), (factors.left * size, factors.right / size[:, None])


def test_an_even_split_costs_nothing_in_bfloat16():
    # a floating-point number loses the same share of itself at any size, so there is nothing to win either
    lost = torch.zeros(3)
    for seed in range(8):
        factors = factorize(Target(data(48, 64, seed=seed)[0]), Metric(), lambda losses: 12)
        lost += torch.tensor([extra_loss(factors, torch.bfloat16, split) for split in splits(factors)])
    assert lost[0] < 1.15 * lost[1:].min()


@pytest.mark.parametrize("case", ["tiny", "outliers"])
def test_an_even_split_keeps_float16_within_its_range(case):
    weight = data(48, 64)[0]
    if case == "tiny":
        weight *= 1e-5
    else:
        weight[0], weight[:, 0] = 4e4, 4e4
    factors = factorize(Target(weight), Metric(), lambda losses: 12)
    even, *uneven = (extra_loss(factors, torch.float16, split) for split in splits(factors))
    assert even < 1e-5 * float(made(factors).square().sum())
    assert all(not other < 3 * even for other in uneven)  # infinite, or lost among the subnormals


def stored_slowly(kind, out, inner, rank, bias, kept):
    numbers = 0
    for _ in range(rank):
        numbers += out + inner
    if kind == "pifa":
        numbers -= rank * rank
    if kind == "cur":
        numbers += rank * rank
    return numbers + (kept if kind == "bitmap_lowrank" else 0) + (out if bias else 0)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["lowrank", "pifa", "cur", "bitmap_lowrank"]),
    st.integers(1, 30),
    st.integers(1, 30),
    st.booleans(),
    st.data(),
)
def test_a_rank_costs_the_numbers_of_its_tensors(kind, out, inner, bias, drawn):
    rank, kept = drawn.draw(st.integers(1, min(out, inner))), drawn.draw(st.integers(0, out * inner))
    wanted = stored_slowly(kind, out, inner, rank, bias, kept)
    values = kept if kind == "bitmap_lowrank" else None
    assert stored_numbers(Spec(kind, (out, inner), rank=rank, values=values, bias=bias)) == wanted
    assert values is not None or cost(kind, (out, inner), rank, bias) == wanted


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["lowrank", "pifa", "cur"]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.floats(0, 1.2),
)
def test_the_largest_rank_is_found_by_trying_them_all(kind, out, inner, bias, share):
    numbers = share * out * inner
    # shares are decimal fractions, so that a millionth of a number is none
    fits = [k for k in range(1, min(out, inner) + 1) if stored_slowly(kind, out, inner, k, bias, 0) <= numbers + 1e-6]
    assert largest_rank(kind, (out, inner), numbers, bias) == (max(fits) if fits else 0)


@pytest.mark.parametrize(("out", "inner"), [(4096, 4096), (11008, 4096), (1024, 4096)])
def test_ranks_at_four_fifths_are_the_closed_forms(out, inner):
    numbers = 0.8 * out * inner
    both = out + inner
    factors, pifa = (largest_rank(kind, (out, inner), numbers) for kind in ("lowrank", "pifa"))
    assert factors == 16 * int(numbers / both / 16)  # large weights get ranks in steps of 16
    assert pifa == 16 * int((both - (both**2 - 4 * numbers) ** 0.5) / 2 / 16)
    assert pifa > factors
    if out == inner:  # without the steps 2264 instead of 1638
        assert (pifa, factors) == (2264 // 16 * 16, 1638 // 16 * 16)
    even = 16 * int(((out**2 + 6 * out * inner + inner**2) ** 0.5 - both) / 2 / 16)
    assert largest_rank("cur", (out, inner), out * inner) == even
