"""Widths of groups under one budget: spent exactly, by the cheapest units first, and no worse than any other spending."""

from itertools import product

import pytest
import torch

from paredown.compress.allocation.widths import Curve, Size, cheapest, equal, rounded, standing, uneven
from paredown.compress.errors import PareError


def curves(seed=0, groups=5, units=64, sizes=(7,)):
    """Falling curves, mostly convex, of groups whose units have different sizes."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for i in range(groups):
        falls = (torch.rand(8, generator=draw) + 0.05).sort(descending=True).values * 4 ** (
            2 * float(torch.rand(1, generator=draw))
        )
        losses = [*falls.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        found[f"g{i}"] = Curve(
            units, sizes[i % len(sizes)], [*zip(range(0, units + 1, units // 8), losses, strict=True)]
        )
    return found


def taken(curves, counts):
    return sum(curve.numbers * counts[name] for name, curve in curves.items())


def lost(curves, counts):
    return sum(curve.at(counts[name]) for name, curve in curves.items())


def test_between_the_points_the_root_of_the_loss_is_on_a_line():
    curve = Curve(8, 1, [(0, 9.0), (4, 1.0), (8, 0.0)])
    assert [curve.at(n) for n in (0, 2, 4, 6, 8)] == pytest.approx([9, 4, 1, 0.25, 0])


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("sizes", [(7,), (7, 3, 20)])
def test_the_budget_is_spent_to_less_than_one_multiple_whatever_the_way_back(sizes, kept):
    found = curves(sizes=sizes)
    whole = sum(curve.units * curve.numbers for curve in found.values())
    for multiple, shrink in product((1, 4, 8, 12), (0.0, 0.5, 1.0)):
        own, even = cheapest(found, kept * whole, multiple), equal(found, kept * whole)
        assert taken(found, own) == pytest.approx(taken(found, even), abs=1)
        counts = rounded(uneven(found, kept * whole, multiple, shrink), found, kept * whole, multiple)
        assert 0 <= kept * whole - taken(found, counts) + 1 < multiple * max(sizes) + 1
        assert all(n % multiple == 0 or n == 64 for n in counts.values()) and min(counts.values()) >= min(multiple, 64)


def test_equal_groups_get_equal_widths_all_the_way_back():
    found = curves()
    counts = rounded(equal(found, 0.75 * 5 * 64 * 7), found, 0.75 * 5 * 64 * 7, 8)
    assert set(counts.values()) == {48}


@pytest.mark.parametrize("seed", range(3))
def test_more_parameters_take_units_from_no_group_and_lose_less(seed):
    found = curves(seed)
    whole, before = 5 * 64 * 7, None
    for step in range(2, 20):
        counts = cheapest(found, step / 20 * whole, 2)
        assert before is None or all(counts[name] >= before[name] - 1e-6 for name in counts)
        assert before is None or lost(found, counts) <= lost(found, before) + 1e-9
        before = counts


@pytest.mark.parametrize("seed", range(3))
def test_no_other_widths_of_convex_curves_lose_less(seed):
    draw = torch.Generator().manual_seed(seed)
    scales = torch.rand(3, generator=draw).tolist()
    found = {f"g{i}": Curve(8, 2 + i, [(n, s * (8 - n) ** 2) for n in range(9)]) for i, s in enumerate(scales)}
    for numbers in (20, 36, 50):
        own = cheapest(found, numbers, 1)
        best = min(
            lost(found, dict(zip(found, counts, strict=True)))
            for counts in product(range(1, 9), repeat=3)
            if taken(found, dict(zip(found, counts, strict=True))) <= numbers
        )
        assert lost(found, own) <= best + 1e-9 and taken(found, own) == pytest.approx(numbers, abs=1)


def test_too_small_a_budget_is_refused():
    with pytest.raises(PareError, match="12 units in every group take 420 parameters, and 224 are asked for"):
        cheapest(curves(), 0.1 * 5 * 64 * 7, 12)


@pytest.mark.parametrize("least", [1, 5])
def test_those_units_stay_whose_scores_stand_highest_in_their_own_group(least):
    draw = torch.Generator().manual_seed(0)
    scores = {f"g{i}": torch.rand(20, generator=draw).double() ** (i + 1) * 10**i for i in range(4)}
    sizes = {name: Size(20, 3) for name in scores}
    ranked = []
    for name, own in scores.items():
        mean = sum(own.tolist()) / 20
        deviation = (sum((s - mean) ** 2 for s in own.tolist()) / 19) ** 0.5
        ranked += [((s - mean) / deviation, name) for s in own.tolist()]
    ranked.sort(reverse=True)
    for total in (20, 33, 60, 79, 80):
        found = standing(scores, sizes, 3 * total, least)
        wanted = {name: sum(owner == name for _, owner in ranked[:total]) for name in scores}
        assert sum(found.values()) == total and min(found.values()) >= least
        assert found == wanted or min(wanted.values()) < least
