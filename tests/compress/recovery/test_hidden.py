"""The error of hidden states, against loops in float64."""

import math

import pytest
import torch
from torch import nn

from paredown.compress.recipe import HiddenSpec
from paredown.compress.recovery.hidden import States, layers_of, outputs_of, scaled, states_error


def slowly(student, teacher):
    """The formula, the mean over layers."""
    found = []
    for ours, theirs in zip(student, teacher, strict=True):
        s, t = ours.flatten(0, 1).tolist(), theirs.flatten(0, 1).tolist()
        r = [math.sqrt(math.fsum(x * x for x in row) / len(row)) for row in t]
        channels = range(len(t[0]))
        e = [math.fsum((t[i][c] / r[i]) ** 2 for i in range(len(t))) / len(t) for c in channels]
        errors = [(s[i][c] - t[i][c]) ** 2 / (r[i] ** 2 * e[c]) for i in range(len(t)) for c in channels]
        found.append(math.fsum(errors) / len(errors))
    return math.fsum(found) / len(found)


def error(student, teacher):
    return float(states_error(list(student), States.stacked([scaled(layer) for layer in teacher])))


def test_it_is_the_formula():
    student, teacher = torch.randn(2, 3, 2, 5, 8).unbind()  # (layers, windows, length, hidden)
    teacher[:, :, 0] *= 1e6  # massive activations of first tokens, beyond float16
    student[:, :, 0] = 0.5 * teacher[:, :, 0]
    assert error(student, teacher) == pytest.approx(slowly(student.double(), teacher.double()), rel=2e-3)


@pytest.mark.parametrize("large", [(0, slice(None)), (slice(None), 0)], ids=["token", "channel"])
def test_no_token_or_channel_owns_it(large):
    teacher = torch.randn(1, 1, 16, 16)
    teacher[0, 0][large] = 300.0
    student = teacher.clone()
    student[0, 0][large] = 0.0  # all of it wrong: one part in sixteen
    assert 0.5 / 16 < error(student, teacher) < 2 / 16


def test_the_last_block_is_compared_and_each_kth():
    assert layers_of(None, 8) == () and layers_of(HiddenSpec(), 8) == (7,)
    assert layers_of(HiddenSpec(every=3), 8) == (2, 5, 7) and layers_of(HiddenSpec(every=4), 8) == (3, 7)


def test_outputs_are_heard_only_inside():
    layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    with outputs_of(layers) as found:
        wanted = [layers[0](torch.ones(1, 3)), layers[1](torch.zeros(1, 3))]
    layers[0](torch.ones(1, 3))
    assert all(a is b for a, b in zip(found, wanted, strict=True))
