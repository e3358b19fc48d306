"""Shares of each layer that together spend a budget, and the options that keep them: exactly, where any share can be kept."""

from collections.abc import Mapping, Sequence
from math import fsum

from paredown.compress.allocation.base import Budget, Grain, Layer, Options, option_for
from paredown.compress.errors import PareError


def capped(layers: Sequence[Layer], wanted: Mapping[str, float], numbers: float) -> dict[str, float]:
    """Shares proportional to `wanted`, none above 1, which together take so many numbers."""
    shares: dict[str, float] = {}
    rest = list(layers)
    while rest:
        scale = numbers / max(fsum(wanted[layer.name] * layer.size for layer in rest), 1e-300)
        full = [layer for layer in rest if wanted[layer.name] * scale >= 1]
        if not full:
            return shares | {layer.name: wanted[layer.name] * scale for layer in rest}
        shares |= {layer.name: 1.0 for layer in full}
        numbers -= sum(layer.size for layer in full)
        rest = [layer for layer in rest if layer.name not in shares]
    return shares


def shifted(layers: Sequence[Layer], wanted: Mapping[str, float], numbers: float) -> dict[str, float]:
    """`wanted` plus one number, between 0 and 1, so that together they take so many numbers."""
    low, high = -max(wanted.values()), 1 - min(wanted.values())
    for _ in range(100):  # what is taken grows with the number
        middle = (low + high) / 2
        taken = fsum(min(max(wanted[layer.name] + middle, 0.0), 1.0) * layer.size for layer in layers)
        low, high = (middle, high) if taken < numbers else (low, middle)
    return {name: min(max(share + high, 0.0), 1.0) for name, share in wanted.items()}


def options_for(budget: Budget, shares: Mapping[str, float]) -> Options:
    """The option that keeps each layer's share, of all layers of the budget.

    Where any share can be kept, they are first scaled to the budget, which is then met to the last weight. Each row of a
    layer keeps equally many, for masks that compare within rows; only in one layer a few weights more or fewer are kept.
    Raises PareError if the budget cannot be met.
    """
    grains = {layer.name: layer.grain for layer in budget.layers if layer.grain is not None}
    if len(grains) < len(budget.layers):
        return {layer.name: option_for(layer, shares[layer.name]) for layer in budget.layers}
    counts = _counts(budget.layers, grains, capped(budget.layers, shares, budget.room), budget.room)
    sizes = {layer.name: layer.size for layer in budget.layers}
    return {name: None if n == sizes[name] else (sizes[name] - n) / sizes[name] for name, n in counts.items()}


def _counts(
    layers: Sequence[Layer], grains: Mapping[str, Grain], shares: Mapping[str, float], room: int
) -> dict[str, int]:
    """How many numbers each layer keeps, `room` in all: what rounding leaves of one layer goes to the next."""
    counts: dict[str, int] = {}
    carried = 0.0
    coarsest_first = sorted(layers, key=lambda layer: -grains[layer.name].even)
    for layer in coarsest_first:
        even = grains[layer.name].even
        wanted = shares[layer.name] * layer.size + carried
        counts[layer.name] = min(max(round(wanted / even), 1), layer.size // even) * even
        carried = wanted - counts[layer.name]
    rest = room - sum(counts.values())
    for layer in reversed(coarsest_first):
        grain = grains[layer.name]
        change = min(max(rest, grain.even - counts[layer.name]), layer.size - counts[layer.name])
        change = int(change / grain.least) * grain.least
        counts[layer.name] += change
        rest -= change
    if abs(rest) >= min(grain.least for grain in grains.values()):
        raise PareError(
            f"{room:,} of {sum(layer.size for layer in layers):,} weights are to stay, and a weight in each row of every "
            "layer takes more: lower the sparsity, or skip layers."
        )
    return counts
