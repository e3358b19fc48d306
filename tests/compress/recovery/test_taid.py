"""How the share of the teacher moves, against the paper's equations written out."""

import math

import pytest

from paredown.compress.recipe import TaidSpec
from paredown.compress.recovery.taid import moved


@pytest.mark.parametrize("alpha", [0.0, 5e-4, 0.3])
def test_it_is_the_schedule_of_the_paper(alpha):
    spec, losses = TaidSpec(start=0.2, end=0.9, alpha=alpha, beta=0.8), [2.0, 1.5, 1.6, 0.9, 0.5, 0.4, 0.3, 0.3]
    t, momentum, wanted_t, m = spec.start, 0.0, 0.2, 0.0
    for n, loss in enumerate(losses, 1):
        before = losses[n - 2] if n > 1 else None
        new, momentum = moved(t, momentum, before, loss, n / len(losses), spec)
        if n > 1:
            delta = (losses[n - 2] - loss) / (losses[n - 2] + 1e-15)
            m = 0.8 * m + 0.2 * delta
            wanted_t += alpha / (1 + math.exp(-m)) * (1 - wanted_t)
            wanted_t = min(0.9, max(0.2 + 0.7 * n / len(losses), wanted_t))
        assert new == pytest.approx(wanted_t, rel=1e-12) and momentum == pytest.approx(m, rel=1e-12) and new >= t
        t = new
    assert t == 0.9


def test_a_loss_of_zero_leaves_the_linear_part():
    spec = TaidSpec(start=0.0)
    share, momentum = moved(0.0, 0.0, 0.0, 2.0, 0.5, spec)
    assert share == 0.5 and math.isfinite(momentum)
