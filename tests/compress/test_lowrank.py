"""The factorizer against slow references: roots and inverses of the moments, outputs token by token, brute-force optima."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paredown.compress.errors import PareError
from paredown.compress.factorized import affine_shift, centred
from paredown.compress.lowrank import (
    OUTPUT_DAMPING,
    Factors,
    Metric,
    Target,
    _eigh_by_float32,
    balanced,
    cost,
    error,
    factorize,
    largest_rank,
    pivoted,
    regressed,
    spectrum,
)
from paredown.compress.statistics import InputStats
from paredown.kernels.lowrank import pifa_dense

SHAPES = {"wide": (9, 14), "square": (11, 11), "tall": (14, 9)}
SIDES = ("none", "diagonal", "full")
COMBINATIONS = [pytest.param(*c, id="-".join(c)) for c in product(SHAPES, SIDES, SIDES)]  # shape, input, output


def data(out, inner, tokens=200, seed=0):
    """A weight (out, in), inputs (tokens, in) with a mean and correlated, gradients (tokens, out); all float64."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    x = normal(tokens, inner) * torch.linspace(2, 0.3, inner) @ normal(inner, inner) + 2 * normal(inner)
    return normal(out, inner), x, normal(tokens, out) @ normal(out, out)


def moment(rows):
    return rows.T @ rows / len(rows)


def weighed_by(weight, x, delta, input_side, output_side):
    """The metric as the factorizer takes it, and the same as full matrices A (in, in) and G (out, out), damping included."""
    out, inner = weight.shape
    full, outputs = moment(x), moment(delta)
    given_input = {"none": None, "diagonal": full.diagonal(), "full": full}[input_side]
    a = {"none": torch.eye(inner).double(), "diagonal": torch.diag(full.diagonal()), "full": full}[input_side]
    if output_side == "none":
        return Metric(given_input), a, torch.eye(out).double()
    if output_side == "diagonal":
        return Metric(given_input, outputs.diagonal()), a, torch.diag(outputs.diagonal())
    folded = outputs if out <= inner else weight.T @ outputs @ weight
    g = outputs + OUTPUT_DAMPING * outputs.diagonal().mean() * torch.eye(out).double()
    return Metric(given_input, folded, outputs.diagonal()), a, g


def cholesky_root(matrix):
    return torch.linalg.cholesky(matrix)


