"""CURing: some columns and rows of the weight itself, chosen by DEIM on Wanda's scores, and a matrix that links them.

Park et al. 2025 (arXiv 2501.04211). The link is fitted to the layer's outputs; with `link: plain` to the weight, as there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Shape, register
from paredown.compress.methods.lowrank.base import Count, Factorized
from paredown.compress.numerics.edits import Factored
from paredown.compress.numerics.metric import Metric, share_lost
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.precision import narrowed
from paredown.compress.numerics.scores import wanda_score


@register("cur")
@dataclass(frozen=True)
class CUR(Factorized):
    max_rank: Count = 256  # the most that the paper's rule for ranks gives
    blocks: Count | None = 10  # how many: those that turn their input least, without the first and the last; null: all
    link: Literal["gram", "plain"] = "gram"  # C^+ W weighed by the input's moment, or the paper's C^+ W R^+

    needs = frozenset({Need.GRAM})
    surveys_angles = True
    default_kept = None
    predicts = False  # with rows and columns of the weight more is lost than with singular vectors

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.energy or self.storage != "factors":
            raise PareError("cur has a storage of its own and no energy curve: ask by kept, rank or target_parameters.")

    @property
    def kind(self) -> str:
        return "cur"

    def chosen_blocks(self, angles: Sequence[float]) -> list[int]:
        inner = sorted(range(1, len(angles) - 1), key=lambda index: angles[index])
        if self.blocks and not inner:
            raise PareError("cur leaves out the first and the last block, and there is no other: --set blocks=null")
        return sorted(inner[: self.blocks]) if self.blocks else list(range(len(angles)))

    def planned_rank(self, shape: Shape) -> int | None:
        if self.asked:
            return super().planned_rank(shape)
        m, n = shape
        rank = max(1, min(self.max_rank, int((sqrt(m * m + 6 * m * n + n * n) - (m + n)) / 2)))
        return rank if self.numbers(shape, rank) < m * n else 0

    def metric(self, stats: Stats) -> Metric:
        return Metric(input=stats.inputs.gram)

    def compress(self, weight: Tensor, stats: Stats) -> Factored | None:
        shape = (weight.shape[0], weight.shape[1])
        rank = self._rank_for(shape, weight.new_zeros(0))
        if not rank:
            return None
        try:
            rows, columns = deim(wanda_score(weight, stats.inputs.rms).double(), rank)
            middle = self._link(weight.double(), weight[:, columns].double(), weight[rows].double(), stats)
        except torch.linalg.LinAlgError as fault:  # type: ignore[attr-defined]
            raise PareError(f"its singular value decomposition failed ({fault}). Calibrate on more text.") from fault
        parts = {"columns": weight[:, columns], "link": narrowed(middle, weight.dtype), "rows": weight[rows]}
        edit = Factored("cur", shape, rank, {name: part.contiguous() for name, part in parts.items()})
        wide = weight.double()
        return replace(edit, loss=share_lost(wide, edit.dense().double(), self.metric(stats), wide))

    def _link(self, weight: Tensor, columns: Tensor, rows: Tensor, stats: Stats) -> Tensor:  # (rank, rank)
        """argmin over U of |(W - C U R) H^(1/2)|: C^+ W H R^T (R H R^T)^+."""
        weighed = rows if self.link == "plain" else rows @ stats.inputs.gram  # (rank, in)
        inverse: Tensor = torch.linalg.pinv(weighed @ rows.T, hermitian=True)  # (rank, rank)
        left: Tensor = torch.linalg.pinv(columns)  # (rank, out)
        return left @ weight @ weighed.T @ inverse


def deim(score: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rows and columns, (rank,) each, that represent a matrix: discrete empirical interpolation of singular vectors.

    Sorensen & Embree 2016, algorithm 1 (arXiv 1407.5516).
    """
    left, _, right = torch.linalg.svd(score, full_matrices=False)
    return _deim(left[:, :rank]), _deim(right[:rank].T)


def _deim(vectors: Tensor) -> Tensor:  # (rank,) int64
    """For each vector the place where the earlier ones interpolate it worst: the pivots of an LU factorisation."""
    work, places = vectors.clone(), []
    for j in range(work.shape[1]):
        place = int(work[:, j].abs().argmax())
        places.append(place)
        # subtract from the later vectors their interpolation at this place
        work[:, j + 1 :] -= torch.outer(work[:, j] / work[place, j], work[place, j + 1 :])
    return torch.tensor(places, device=vectors.device)
