"""Which blocks each method removes, against slow loops of its paper's formula; and what its options may say."""

import math

import pytest
import torch

from paredown.compress.errors import PareError
from paredown.compress.methods import METHODS, BlockMethod, build
from paredown.compress.methods.base import Profile
from paredown.compress.methods.structured.angular import distances

NAMES = ["angular", "greedy_depth", "paredown_depth", "shortgpt", "tail"]
SIMILARITY = [0.2, 0.97, 0.9, 0.99, 0.5, 0.98, 0.7]
LAST = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0)).cumsum(1) + 1
PROFILE = Profile(SIMILARITY, LAST, [(3, 0.01), (6, 0.02), (1, 0.04), (4, 0.08), (2, 0.2), (0, 1.5)])


def choose(name, drop, profile=PROFILE, **options):
    return build(name, {"kept": 0.5, **options}).choose(profile, 7, drop)


@pytest.mark.parametrize("drop", range(1, 7))
@pytest.mark.parametrize("name", NAMES)
def test_as_many_blocks_go_as_are_asked_for_in_order(name, drop):
    chosen = choose(name, drop)
    assert len(chosen) == drop and chosen == sorted(set(chosen)) and set(chosen) <= set(range(7))


def test_shortgpt_removes_the_blocks_of_least_influence():
    assert [choose("shortgpt", n) for n in (1, 2, 4)] == [[3], [3, 5], [1, 2, 3, 5]]
    vital_inside = Profile([0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.95])
    assert choose("shortgpt", 2, vital_inside) == [0, 6]  # nothing but the measure spares the first and the last


@pytest.mark.parametrize("n", range(1, 7))
def test_angular_removes_the_blocks_in_a_row_between_whose_ends_the_angle_is_least(n):
    wanted = []
    for first in range(8 - n):
        angles = []
        for window in LAST.double():
            a, b = window[first].tolist(), window[first + n].tolist()
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            angles.append(math.acos(dot / math.dist(a, [0] * 5) / math.dist(b, [0] * 5)) / math.pi)
        wanted.append(sum(angles) / len(angles))
    assert distances(LAST, n).tolist() == pytest.approx(wanted)
    first = wanted.index(min(wanted))
    assert choose("angular", n) == list(range(first, first + n))


def test_hidden_states_that_do_not_turn_have_no_angle_however_they_round():
    assert distances(torch.full((3, 4, 7), 0.1), 2).tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


def test_greedy_removes_the_first_of_its_order():
    assert choose("greedy_depth", 4) == choose("paredown_depth", 4) == [1, 3, 4, 6]


def test_tail_removes_the_last_blocks_or_those_before_the_very_last():
    assert choose("tail", 2) == [5, 6]
    assert choose("tail", 2, keep_last=True) == [4, 5]


def test_what_each_method_reads():
    assert {name: METHODS.get(name).reads for name in NAMES} == {
        "angular": "states", "greedy_depth": "divergence", "paredown_depth": "divergence", "shortgpt": "states",
        "tail": "nothing",
    }  # fmt: skip
    assert [name for name in NAMES if METHODS.get(name).refits] == ["paredown_depth"]
    ours = build("paredown_depth", {"blocks": 4})
    assert (ours.blocks, ours.kept, ours.windows, ours.damping) == (4, None, 8, 0.1)
    assert build("paredown_depth", {"blocks": 4, "windows": 2, "damping": 0.5}).damping == 0.5
    assert build("greedy_depth", {"kept": 0.5, "windows": 2}).windows == 2


@pytest.mark.parametrize("name", NAMES)
def test_how_much_stays_is_said_once(name):
    assert issubclass(METHODS.get(name), BlockMethod)
    with pytest.raises(PareError, match=r"give kept, a share such as 0\.8, or blocks, their number"):
        build(name, {})
    with pytest.raises(PareError, match="kept and blocks say how many blocks stay in different ways: give one of them"):
        build(name, {"kept": 0.8, "blocks": 4})
    for options in ({"kept": 1.0}, {"kept": 0}, {"blocks": 0}, {"blocks": 2.5}):
        with pytest.raises(PareError, match=rf"^{name}\.{next(iter(options))}: "):
            build(name, options)


def test_options_are_checked():
    for name, options in (("greedy_depth", {"windows": 0}), ("paredown_depth", {"damping": -1})):
        with pytest.raises(PareError, match=rf"^{name}\.{next(iter(options))}: "):
            build(name, {"kept": 0.8, **options})
    with pytest.raises(PareError, match="greedy_depth has no option 'damping'"):
        build("greedy_depth", {"kept": 0.8, "damping": 0.1})
