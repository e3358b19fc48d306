"""A mask by ADMM on the layer loss with the support as a constraint.

Meng et al. 2024, ALPS, algorithm 1 (arXiv 2406.07831).
"""

import torch
from torch import Tensor

from paredown.compress.numerics.masks import Sparsity, keep_mask
from paredown.compress.numerics.spectral import cholesky

EVERY = 3  # iterations between two looks at how far the support has settled


class UnitMoment:
    """A positive definite moment (n, n) with its inputs scaled to unit moments, and its inverses under penalties, float32."""

    def __init__(self, matrix: Tensor) -> None:
        roots = matrix.diagonal().sqrt()  # (n,)
        self.scale = roots.float()  # (n,)
        self.matrix = (matrix / roots[:, None] / roots).float()  # (n, n): its diagonal is ones
        self._first: tuple[float, Tensor] | None = None

    def inverse(self, penalty: float) -> Tensor:
        """`(A + penalty I)^-1` (n, n). The first is kept: all layers of an input, at all sparsities, begin with it."""
        if self._first and self._first[0] == penalty:
            return self._first[1]
        penalised = self.matrix.clone()
        penalised.diagonal().add_(penalty)
        inverse = torch.cholesky_inverse(cholesky(penalised))
        self._first = self._first or (penalty, inverse)
        return inverse


def admm_mask(weight: Tensor, moment: UnitMoment, sparsity: Sparsity, iterations: int, penalty: float) -> Tensor:
    """Which weights stay (out, in), bool, over the whole layer or in each group of m, once the support has settled.

    weight W (out, in) float32; `moment` A of the damped inputs. `penalty` is the first rho: the larger, the sooner the
    support settles. The free weights, `(W A - V + rho D) (A + rho I)^-1`, are W plus `(rho (D - W) - V) (A + rho I)^-1`:
    one product an iteration. In the first of them D is W and V zero. float32.
    """
    wanted = weight * moment.scale  # W (out, in)
    point, dual, rho, inverse = wanted, torch.zeros_like(wanted), penalty, moment.inverse(penalty)
    keep = settled = keep_mask(wanted.abs(), sparsity, within="layer")
    for i in range(1, iterations + 1):
        if i > 1:
            pull = (point * keep).sub_(wanted).mul_(rho).sub_(dual)
            point = torch.addmm(dual.div(rho).add_(wanted), pull, inverse)  # free weights + V / rho
            keep = keep_mask(point.abs(), sparsity, within="layer")
        dual = (point * ~keep).mul_(rho)  # V + rho (free weights - D), where D is the point on its support
        if i % EVERY == 0:
            changed = int((keep ^ settled).sum()) / max(int(keep.sum()), 1)
            if not changed or i == iterations:
                break
            rho *= 1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1
            inverse, settled = moment.inverse(rho), keep
    return keep
