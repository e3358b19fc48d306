"""The factorizer against slow references: roots and inverses of the moments, outputs token by token, brute-force optima."""

from dataclasses import replace

import pytest
import torch
from factoring import COMBINATIONS, SHAPES, SIDES, data, made, moment, slow_loss, symmetric_root, weighed_by

from paredown.compress.errors import PareError
from paredown.compress.numerics.factorize import OUTLINE, balanced, factorize, outlined, spectrum
from paredown.compress.numerics.metric import Metric, Target, error
from paredown.compress.numerics.spectral import eigh_by_float32


def cholesky_root(matrix):
    return torch.linalg.cholesky(matrix)


def svd_in_the_middle(value, a, g, rank, root):
    """`L^-1 [L B R]_k R^-1` with G = L^T L and A = R R^T, and all squared singular values."""
    left, right = root(g).T, root(a)
    u, s, vt = torch.linalg.svd(left @ value @ right, full_matrices=False)
    return torch.linalg.inv(left) @ (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(right), s.square()


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
@pytest.mark.parametrize(("count", "leading"), [(96, 1.0), (300, 1.0), (300, 1e7)])
def test_vectors_by_float32_lose_next_to_nothing(decades, size, count, leading):
    """Also of what a direction that owns nearly all leaves to the others."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(count, count, generator=draw, dtype=torch.float64))[0]
    spectrum = size * torch.logspace(0, -decades, count, dtype=torch.float64)
    spectrum[0] *= leading
    matrix = (basis * spectrum) @ basis.T
    values, vectors = eigh_by_float32(matrix)
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    whole, rest = float(exact.sum()), float(spectrum[1:].sum())
    assert torch.equal(values, values.sort(descending=True)[0])
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-10)
    for rank in (0, 1, count // 2, count - 1, count):
        kept = vectors[:, :rank]
        lost = whole - float((kept * (matrix @ kept)).sum())
        assert lost == pytest.approx(float(values[rank:].sum()), abs=1e-10 * whole)
        assert lost == pytest.approx(float(exact[rank:].sum()), abs=2e-7 * whole)
    for rank in (1, count // 2, count - 1):  # beside what the leading direction owns
        left = vectors[:, rank:]
        lost = float((left * (matrix @ left)).sum())
        assert lost == pytest.approx(float(values[rank:].sum()), abs=1e-8 * rest)
        assert lost == pytest.approx(float(spectrum[rank:].sum()), abs=5e-6 * rest)


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
        assert target.error_of(target.projected(stands, metric), metric) == pytest.approx(wanted, rel=1e-6)
        assert target.error_of_zero(metric) == pytest.approx(error(weight, metric, weight), rel=1e-6)
    from_mean = replace(metric, mean=x.mean(0) if input_side == "full" else None)
    assert target.error_of_zero(from_mean) == pytest.approx(error(weight, from_mean, weight), rel=1e-6)


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


@pytest.mark.parametrize(("size", "rank"), [(576, 123), (9, 4), (1, 1), (40, 0)])
def test_an_outline_is_the_spectrum_at_few_ranks_the_cut_among_them(size, rank):
    losses = torch.logspace(3, -9, size, dtype=torch.float64)
    told = outlined(losses, rank)
    assert len(told["ranks"]) <= OUTLINE and {rank, 1, size} - {0} <= set(told["ranks"])
    assert told["ranks"] == sorted(set(told["ranks"])) and told["ranks"][0] > 0 and told["ranks"][-1] == size
    slow = [float(losses[k - 1]) / sum(losses.tolist()) for k in told["ranks"]]
    assert told["energy"] == pytest.approx(slow, rel=1e-3)
    assert outlined(torch.zeros(3), 1) == {}
