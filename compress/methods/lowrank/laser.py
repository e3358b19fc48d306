"""LASER: plain rank reduction of MLP matrices in the last blocks. Sharma et al. 2023 (arXiv 2312.13558)."""

from collections.abc import Sequence
from dataclasses import dataclass

from paredown.compress.methods.base import Share, register
from paredown.compress.methods.lowrank.svd import SVD


@register("laser")
@dataclass(frozen=True)
class LASER(SVD):
    rho: Share = 0.1  # the rank as a share of the full one, unless another option says how much is kept
    last: Share = 0.25  # the share of blocks, counted from the end, that is edited

    default_kept = None

    def chosen_blocks(self, angles: Sequence[float]) -> list[int]:
        count = len(angles)
        return list(range(count - max(1, round(self.last * count)), count))

    def planned_rank(self, shape: tuple[int, int]) -> int | None:
        if self.asked:
            return super().planned_rank(shape)
        rank = max(1, int(self.rho * min(shape)))
        return rank if self.numbers(shape, rank) < shape[0] * shape[1] else 0
