"""The last blocks go, without measuring: the baseline of papers on depth.

With `keep_last` the very last one stays, and those before it go: the simpler strategy of Gromov et al. 2024
(arXiv 2403.17887).
"""

from dataclasses import dataclass

from paredown.compress.methods.base import BlockMethod, Profile, register


@register("tail")
@dataclass(frozen=True)
class Tail(BlockMethod):
    keep_last: bool = False

    def choose(self, profile: Profile, count: int, drop: int) -> list[int]:
        end = count - 1 if self.keep_last else count
        return list(range(end - drop, end))
