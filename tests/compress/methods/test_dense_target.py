"""The goal of a dense target, against least squares on the tokens themselves."""

import pytest
import torch

from paredown.compress.methods import build
from paredown.compress.numerics.moments import InputStats, Need, Residual, Stats


@pytest.mark.parametrize("residual", [False, True])
def test_the_goal_of_a_dense_target_is_ridge_regression_on_the_tokens(residual):
    draw = torch.Generator().manual_seed(2)
    dense, weight = torch.randn(200, 8, generator=draw), torch.randn(5, 8, generator=draw)
    x = dense + 0.3 * torch.randn(200, 8, generator=draw)
    missing = torch.randn(200, 5, generator=draw).double() if residual else (dense - x).double() @ weight.double().T
    inputs = InputStats(8, frozenset({Need.GRAM, Need.CROSS}) if not residual else frozenset({Need.GRAM}))
    inputs.update(x, None if residual else dense)
    of_residual = Residual(missing.T @ x.double() / 200, missing.mean(0)) if residual else None
    method = build("masked", {"mask": "magnitude", "update": "none", "target": "dense", "ridge": 0.1})
    goal = method.goal(weight, Stats(inputs, residual=of_residual))
    # the same as rows of data: each input weighs the change of its weights by the root of the ridge
    ridge = (0.1 * inputs.gram.diagonal().mean() * 200).sqrt() * torch.eye(8, dtype=torch.float64)
    change = torch.linalg.lstsq(torch.cat([x.double(), ridge]), torch.cat([missing, torch.zeros(8, 5).double()]))
    torch.testing.assert_close(goal.double(), weight.double() + change.solution.T, rtol=1e-5, atol=1e-5)
    edit = method.compress(weight.bfloat16(), Stats(inputs, residual=of_residual))
    assert edit.weight.dtype == torch.bfloat16 and torch.equal(edit.weight != 0, edit.keep)
    error = edit.missed(weight, inputs)
    assert 0 < error < 1 and edit.final().aim is None


def test_an_expert_or_a_survey_of_one_stream_aims_at_its_own_weight():
    inputs = InputStats(8, frozenset({Need.GRAM}))
    inputs.update(torch.randn(20, 8))
    weight = torch.randn(4, 8)
    assert build("paredown_prune", {}).goal(weight, Stats(inputs)) is weight
