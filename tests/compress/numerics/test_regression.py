"""The affine form and regression towards the dense output against slow references and brute force."""

from dataclasses import replace

import pytest
import torch
from factoring import SHAPES, data, made, moment, symmetric_root, weighed_by

from paredown.compress.errors import PareError
from paredown.compress.methods.lowrank.base import affine_shift, centred
from paredown.compress.numerics.factorize import factorize
from paredown.compress.numerics.least_squares import regressed
from paredown.compress.numerics.metric import Metric, Target, error
from paredown.compress.numerics.moments import InputStats
from paredown.compress.numerics.pifa import pivoted


def stats_of(x):
    """Of sums in float64, so that what is compared is the mathematics alone."""
    return InputStats.from_sums(len(x), {"gram": x.T @ x, "mean": x.sum(0)})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_the_affine_form_loses_never_more_and_is_the_best_of_its_kind(shape, seed):
    weight, x, _ = data(*SHAPES[shape], seed=seed)
    stats, outputs = stats_of(x), x @ weight.T
    for rank in range(1, 9):
        plain = made(factorize(Target(weight), Metric(stats.gram), lambda losses, rank=rank: rank))
        affine = factorize(Target(weight), Metric(centred(stats)), lambda losses, rank=rank: rank)
        shift = affine_shift(weight, made(affine), stats)
        lost = float((outputs - x @ made(affine).T - shift).square().sum()) / len(x)
        assert lost <= float((outputs - x @ plain.T).square().sum()) / len(x) * (1 + 1e-9)
        # the best affine map of rank k keeps the mean, and the principal components of what varies
        squares = torch.linalg.svdvals(outputs - outputs.mean(0)).square() / len(x)
        assert lost == pytest.approx(float(squares[rank:].sum()), rel=1e-8, abs=1e-9 * float(squares.sum()))


@pytest.mark.parametrize("shape", SHAPES)
def test_centring_without_the_bias_is_what_loses(shape):
    weight, x, _ = data(*SHAPES[shape])
    stats, outputs = stats_of(x), x @ weight.T
    plain = made(factorize(Target(weight), Metric(stats.gram), lambda losses: 4))
    affine = made(factorize(Target(weight), Metric(centred(stats)), lambda losses: 4))
    without, shift = outputs - x @ affine.T, affine_shift(weight, affine, stats)
    lost = [float(t.square().sum()) for t in (without - shift, outputs - x @ plain.T, without)]
    assert lost == sorted(lost) and lost[0] < lost[1] < lost[2]


def test_inputs_of_mean_zero_need_no_bias():
    weight, x, _ = data(9, 14)
    stats = stats_of(x - x.mean(0))
    plain, affine = (factorize(Target(weight), Metric(m), lambda losses: 4) for m in (stats.gram, centred(stats)))
    torch.testing.assert_close(made(plain), made(affine), rtol=1e-9, atol=1e-9)
    assert affine_shift(weight, made(affine), stats).abs().max() < 1e-9


