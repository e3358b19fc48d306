"""Sparse plus low rank, both in the metric of the full Gram matrix: each is fitted in turn to what the other leaves.

OATS (Zhang & Papyan 2024, arXiv 2409.13652) and SLiM (Mozaffari et al. 2024, arXiv 2410.09615) use its diagonal.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from paredown.compress.methods import Damping, register
from paredown.compress.methods.lowrank.base import Count
from paredown.compress.numerics.edits import LowRank
from paredown.compress.numerics.factorize import Metric, Target, balanced, factorize, share_lost
from paredown.compress.numerics.masks import NofM, Sparsity, check_width, kept_count
from paredown.compress.numerics.moments import InputStats, InverseCholesky
from paredown.compress.numerics.sweep import adaptive_mask, block_columns, masked, narrowed, sparsegpt_sweep
from paredown.compress.storage import kinds


@register("sparse_low_rank")
@dataclass(frozen=True)
class SparseLowRank:
    sparsity: Sparsity = 0.5  # fraction removed of the sparse part, or "2:4"
    rank: Count = 16  # of the low-rank part
    rounds: Annotated[int, Field(ge=1, le=100)] = 4
    damping: Damping = 0.01  # of the mean diagonal of H, added to the diagonal

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def spec(self, shape: tuple[int, int], element_size: int) -> dict[str, Any] | None:
        """None where both parts together would store no less than the weight."""
        check_width(shape[1], self.sparsity)
        mask = "sparse24" if self.sparsity == NofM(2, 4) else "bitmap"
        kept = kept_count(shape, self.sparsity)
        spec = {"kind": f"{mask}_lowrank", "shape": [*shape], "rank": min(self.rank, *shape), "kept": kept}
        return spec if kinds.stored_bytes(spec, element_size) < shape[0] * shape[1] * element_size else None

    def compress(self, weight: Tensor, stats: InputStats) -> LowRank | None:
        shape = (weight.shape[0], weight.shape[1])
        spec = self.spec(shape, weight.element_size())
        if spec is None:
            return None
        kind = spec["kind"]
        wide, metric = weight.double(), Metric(input=stats.gram)
        inverse, best = stats.inverse_cholesky(self.damping), None
        sparse = wide.new_zeros(shape)
        for _ in range(self.rounds):
            factors = factorize(Target(wide - sparse), metric, lambda losses: min(self.rank, len(losses)))
            left, right = (narrowed(t, weight.dtype) for t in balanced(factors))
            kept, keep = self._sparse(wide - left.double() @ right.double(), inverse, weight.dtype)
            sparse = kept.double()
            tensors = {**kinds.pack(kind.removesuffix("_lowrank"), kept, keep), "left": left, "right": right}
            loss = share_lost(wide, sparse + left.double() @ right.double(), metric, wide)
            if best is None or loss < (best.loss or 0):
                best = LowRank(kind, shape, factors.rank, tensors, loss=loss)
        assert best is not None
        return replace(best, damping=inverse.damping, fallback=inverse.told(self.damping))

    def _sparse(self, rest: Tensor, inverse: InverseCholesky, dtype: Any) -> tuple[Tensor, Tensor]:
        choose = adaptive_mask(self.sparsity, *rest.shape)
        updated, keep = sparsegpt_sweep(rest, inverse, choose, block_columns(self.sparsity))
        return masked(narrowed(updated, dtype), keep), keep
