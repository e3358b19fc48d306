"""A mask by ADMM on the layer loss with the support as a constraint.

Meng et al. 2024, ALPS, algorithm 1 (arXiv 2406.07831).
"""

import torch
from torch import Tensor

from paredown.compress.numerics.masks import Sparsity, keep_mask
from paredown.compress.numerics.spectral import Spectrum

EVERY = 3  # iterations between two looks at how far the support has settled


def admm_mask(
    weight: Tensor, spectrum: Spectrum, sparsity: Sparsity, iterations: int, penalty: float
) -> Tensor:  # (out, in) bool
    """Which weights stay: of `|W + V / rho|`, over the whole layer or in each group of m, once the support has settled.

    weight (out, in) float32; `spectrum` of the damped Gram matrix (in, in), whose inputs are scaled to unit moments.
    `penalty` is the first rho: the larger, the sooner the support settles. float32.
    """
    vectors, values = spectrum.vectors, spectrum.values  # (in, in), (in,)
    wanted = weight * spectrum.scale  # (out, in)
    pull = (wanted @ vectors).mul_(values) @ vectors.T
    sparse, dual, rho = wanted, torch.zeros_like(wanted), penalty
    keep = settled = keep_mask(wanted.abs(), sparsity, within="layer")
    for i in range(1, iterations + 1):
        pulled = torch.add(pull, sparse, alpha=rho).sub_(dual)
        free = (pulled @ vectors).div_(values + rho) @ vectors.T
        point = free.add_(dual, alpha=1 / rho)
        keep = keep_mask(point.abs(), sparsity, within="layer")
        sparse = point * keep
        torch.sub(point, sparse, out=dual).mul_(rho)  # what V + rho (free - sparse) comes to
        if i % EVERY == 0:
            changed = int((keep ^ settled).sum()) / max(int(keep.sum()), 1)
            if not changed:
                break
            rho *= 1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1
            settled = keep
    return keep