def shifted(x, seed=0):
    """The same tokens as a compressed model might hand them on."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.8 * x + 0.4 * x.abs().mean() * noise + 0.5


def regression(gram, cross, damping, **options):
    """The correction E of W (I + E) from the moments E[y y^T] and E[x y^T]."""
    return regressed(cross - gram, gram, damping, **options)


@pytest.mark.parametrize("each", [False, True])
def test_the_regression_is_the_ridge_towards_the_dense_output(each):
    weight, x, _ = data(9, 14)
    y = shifted(x) * torch.logspace(0, 2, 14)
    sizes = moment(y).diagonal()
    for damping in (1e-9, 0.01, 1.0):
        change = regression(moment(y), x.T @ y / len(x), damping, each=each)
        # least squares on the data and on rows that stand for the damping, which pull towards the weight itself
        pull = torch.diag((len(x) * damping * (sizes if each else sizes.mean().expand(14))).sqrt())
        rows, wanted = torch.cat((y, pull)), torch.cat((x @ weight.T, pull @ weight.T))
        best = torch.linalg.lstsq(rows, wanted).solution.T
        torch.testing.assert_close(Target(weight, change).value, best, rtol=1e-7, atol=1e-7)


def test_a_target_is_regressed_as_a_whole_or_by_a_correction_of_its_input():
    weight, x, _ = data(9, 14)
    y = shifted(x)
    gram, change = moment(y), x.T @ y / len(x) - moment(y)
    by_input = Target(weight, regressed(change, gram, 0.01)).value
    torch.testing.assert_close(Target(weight, added=regressed(weight @ change, gram, 0.01)).value, by_input)
    lost = torch.randn(200, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # (tokens, out)
    both = Target(weight, regressed(change, gram, 0.0), regressed(lost.T @ y / len(y), gram, 0.0)).value
    wanted = torch.linalg.lstsq(y, x @ weight.T + lost).solution.T
    torch.testing.assert_close(both, wanted, rtol=1e-7, atol=1e-7)
    found = factorize(Target(weight, added=both - weight), Metric(gram), lambda losses: 3)
    torch.testing.assert_close(made(found), made(factorize(Target(both), Metric(gram), lambda losses: 3)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("output_side", ["none", "diagonal", "full"])
def test_a_moment_that_counts_from_the_mean_is_the_covariance(shape, output_side):
    weight, x, delta = data(*SHAPES[shape])
    y, out, inner = x + torch.linspace(0, 3, x.shape[1]), *weight.shape
    plain, _, _ = weighed_by(weight, y, delta, "full", output_side)
    mean, difference = y.mean(0), torch.randn(out, inner, generator=torch.Generator().manual_seed(1)).double()
    from_mean = replace(plain, mean=mean)
    covariance = replace(plain, input=moment(y - mean))
    one, two = (factorize(Target(weight), m, lambda losses: 4) for m in (from_mean, covariance))
    torch.testing.assert_close(one.losses, two.losses, rtol=1e-8, atol=1e-9 * float(two.losses[0]))
    torch.testing.assert_close(made(one), made(two), rtol=1e-7, atol=1e-7)
    assert error(difference, from_mean, weight) == pytest.approx(error(difference, covariance, weight), rel=1e-8)
    for key, wanted in pivoted(two, covariance, torch.bfloat16).items():
        torch.testing.assert_close(pivoted(two, from_mean, torch.bfloat16)[key], wanted)
    cross, before = torch.randn(3, inner, generator=torch.Generator().manual_seed(2)).double(), plain.input.clone()
    added = 0.01 * covariance.input.diagonal().mean() * torch.eye(inner).double()
    wanted = cross @ torch.linalg.inv(covariance.input + added)
    torch.testing.assert_close(regressed(cross, plain.input, 0.01, mean), wanted, rtol=1e-8, atol=1e-9)
    assert torch.equal(plain.input, before)


def test_without_a_shift_the_regression_changes_nothing():
    weight, x, _ = data(9, 14)
    change = regression(moment(x), moment(x), 0.01)
    assert not change.any() and torch.equal(Target(weight, change).value, weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_aiming_at_the_dense_output_is_never_worse_than_factoring_the_weight(shape, seed):
    weight, x, _ = data(*SHAPES[shape], seed=seed)
    y, metric = shifted(x, seed), Metric(moment(shifted(x, seed)))
    aimed = Target(weight, regression(moment(y), x.T @ y / len(x), 0.0))
    blind = Metric(moment(x))
    for rank in range(1, 9):
        lost = [
            float((x @ weight.T - y @ made(factorize(target, by, lambda losses, rank=rank: rank)).T).square().sum())
            for target, by in ((aimed, metric), (Target(weight), metric), (Target(weight), blind))
        ]
        assert lost[0] <= min(lost[1:]) * (1 + 1e-9)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_reduced_rank_regression_is_the_end_of_alternating_least_squares_on_the_data(shape, weighed):
    weight, x, delta = data(*SHAPES[shape])
    y = shifted(x)
    metric, _, g = weighed_by(weight, y, delta, "full", "full" if weighed else "none")
    target = Target(weight, regression(moment(y), x.T @ y / len(x), 0.0))
    found = factorize(target, metric, lambda losses: 3)
    root = symmetric_root(g)
    wanted = x @ weight.T @ root  # (tokens, out): errors count as the metric weighs them
    left = torch.randn(len(weight), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(500):
        right = torch.linalg.lstsq(y, torch.linalg.lstsq(left, wanted.T).solution.T).solution.T
        left = torch.linalg.lstsq(y @ right.T, wanted).solution.T
    best = float((wanted - y @ right.T @ left.T).square().sum())
    lost = float((wanted - y @ made(found).T @ root).square().sum())
    assert lost == pytest.approx(best, rel=1e-6)
    # and the losses not kept are what it costs beyond regression of full rank
    free = float((wanted - y @ target.value.T @ root).square().sum())
    assert (lost - free) / len(x) == pytest.approx(float(found.losses[3:].sum()), rel=1e-6)


def test_too_little_damping_of_a_singular_moment_is_refused_by_name():
    _, y, _ = data(9, 14, tokens=3)
    y[:, 0] = 0
    with pytest.raises(PareError, match="raise damping"):
        regression(moment(y), moment(y), 0.0)
    assert torch.isfinite(regression(moment(y), moment(2 * y), 0.01)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_refitting_the_left_factor_helps_on_other_inputs_only(shape):
    weight, x, _ = data(*SHAPES[shape])
    found = factorize(Target(weight), Metric(moment(x)), lambda losses: 4)

    def refitted(inputs):
        return torch.linalg.lstsq(inputs @ found.right.T, x @ weight.T).solution.T

    torch.testing.assert_close(refitted(x), found.left, rtol=1e-8, atol=1e-8)
    y = shifted(x)
    lost = [float((x @ weight.T - y @ (u @ found.right).T).square().sum()) for u in (refitted(y), found.left)]
    assert lost[0] < 0.99 * lost[1]


@pytest.mark.parametrize("each", [False, True])
def test_the_variance_of_an_input_that_never_changes_may_be_rounded_below_zero(each):
    _, x, _ = data(9, 14)
    x[:, 3] = 1000.0
    gram, mean = moment(x), x.mean(0)
    gram[3, 3] -= 1e-6 * gram[3, 3]  # as sums in float32 may end
    assert torch.isfinite(regressed(torch.ones(2, 14).double(), gram, 0.01, mean, each=each)).all()
