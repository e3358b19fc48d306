"""LaCo: layers in a row collapse into the first of them. Yang et al. 2024 (arXiv 2402.11187).

All parameters theta of m layers behind layer l are merged into it by their differences,

    theta*_l = theta_l + sum_{k=1..m} (theta_{l+k} - theta_l).

From l = highest - merge downwards, each merge of `merge` layers is kept if the last hidden states stay similar: if their
cosine to the dense model's, the mean over `windows` windows, is above the threshold. Then l goes down by `interval` and to
where `merge` layers are left to merge, else by one. The paper's threshold says how much goes. Here that is asked for: a pass
ends where enough are gone, and while too few go, the next pass begins anew with a threshold that is 0.05 lower. The authors'
code subtracts the sum so far, which leaves the last layer's own weights; this is the formula.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from paredown.compress.errors import PareError
from paredown.compress.methods.base import BlockMethod, Mix, Profile, register

STEP = 0.05


@register("laco")
@dataclass(frozen=True)
class LaCo(BlockMethod):
    merge: Annotated[int, Field(ge=2)] = 4  # layers that become one
    interval: Annotated[int, Field(ge=1)] = 2
    lowest: Annotated[int, Field(ge=0)] = 1  # layers below it stay as they are
    highest: Annotated[int, Field(ge=2)] | None = None  # the first merge ends before it; None: at the end
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.9
    windows: Annotated[int, Field(ge=1)] = 8

    reads = "merges"

    def choose(self, profile: Profile, count: int, drop: int) -> list[int]:
        kept = {mix[0][0] for mix in self.stay(profile, count, drop)}
        return [i for i in range(count) if i not in kept]

    def stay(self, profile: Profile, count: int, drop: int) -> list[Mix]:
        assert profile.similar is not None
        threshold = self.threshold
        while len(left := self._collapsed(profile.similar, count, drop, threshold)) > count - drop:
            if threshold < -1:
                raise PareError(
                    f"of {count} blocks {len(left)} stay when all merges are made that merge {self.merge}, interval "
                    f"{self.interval} and lowest {self.lowest} allow, and {count - drop} are asked for: change one of them."
                )
            threshold -= STEP
        return left

    def _collapsed(
        self, similar: Callable[[Sequence[Mix]], float], count: int, drop: int, threshold: float
    ) -> list[Mix]:
        """What stays of one pass, which ends where `drop` of `count` blocks are gone."""
        stay: list[Mix] = [((i, 1.0),) for i in range(count)]
        at = min(max((self.highest or count) - self.merge, self.lowest), count - 2)
        while at >= self.lowest and len(stay) > count - drop:
            end = min(at + self.merge, len(stay), at + 1 + len(stay) - (count - drop))
            tried = [*stay[:at], collapsed(stay[at:end]), *stay[end:]]
            if similar(tried) > threshold:
                stay = tried
                at = min(at - self.interval, len(stay) - self.merge)
            else:
                at -= 1
        return stay


def collapsed(mixes: Sequence[Mix]) -> Mix:
    """Layers in a row, each a sum, as one: the first plus the differences of all others to it."""
    total: dict[int, float] = {}
    for n, mix in enumerate(mixes):
        for block, weight in mix:
            total[block] = total.get(block, 0.0) + weight * (1.0 if n else 2.0 - len(mixes))
    return tuple(total.items())
