"""The first of 2SSP's two stages: channels with large activations stay. Sandri et al. 2025 (arXiv 2501.17771).

s_j = mean over windows of |a_j|_2, the norm over the window's tokens. The second stage removes attention by perplexity on
one window, as `block_pruner` does with `which: attention` and `windows: 1`. To remove a share s of B blocks' parameters,
the paper takes round(B s^(f / (1.5 a))) attentions of a parameters each, and the rest from the MLPs, of f parameters each.
The recipe `two-ssp-80` has both stages.
"""

from dataclasses import dataclass

from torch import Tensor

from paredown.compress.methods.base import Units, register
from paredown.compress.methods.structured.width import Scored
from paredown.compress.numerics.moments import Need


@register("two_ssp_width")
@dataclass(frozen=True)
class TwoSSPWidth(Scored):
    reads = frozenset({Need.WINDOW_NORM})

    def scores(self, units: Units) -> Tensor:
        return units.stats.inputs.window_norm
