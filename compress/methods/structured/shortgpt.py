"""ShortGPT: blocks that change the hidden states least go. Men et al. 2024 (arXiv 2403.03853).

The Block Influence of block l, whose input is x_l, is BI_l = 1 - E[cos(x_l, x_l+1)] over all tokens; the lowest go at once.
"""

from dataclasses import dataclass

from paredown.compress.methods.base import BlockMethod, Profile, register


@register("shortgpt")
@dataclass(frozen=True)
class ShortGPT(BlockMethod):
    reads = "states"

    def choose(self, profile: Profile, count: int, drop: int) -> list[int]:
        influence = [1 - similarity for similarity in profile.similarity]
        return sorted(sorted(range(count), key=influence.__getitem__)[:drop])
