"""Moments do not depend on how the tokens were cut into batches, and the factor inverts what it says."""

import pytest
import torch

from paredown.compress.errors import PareError
from paredown.compress.numerics.cholesky import inverse_cholesky, invert_lower_
from paredown.compress.numerics.moments import INPUT_NEEDS, InputStats, Need, Stats


def gathered(x, *cuts, needs=INPUT_NEEDS):
    stats = InputStats(x.shape[-1], frozenset(needs))
    for part in x.tensor_split(list(cuts)):
        stats.update(part)
    return stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_are_those_of_float64_however_batches_are_cut(dtype):
    x = torch.randn(301, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double()
    for stats in (gathered(x), gathered(x, 1, 5, 200), gathered(x.view(7, 43, 17))):
        assert stats.count == 301
        torch.testing.assert_close(stats.gram, exact.T @ exact / 301, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.second_moment_diagonal, exact.square().mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.mean, exact.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.absolute_mean, exact.abs().mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.rms, exact.square().mean(0).sqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_count_by_their_tokens_however_they_are_cut_into_batches(dtype):
    x = torch.randn(7, 43, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    short, exact = x[0, :11], x.double()
    mean, norm = exact.abs().mean(1).square(), exact.square().mean(1).sqrt()  # (windows, 17)
    for stats in (gathered(x), gathered(x, 1, 3)):
        torch.testing.assert_close(stats.window_mean, mean.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.window_norm, norm.mean(0), rtol=1e-5, atol=1e-6)
        stats.update(short)  # two dimensions are one window
        alone = short.double().abs().mean(0).square(), short.double().square().mean(0).sqrt()
        both = [(43 * of.sum(0) + 11 * one) / (43 * 7 + 11) for of, one in zip((mean, norm), alone, strict=True)]
        torch.testing.assert_close(stats.window_mean, both[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.window_norm, both[1], rtol=1e-5, atol=1e-6)


def test_of_one_token_a_window_the_moments_of_windows_are_those_of_tokens():
    stats = gathered(torch.randn(30, 1, 5, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(stats.window_mean, stats.second_moment_diagonal, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.window_norm, stats.absolute_mean, rtol=1e-5, atol=1e-6)
    one = InputStats(5, INPUT_NEEDS)
    one.update(torch.ones(5))
    assert one.count == 1 and torch.equal(one.window_mean, torch.ones(5).double())


def test_what_was_not_asked_for_is_not_there():
    stats = gathered(torch.randn(4, 3), needs={"mean"})
    with pytest.raises(RuntimeError, match=r"'gram' was not collected: .*`needs`"):
        _ = stats.gram
    with pytest.raises(RuntimeError, match="'fisher' was not collected"):
        Stats(stats).gradient(Need.FISHER)
    with pytest.raises(ValueError, match=r"unknown statistics: median\. Known: absolute_mean, cross"):
        InputStats(3, frozenset({"median"}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    x = torch.randn(4, 3)
    x[2, 1] = bad
    with pytest.raises(PareError, match="NaN or infinite"):
        gathered(x)


def test_uniform_statistics_have_the_identity_as_gram():
    stats = InputStats.uniform(5, INPUT_NEEDS)
    assert torch.equal(stats.gram, torch.eye(5, dtype=torch.float64)) and torch.equal(stats.rms, torch.ones(5).double())


def test_the_factor_is_that_of_the_damped_inverse():
    stats = gathered(torch.randn(200, 40) @ torch.randn(40, 40))
    inverse = stats.inverse_cholesky(0.01)
    damped = stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    factor = inverse.factor.double()
    assert torch.equal(factor, factor.triu()) and not inverse.escalated and inverse.damping == 0.01
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(40).double(), rtol=0, atol=1e-4)
    assert stats.inverse_cholesky(0.01) is inverse


def test_dead_columns_get_a_one_on_the_diagonal():
    x = torch.randn(50, 6)
    x[:, [1, 4]] = 0
    inverse = gathered(x).inverse_cholesky(0.01)
    assert inverse.dead.tolist() == [False, True, False, False, True, False]
    assert inverse.factor[1, 1] == 1 and inverse.factor[4, 4] == 1


def test_damping_grows_until_the_matrix_can_be_factored_and_says_so():
    gram = torch.tensor([[1.0, 2.5, 0, 0], [2.5, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    inverse = inverse_cholesky(gram, 1, 0.01)
    assert inverse.escalated and inverse.damping == pytest.approx(10)
    with pytest.raises(PareError, match="cannot be factored"):
        inverse_cholesky(torch.tensor([[1.0, 1e9], [1e9, 1.0]], dtype=torch.float64), 1, 0.01)


@pytest.mark.parametrize("size", [1, 7, 33, 70])
def test_the_inverse_by_halves_inverts(size):
    lower = torch.randn(size, size, dtype=torch.float64).tril() + 5 * torch.eye(size, dtype=torch.float64)
    inverse = lower.T.contiguous().T.clone()
    invert_lower_(inverse, leaf=8)
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ lower, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_refused_batch_leaves_no_trace():
    stats = gathered(torch.ones(4, 3))
    with pytest.raises(PareError):
        stats.update(torch.tensor([[1.0, float("inf"), float("-inf")]]))
    assert stats.count == 4 and torch.equal(stats.gram, torch.ones(3, 3).double())


def test_an_empty_batch_counts_for_nothing():
    stats = gathered(torch.ones(4, 3))
    stats.update(torch.empty(0, 3))
    assert stats.count == 4


def test_new_inputs_make_a_new_factor():
    stats = gathered(torch.randn(30, 4))
    before = stats.inverse_cholesky()
    stats.update(10 * torch.randn(30, 4))
    after = stats.inverse_cholesky()
    assert after is not before and not torch.allclose(after.factor, before.factor)


def test_a_singular_matrix_without_damping_is_damped_a_little_and_says_so():
    stats = InputStats.from_sums(1, {"gram": torch.ones(4, 4, dtype=torch.float64)})
    inverse = stats.inverse_cholesky(0.0)
    assert inverse.escalated and inverse.damping == pytest.approx(1e-7)
    ordinary = stats.inverse_cholesky(0.01)
    assert not ordinary.escalated and ordinary.damping == 0.01


def test_the_factor_of_live_columns_does_not_know_of_dead_ones():
    x = torch.randn(60, 5)
    wide = torch.zeros(60, 7)
    live = [0, 2, 3, 5, 6]
    wide[:, live] = x
    # the mean of the diagonal, and so the damping, is over all columns
    factor = gathered(wide).inverse_cholesky(0.07).factor[live][:, live]
    torch.testing.assert_close(factor, gathered(x).inverse_cholesky(0.05).factor, rtol=1e-5, atol=1e-6)


def test_inputs_that_never_came_make_every_column_dead_and_the_factor_the_identity():
    inverse = gathered(torch.zeros(9, 3)).inverse_cholesky()
    assert inverse.dead.all() and torch.equal(inverse.factor, torch.eye(3)) and not inverse.escalated


def test_a_large_factor_goes_through_the_halves_and_still_inverts():
    stats = gathered(torch.randn(700, 600), needs={"gram"})
    factor = stats.inverse_cholesky(0.01).factor.double()
    damped = stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(600, dtype=torch.float64)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(600).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [1, 7, 512, 700, 1100])
def test_the_gram_and_the_energy_are_whole_though_a_triangle_is_summed_in_strips(width, monkeypatch):
    monkeypatch.setattr("paredown.compress.numerics.moments.ROWS_AT_ONCE", 2)
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(0)) + 1
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    stats = gathered(x, 11, needs={"gram"})
    torch.testing.assert_close(stats.gram, x.double().T @ x.double() / 40, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.gram, stats.gram.T)
    wanted = float((x.double() @ rows.double().T).square().sum()) / 40
    assert stats.energy(rows) == pytest.approx(wanted, rel=1e-4)
    half = (rows / 2).bfloat16()
    assert stats.energy(rows, minus=half) == pytest.approx(stats.energy(rows - half.float()), rel=1e-6)
    assert stats.energy(rows, minus=half) == pytest.approx(wanted / 4, rel=2e-2)
    diagonal = gathered(x, needs={"second_moment_diagonal"})
    wanted = float((rows.double().square() @ x.double().square().mean(0)).sum())
    assert diagonal.energy(rows.bfloat16().float()) == pytest.approx(wanted, rel=2e-2)


def test_sums_taken_elsewhere_are_the_same_statistics():
    x, dense = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    sums = {"gram": x.T @ x, "mean": x.sum(0), "cross": dense.T @ x, "dense_mean": dense.sum(0)}
    stats, counted = InputStats.from_sums(30, sums), InputStats(5, frozenset({"gram", "mean", "cross"}))
    counted.update(x, dense)
    assert stats.needs == counted.needs and stats.count == counted.count
    for name in (*sums, "rms"):
        torch.testing.assert_close(getattr(stats, name), getattr(counted, name), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="median"):
        InputStats.from_sums(30, {"median": x.sum(0)})
