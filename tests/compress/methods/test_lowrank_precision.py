"""In which precision ours factors, and that float32 loses nothing where it is chosen."""

from dataclasses import replace

import pytest
import torch

from paredown.compress.methods import build
from paredown.compress.methods.lowrank.paredown_lowrank import ParedownLowRank
from paredown.compress.numerics.factorize import Factors, steps


@pytest.mark.parametrize(
    "options, digits",
    [
        ({}, torch.float32),
        ({"two_sided": False, "output_damping": 0.001}, torch.float32),
        ({"damping": 0.01}, torch.float64),
        ({"output_damping": 0.001}, torch.float64),
        ({"regression": False}, torch.float64),
        ({"affine": True}, torch.float64),
    ],
)
def test_float32_is_taken_where_damping_bounds_the_condition(options, digits):
    assert build("paredown_lowrank", {"kept": 0.6, **options}).precision == digits


@pytest.mark.parametrize("shape, residual", [((288, 480), False), ((288, 480), True), ((480, 288), False)])
def test_float32_finds_what_float64_finds_beside_a_channel_of_a_thousand_times(
    lowrank_problem, monkeypatch, shape, residual
):
    problem = lowrank_problem(shape, tokens=2880, sequences=4)
    problem.x[:, 3] *= 1000
    problem.dense[:, 3] *= 1000
    method = build("paredown_lowrank", {"kept": 0.6})
    stats = problem.stats(method)
    stats = replace(stats, residual=problem.residual() if residual else None, pairs=[(problem.x, problem.delta)])
    found = []
    for digits in (torch.float32, torch.float64):
        monkeypatch.setattr(ParedownLowRank, "precision", digits)
        edit = method.compress(problem.weight, stats)
        found.append((edit.loss, edit.missed(problem.weight, stats.inputs), method.losses(problem.weight, stats)))
    (loss, missed, curve), (exact_loss, exact_missed, exact_curve) = found
    assert 1e-6 < exact_loss < 1e-4, "the channel owns nearly all of the output"
    assert loss == pytest.approx(exact_loss, rel=2e-3) and missed == pytest.approx(exact_missed, rel=2e-3)
    rest, exact_rest = (c.flip(0).cumsum(0).flip(0) for c in (curve, exact_curve))  # the loss at each rank
    torch.testing.assert_close(rest, exact_rest, rtol=0.02, atol=1e-4 * float(exact_rest[1]))


def test_factors_rounded_to_a_bfloat16_models_tokens_price_every_rank_as_float64_does(lowrank_problem):
    """A thousandth of the largest component is priced too: its rounding is relative to itself."""
    problem = lowrank_problem((96, 160), tokens=2048, sequences=4)
    problem.x[:, 3] *= 1000
    pairs = [(problem.x.bfloat16(), problem.delta.bfloat16())]
    sizes = 10 ** torch.linspace(0, -3, 96, dtype=torch.float64)
    left, singular, right = torch.linalg.svd(problem.weight.double(), full_matrices=False)
    factors = Factors(left, sizes[:, None] * right, singular)
    x, g = (t.double() for t in pairs[0])
    shares = (g @ factors.left) * (x @ factors.right.T)  # (tokens, k)
    exact = shares.flip(1).cumsum(1).flip(1).square().mean(0) / 2
    found = steps(factors, pairs).flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(found, exact.cummin(0).values, rtol=0.02, atol=0)