def symmetric_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def svd_in_the_middle(value, a, g, rank, root):
    """`L^-1 [L B R]_k R^-1` with G = L^T L and A = R R^T, and all squared singular values."""
    left, right = root(g).T, root(a)
    u, s, vt = torch.linalg.svd(left @ value @ right, full_matrices=False)
    return torch.linalg.inv(left) @ (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(right), s.square()


def slow_loss(difference, a, g):
    """`tr(G D A D^T)`, entry by entry of the two moments."""
    return float(torch.einsum("ab,bc,cd,ad->", g, difference, a, difference))


def made(factors):
    return factors.left @ factors.right


def pifa_matrix(tensors):
    """The matrix that the stored tensors stand for, in float64, row by row."""
    pivots, coefficients = tensors["pivots"].double(), tensors["coefficients"].double()
    rank = len(pivots)
    rows = [pivots[i] if i < rank else coefficients[i - rank] @ pivots for i in tensors["order"].tolist()]
    return torch.stack(rows)


def correction(size):
    """Of a shifted target: any square matrix."""
    return 0.3 * torch.randn(size, size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("root", [cholesky_root, symmetric_root])
@pytest.mark.parametrize(("shape", "input_side", "output_side"), COMBINATIONS)
def test_the_optimum_is_the_svd_in_the_middle_by_any_root(shape, input_side, output_side, root, corrected):
    weight, x, delta = data(*SHAPES[shape])
    metric, a, g = weighed_by(weight, x, delta, input_side, output_side)
    target = Target(weight, correction(weight.shape[1]) if corrected else None)
    value = weight @ (torch.eye(len(target.correction)) + target.correction) if corrected else weight
    for rank in (1, 4, 8):
        found = factorize(target, metric, lambda losses, rank=rank: rank)
        wanted, squares = svd_in_the_middle(value, a, g, rank, root)
        assert found.rank == rank and found.left.shape == (len(weight), rank)
        torch.testing.assert_close(made(found), wanted, rtol=1e-9, atol=1e-9 * float(value.abs().max()))
        torch.testing.assert_close(found.losses, squares, rtol=1e-9, atol=1e-9 * float(squares[0]))


@pytest.mark.parametrize("decades", [0, 5, 12])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_vectors_by_float32_lose_next_to_nothing(decades, size):
    basis = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    matrix = size * (basis * torch.logspace(0, -decades, 96, dtype=torch.float64)) @ basis.T
    values, vectors = _eigh_by_float32(matrix)
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    whole = float(exact.sum())
    assert torch.equal(values, values.sort(descending=True)[0])
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-10)
    for rank in (0, 1, 48, 95, 96):
        kept = vectors[:, :rank]
        lost = whole - float((kept * (matrix @ kept)).sum())
        assert lost == pytest.approx(float(values[rank:].sum()), abs=1e-10 * whole)
        assert lost == pytest.approx(float(exact[rank:].sum()), abs=2e-7 * whole)


@pytest.mark.parametrize(("shape", "input_side", "output_side"), COMBINATIONS)
def test_the_loss_at_every_rank_is_the_sum_of_the_losses_not_kept(shape, input_side, output_side):
    weight, x, delta = data(*SHAPES[shape], seed=1)
    metric, a, g = weighed_by(weight, x, delta, input_side, output_side)
    whole = slow_loss(weight, a, g)
    for rank in range(min(weight.shape) + 1):
        found = factorize(Target(weight), metric, lambda losses, rank=rank: rank)
        assert slow_loss(weight - made(found), a, g) == pytest.approx(
            float(found.losses[rank:].sum()), abs=1e-9 * whole
        )
    assert len(found.losses) == min(weight.shape) and torch.equal(found.losses, found.losses.sort(descending=True)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rank_is_asked_of_the_losses_themselves(shape):
    weight, x, delta = data(*SHAPES[shape])
    metric, _, _ = weighed_by(weight, x, delta, "full", "full")
    seen = []
    found = factorize(Target(weight), metric, lambda losses: seen.append(losses) or 3)
    assert len(seen) == 1 and torch.equal(seen[0], found.losses) and found.rank == 3


@pytest.mark.parametrize(("shape", "input_side", "output_side"), COMBINATIONS)
def test_no_small_change_of_the_factors_loses_less(shape, input_side, output_side):
    weight, x, delta = data(*SHAPES[shape], seed=2)
    metric, a, g = weighed_by(weight, x, delta, input_side, output_side)
    left, right = balanced(factorize(Target(weight), metric, lambda losses: 4))
    least, draw = slow_loss(weight - left @ right, a, g), torch.Generator().manual_seed(0)
    for _ in range(20):
        change = [t + 0.01 * torch.randn(t.shape, generator=draw, dtype=torch.float64) for t in (left, right)]
        assert slow_loss(weight - change[0] @ change[1], a, g) > least


@pytest.mark.parametrize("shape", SHAPES)
def test_alternating_least_squares_ends_at_the_two_sided_optimum(shape):
    weight, x, delta = data(*SHAPES[shape], seed=3)
    metric, a, g = weighed_by(weight, x, delta, "full", "full")
    left = torch.randn(len(weight), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(2000):
        right = torch.linalg.solve(left.T @ g @ left, left.T @ g @ weight)
        left = weight @ a @ right.T @ torch.linalg.inv(right @ a @ right.T)
    found = factorize(Target(weight), metric, lambda losses: 3)
    assert slow_loss(weight - made(found), a, g) == pytest.approx(slow_loss(weight - left @ right, a, g), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_inverse_free_form_is_the_leading_principal_components_of_the_outputs(shape):
    weight, x, _ = data(*SHAPES[shape])
    values, vectors = torch.linalg.eigh(moment(x @ weight.T))
    top = vectors.flip(1)[:, :4]
    found = factorize(Target(weight), Metric(moment(x)), lambda losses: 4)
    torch.testing.assert_close(made(found), top @ top.T @ weight, rtol=1e-8, atol=1e-8)
    wanted = values.flip(0)[: min(weight.shape)]
    torch.testing.assert_close(found.losses, wanted, rtol=1e-9, atol=1e-9 * float(values.max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_fewer_tokens_than_inputs_give_the_least_error_of_the_outputs_themselves(shape, tokens):
    weight, x, _ = data(*SHAPES[shape], tokens=tokens)
    outputs = weight @ x.T  # (out, tokens)
    squares = torch.linalg.svdvals(outputs).square() / tokens
    for rank in range(1, min(weight.shape)):
        found = factorize(Target(weight), Metric(moment(x)), lambda losses, rank=rank: rank)
        lost = float((outputs - made(found) @ x.T).square().sum()) / tokens
        assert lost == pytest.approx(float(squares[rank:].sum()), abs=1e-8 * float(squares.sum()))
        assert float(found.losses[rank:].sum()) == pytest.approx(lost, abs=1e-8 * float(squares.sum()))
        assert found.losses.min() >= 0 and torch.equal(found.losses, found.losses.sort(descending=True).values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_gradients_than_outputs_are_ordinary_input(shape, tokens):
    weight, x, delta = data(*SHAPES[shape])
    metric, a, g = weighed_by(weight, x, delta[:tokens], "full", "full")
    for rank in (1, 4, 8):
        found = factorize(Target(weight), metric, lambda losses, rank=rank: rank)
        _, squares = svd_in_the_middle(weight, a, g, rank, symmetric_root)
        lost = slow_loss(weight - made(found), a, g)
        assert lost == pytest.approx(float(squares[rank:].sum()), abs=1e-9 * float(squares.sum()))


@pytest.mark.parametrize(("shape", "input_side", "output_side"), COMBINATIONS)
def test_inputs_and_outputs_that_never_came_divide_by_nothing(shape, input_side, output_side):
    weight, x, delta = data(*SHAPES[shape])
    x[:, [0, 3]], delta[:, [1, 2]] = 0, 0
    for inputs, gradients in ((x, delta), (0 * x, delta), (x, 0 * delta), (0 * x, 0 * delta)):
        metric, a, g = weighed_by(weight, inputs, gradients, input_side, output_side)
        found = factorize(Target(weight), metric, lambda losses: 4)
        left, right = balanced(found)
        assert torch.isfinite(left).all() and torch.isfinite(right).all() and torch.isfinite(left @ right).all()
        if inputs is x and gradients is delta:
            lost, whole = slow_loss(weight - left @ right, a, g), slow_loss(weight, a, g)
            assert lost == pytest.approx(float(found.losses[4:].sum()), abs=1e-8 * whole)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighing", SIDES)
def test_the_error_is_that_of_outputs_weighed_token_by_token(shape, weighing):
    weight, x, delta = data(*SHAPES[shape], tokens=40)
    metric, _, _ = weighed_by(weight, x, delta, "full", weighing)
    difference = weight - made(factorize(Target(weight), metric, lambda losses: 3))
    wrong = x @ difference.T  # (tokens, out)
    if weighing == "none":
        wanted = sum(float(row @ row) for row in wrong) / len(x)
    elif weighing == "diagonal":
        wanted = sum(float(row.square() @ delta.square().mean(0)) for row in wrong) / len(x)
    else:
        wanted = sum(float(gradient @ row) ** 2 for row in wrong for gradient in delta) / len(x) / len(delta)
    assert error(difference, metric, weight) == pytest.approx(wanted, rel=1e-8)


def test_where_the_output_moment_is_folded_the_error_is_of_what_lies_within_the_weight():
    weight, x, delta = data(14, 9)
    metric, _, _ = weighed_by(weight, x, delta, "full", "full")
    difference = torch.randn(14, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    within = weight @ torch.linalg.pinv(weight) @ difference
    assert error(difference, metric, weight) == pytest.approx(slow_loss(within, moment(x), moment(delta)), rel=1e-7)


def stats_of(x, dense=None):
    stats = InputStats(x.shape[1], frozenset({"gram", "mean"} | ({"cross"} if dense is not None else set())))
    # sums in float64, so that what is compared is the mathematics alone
    stats.count = len(x)
    stats._sums["gram"], stats._sums["mean"] = x.T @ x, x.sum(0)
    if dense is not None:
        stats._sums["cross"], stats._sums["dense_mean"] = dense.T @ x, dense.sum(0)
    return stats


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


def regression(gram, cross, damping):
    """The correction E of W (I + E) from the moments E[y y^T] and E[x y^T]."""
    return regressed(cross - gram, gram, damping)


def test_the_regression_is_the_ridge_towards_the_dense_output():
    weight, x, _ = data(9, 14)
    y = shifted(x)
    for damping in (1e-9, 0.01, 1.0):
        added = damping * moment(y).diagonal().mean()
        change = regression(moment(y), x.T @ y / len(x), damping)
        # least squares on the data and on rows that stand for the damping, which pull towards the weight itself
        rows = torch.cat((y, (len(x) * added).sqrt() * torch.eye(14)))
        wanted = torch.cat((x @ weight.T, (len(x) * added).sqrt() * weight.T))
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


@pytest.mark.parametrize(("shape", "input_side", "output_side"), COMBINATIONS)
def test_the_spectrum_is_the_losses_of_the_factors(shape, input_side, output_side):
    weight, x, delta = data(*SHAPES[shape])
    metric, _, _ = weighed_by(weight, x, delta, input_side, output_side)
    losses = factorize(Target(weight), metric, lambda losses: 3).losses
    torch.testing.assert_close(spectrum(Target(weight), metric), losses, rtol=1e-9, atol=1e-9 * float(losses[0]))


@pytest.mark.parametrize(("shape", "input_side", "output_side"), COMBINATIONS)
def test_a_target_measures_what_is_seen_as_the_error_itself_is(shape, input_side, output_side):
    weight, x, delta = data(*SHAPES[shape])
    metric, _, _ = weighed_by(weight, x, delta, input_side, output_side)
    draw = torch.Generator().manual_seed(3)
    stands, change = (
        0.1 * torch.randn(*size, generator=draw).double() for size in (weight.shape, 2 * weight.shape[1:])
    )
    for target in (Target(weight), Target(weight, correction=change)):
        wanted = error(target.value - stands, metric, weight)
        assert target.lost(target.seen(stands, metric), metric) == pytest.approx(wanted, rel=1e-6)
        assert target.dropped(metric) == pytest.approx(error(weight, metric, weight), rel=1e-6)
    from_mean = replace(metric, mean=x.mean(0) if input_side == "full" else None)
    assert target.dropped(from_mean) == pytest.approx(error(weight, from_mean, weight), rel=1e-6)


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


def flat(size, seed=0):
    """A square matrix whose singular values fall off slowly, as those of real weights do."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))[0] for _ in range(2))
    return left * torch.arange(1, size + 1).double() ** -0.35 @ right


def test_the_decomposition_is_exact_where_a_randomised_one_is_not():
    weight, rank = flat(128), 32
    least = float(torch.linalg.svdvals(weight)[rank:].square().sum())
    found = factorize(Target(weight), Metric(), lambda losses: rank)
    assert float((weight - made(found)).square().sum()) == pytest.approx(least, rel=1e-10)
    sketch = weight @ torch.randn(128, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(2):
        sketch = weight @ torch.linalg.qr(weight.T @ torch.linalg.qr(sketch)[0])[0]
    basis = torch.linalg.qr(sketch)[0]
    assert float((weight - basis @ basis.T @ weight).square().sum()) > 1.01 * least


def test_the_same_problem_twice_gives_the_same_bits():
    weight, x, _ = data(14, 9)
    one, two = (factorize(Target(weight), Metric(moment(x)), lambda losses: 4) for _ in range(2))
    assert torch.equal(one.left, two.left) and torch.equal(one.right, two.right)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_decomposition_that_fails_fails_the_run(shape, bad):
    weight, x, _ = data(*SHAPES[shape])
    weight[2, 3] = bad
    with pytest.raises(PareError, match="decomposition failed"):
        factorize(Target(weight), Metric(moment(x)), lambda losses: 4)


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
    mask = kept if kind == "bitmap_lowrank" else 0
    assert cost(kind, (out, inner), rank, bias, mask) == stored_slowly(kind, out, inner, rank, bias, mask)


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
