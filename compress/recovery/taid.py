"""TAID: the target moves from the student's own probabilities to the teacher's while training goes on.

Shing et al. 2025 (arXiv 2501.16937), section 3.2: after step n of N with loss J_n,

    d_n = (J_{n-1} - J_n) / J_{n-1},   m_n = beta m_{n-1} + (1 - beta) d_n,
    t_{n+1} = min(end, max(start + (end - start) n / N,  t_n + alpha sigmoid(m_n) (1 - t_n)))

from t = start and m = 0. `divergence` says what t does to the target.
"""

import math

from paredown.compress.recipe import TaidSpec

TINY = 1e-15  # beside a loss that is zero


def moved(t: float, momentum: float, before: float | None, loss: float, progress: float, spec: TaidSpec) -> list[float]:
    """The share of the teacher and the momentum after a step: `before` is the loss of the step before, if there was one.

    progress: the share of all steps that were taken.
    """
    if before is None:
        return [t, momentum]
    momentum = spec.beta * momentum + (1 - spec.beta) * (before - loss) / (before + TINY)
    sigmoid = 0.5 + 0.5 * math.tanh(momentum / 2)
    faster = t + spec.alpha * sigmoid * (1 - t)
    return [min(spec.end, max((1 - progress) * spec.start + progress * spec.end, faster)), momentum]
