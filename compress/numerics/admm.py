"""A mask, and weights on it, by ADMM on the layer loss with the support as a constraint.

Meng et al. 2024, ALPS, algorithm 1 (arXiv 2406.07831).
"""

import torch
from torch import Tensor

from paredown.compress.numerics.masks import Sparsity, keep_mask, largest
from paredown.compress.numerics.precision import short_products
from paredown.compress.numerics.spectral import cholesky

EVERY = 3  # iterations between two looks at how far the support has settled, as published


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


def raised(inverse: Tensor, penalty: float, growth: float) -> Tensor:
    """Nearly `(A + growth * penalty I)^-1` from `(A + penalty I)^-1`, both (n, n), by one short product.

    The first polynomial of Chebyshev's for `1 / (1 + t)`, with t the eigenvalues of `(growth - 1) * penalty * inverse`,
    which lie between 0 and `d = growth - 1`: the relative error is at most `d^2 / (d^2 + 8 d + 8)`, 1.5% at 1.42, beside
    that of rounding.
    """
    d = growth - 1
    scale = 8 / (d * d + 8 * d + 8)
    with short_products(inverse.device.type):
        square = inverse @ inverse
    return square.mul_(-scale * d * penalty).add_(inverse, alpha=scale * growth)


def admm(
    weight: Tensor,
    moment: UnitMoment,
    sparsity: Sparsity,
    iterations: int,
    penalty: float,
    every: int = EVERY,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Which weights stay (out, in), bool, over the layer or in each group of m; and weights (out, in) near the best.

    weight W (out, in) float32; `moment` A of the damped inputs. `penalty` is the first rho: the larger, the sooner the
    support settles, which is looked at after `every` few iterations. The free weights, `(W A - V + rho D) (A + rho I)^-1`,
    are W plus `rho (D - W - U) (A + rho I)^-1`, where U is V / rho: one product an iteration, whose rounding the next
    makes up for. In the first iteration D is W and U zero. Where not `exact`, a larger rho's inverse is one `raised`.
    """
    wanted = weight * moment.scale  # W (out, in)
    rho, inverse = penalty, moment.inverse(penalty)
    point = wanted  # free weights + U
    nearest = largest(point, sparsity)  # D
    aside = point - nearest  # U
    settled = nearest != 0
    for i in range(2, iterations + 1):
        held = wanted + aside
        with short_products(wanted.device.type):
            moved = nearest.sub_(held) @ inverse
        point = held.add_(moved, alpha=rho)
        nearest = largest(point, sparsity)
        aside = point - nearest
        if i % every == 0 and i < iterations:
            support = nearest != 0
            changed = int(torch.count_nonzero(support ^ settled)) / max(int(torch.count_nonzero(support)), 1)
            if not changed:
                break
            grown = (1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1) ** (every / EVERY)
            inverse = moment.inverse(rho * grown) if exact else raised(inverse, rho, grown)
            rho, aside, settled = rho * grown, aside / grown, support
    keep = keep_mask(point.abs(), sparsity, within="layer")
    return keep, point * keep / moment.scale
