"""The block goes without which the model departs least from the dense one, then the next such block, and so on.

l* = argmin_l KL(dense || model without l and those gone before), over every fourth position of `windows` calibration windows
of full length. Others remove the blocks whose absence raises perplexity least, all at once, Kim et al. 2024, Shortened LLaMA
(arXiv 2402.02834), or one after another, Song et al. 2024, SLEB (arXiv 2402.09025).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from paredown.compress.methods.base import BlockMethod, Profile, register


@register("greedy_depth")
@dataclass(frozen=True)
class GreedyDepth(BlockMethod):
    windows: Annotated[int, Field(ge=1)] = 8

    reads: ClassVar[Literal["divergence", "loss"]] = "divergence"

    def choose(self, profile: Profile, count: int, drop: int) -> list[int]:
        return sorted(block for block, _ in profile.removals[:drop])
