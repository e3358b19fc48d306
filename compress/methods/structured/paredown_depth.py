"""Ours: the blocks of `greedy_depth` go, and what stays makes up for them.

In the smaller model each layer that writes to the residual stream gets the weight with which that stream is nearest to the
dense one where the next kept sublayer reads it: see survey/refit.py. `damping` holds it near the weight that it had.
"""

from dataclasses import dataclass

from paredown.compress.methods.base import Damping, register
from paredown.compress.methods.structured.greedy_depth import GreedyDepth


@register("paredown_depth")
@dataclass(frozen=True)
class PareDownDepth(GreedyDepth):
    damping: Damping = 0.1

    refits = True
