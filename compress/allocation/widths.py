"""How many units each group keeps under one budget of parameters: along the hulls of their loss curves, then part of the way
back to equal shares; or by scores of all units together. Then in whole multiples."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from paredown.compress.allocation.base import Budget, Grain, Layer
from paredown.compress.allocation.global_loss import steepest
from paredown.compress.errors import PareError
from paredown.compress.methods.base import Choice

STEPS = 64  # of a curve: the hull needs no finer ones


@dataclass(frozen=True)
class Size:
    """Of a group."""

    units: int
    numbers: int  # parameters of one unit


@dataclass(frozen=True)
class Curve(Size):
    """What a group loses that keeps fewer units, in nats per token."""

    points: Sequence[tuple[int, float]]  # units that stay, from 0 to all, and the loss then

    def at(self, count: float) -> float:
        """The loss with so many units: between the points its root is on a line, as that of a square that goes to zero."""
        after = min(max(bisect_left(self.points, count, key=lambda point: point[0]), 1), len(self.points) - 1)
        (below, more), (above, less) = self.points[after - 1], self.points[after]
        part = (count - below) / (above - below)
        return float((1 - part) * more**0.5 + part * less**0.5) ** 2


def equal(sizes: Mapping[str, Size], numbers: float) -> dict[str, float]:
    """Units of each group, the same share of all, which together have so many parameters."""
    share = numbers / sum(size.units * size.numbers for size in sizes.values())
    return {name: share * size.units for name, size in sizes.items()}


def cheapest(curves: Mapping[str, Curve], numbers: float, least: int) -> dict[str, float]:
    """Units of each group, at least `least`, which together have so many parameters and lose least on the curves' hulls."""
    starts = starting(curves, numbers, least)
    size = sum(curve.units * curve.numbers for curve in curves.values())
    layers = [_layer(name, curve, starts[name]) for name, curve in curves.items()]
    first = {layer.name: layer.choices[1] for layer in layers if len(layer.choices) > 1}
    whole = {layer.name: Choice(layer.size, 0.0, None) for layer in layers}
    chosen = steepest(Budget(layers, numbers / size), whole | first)
    return {name: chosen[name].numbers / curve.numbers for name, curve in curves.items()}


def starting(sizes: Mapping[str, Size], numbers: float, least: int) -> dict[str, int]:
    """The fewest units that each group may keep. Raises PareError if they have more parameters than `numbers`."""
    starts = {name: min(least, size.units) for name, size in sizes.items()}
    if (needed := sum(count * sizes[name].numbers for name, count in starts.items())) > numbers:
        raise PareError(
            f"{least} units in every group take {needed:,} parameters, and {max(int(numbers), 0):,} are asked for: "
            "ask for more with kept or units, or for a smaller multiple (--set multiple=8)."
        )
    return starts


def standing(scores: Mapping[str, Tensor], sizes: Mapping[str, Size], numbers: float, least: int) -> dict[str, float]:
    """Units of each group, at least `least`, whose scores stand highest within their group: together so many parameters.

    Scores (units,) are standardised, (s - mean) / standard deviation, as FLAP does: An et al. 2023 (arXiv 2312.11983).
    """
    counts = starting(sizes, numbers, least)
    room = numbers - sum(count * sizes[name].numbers for name, count in counts.items())
    standard = {name: (s - s.mean()) / s.std().clamp_min(1e-300) for name, s in scores.items()}
    ranked = [
        (z, name) for name, s in standard.items() for z in s.sort(descending=True).values[counts[name] :].tolist()
    ]
    for _, name in sorted(ranked, reverse=True):
        if sizes[name].numbers > room:
            break
        room -= sizes[name].numbers
        counts[name] += 1
    return {name: float(count) for name, count in counts.items()}


def uneven(curves: Mapping[str, Curve], numbers: float, least: int, shrink: float) -> dict[str, float]:
    """The cheapest, brought `shrink` of the way back to equal ones: what costs least on one text does not on all."""
    own, even = cheapest(curves, numbers, least), equal(curves, numbers)
    return {name: (1 - shrink) * count + shrink * even[name] for name, count in own.items()}


def rounded(wanted: Mapping[str, float], sizes: Mapping[str, Size], numbers: float, multiple: int) -> dict[str, int]:
    """Multiples (or all of a group's units) near those wanted, at least one, with no more parameters than `numbers`.

    Those furthest below what was wanted get one multiple more as long as there is room.
    """
    steps = {name: [*range(multiple, size.units, multiple), size.units] for name, size in sizes.items()}
    at = {name: max(bisect_right(steps[name], count + 1e-6) - 1, 0) for name, count in wanted.items()}

    def missing(name: str) -> float:
        return float(wanted[name] - steps[name][at[name]])

    room = numbers - sum(steps[name][i] * sizes[name].numbers for name, i in at.items())
    while room < -1 and any(at.values()):  # some groups got more than they wanted: one multiple
        name = min((name for name in at if at[name]), key=missing)
        room += (steps[name][at[name]] - steps[name][at[name] - 1]) * sizes[name].numbers
        at[name] -= 1
    for name in sorted(at, key=missing, reverse=True):
        if at[name] + 1 < len(steps[name]):
            more = (steps[name][at[name] + 1] - steps[name][at[name]]) * sizes[name].numbers
            if more <= room + 1:
                room -= more
                at[name] += 1
    return {name: steps[name][i] for name, i in at.items()}


def _layer(name: str, curve: Curve, least: int) -> Layer:
    """The group as an allocation sees it, with `least` units and more, in steps."""
    counts = range(least, curve.units, max(least, curve.units // STEPS))
    choices = [Choice(n * curve.numbers, curve.at(n), n) for n in counts]
    zeros = Choice(0, curve.at(0), None)
    return Layer(name, curve.units * curve.numbers, [zeros, *choices], grain=Grain(curve.numbers))
