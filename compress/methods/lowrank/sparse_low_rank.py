"""Sparse plus low rank, both in the metric of the full Gram matrix: each in turn is fitted to the residual of the other.

OATS (Zhang & Papyan 2024, arXiv 2409.13652) and SLiM (Mozaffari et al. 2024, arXiv 2410.09615) use its diagonal.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from paredown.compress.methods.base import Damping, Shape, WeightMethod, register
from paredown.compress.methods.lowrank.base import Count
from paredown.compress.numerics.cholesky import InverseCholesky
from paredown.compress.numerics.edits import Factored
from paredown.compress.numerics.factorize import balanced, factorize
from paredown.compress.numerics.masks import NofM, Sparsity, check_width, kept_count, masked
from paredown.compress.numerics.metric import Metric, Target, share_lost
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.numerics.precision import narrowed
from paredown.compress.numerics.sweep import adaptive_mask, block_columns, sparsegpt_sweep
from paredown.compress.storage import kinds
from paredown.compress.storage.spec import Spec


@register("sparse_low_rank")
@dataclass(frozen=True)
class SparseLowRank(WeightMethod):
    sparsity: Sparsity = 0.5  # the fraction removed from the sparse part, or "2:4"
    rank: Count = 16  # of the low-rank part
    rounds: Annotated[int, Field(ge=1, le=100)] = 4
    damping: Damping = 0.01  # relative to the mean diagonal of H

    needs = frozenset({Need.GRAM})
    chain = True

    def expect(self, shape: Shape, element_size: int) -> Spec | None:
        """None if both parts together would store no less than the weight."""
        check_width(shape[1], self.sparsity)
        mask = "sparse24" if self.sparsity == NofM(2, 4) else "bitmap"
        rank, values = min(self.rank, *shape), kept_count(shape, self.sparsity)
        spec = Spec(f"{mask}_lowrank", shape, rank=rank, values=values)
        return spec if kinds.stored_bytes(spec, element_size) < spec.size * element_size else None

    def working_bytes(self, shape: Shape) -> int:
        """float32 scores; float64 copies of the weight, and three of the input's moment."""
        out, inner = shape
        return 10 * out * inner + 8 * (4 * out * inner + 4 * min(shape) ** 2 + 3 * inner * inner)

    def compress(self, weight: Tensor, stats: Stats) -> Factored | None:
        shape = (weight.shape[0], weight.shape[1])
        spec = self.expect(shape, weight.element_size())
        if spec is None:
            return None
        kind = spec.kind
        wide, metric = weight.double(), Metric(input=stats.inputs.gram)
        inverse, best = stats.inputs.inverse_cholesky(self.damping), None
        sparse = wide.new_zeros(shape)
        for _ in range(self.rounds):
            factors = factorize(Target(wide - sparse), metric, lambda losses: min(self.rank, len(losses)))
            left, right = (narrowed(t, weight.dtype) for t in balanced(factors))
            kept, keep = self._sparse(wide - left.double() @ right.double(), inverse, weight.dtype)
            sparse = kept.double()
            tensors = {**kinds.pack(kind.removesuffix("_lowrank"), kept, keep), "left": left, "right": right}
            loss = share_lost(wide, sparse + left.double() @ right.double(), metric, wide)
            if best is None or loss < (best.loss or 0):
                best = Factored(kind, shape, factors.rank, tensors, loss=loss)
        assert best is not None
        return replace(best, damping=inverse.damping, fallback=inverse.fallback)

    def _sparse(self, rest: Tensor, inverse: InverseCholesky, dtype: Any) -> tuple[Tensor, Tensor]:
        choose = adaptive_mask(self.sparsity, rest, lambda: inverse)
        updated, keep = sparsegpt_sweep(rest, inverse, choose, block_columns(self.sparsity))
        return masked(narrowed(updated, dtype), keep), keep
