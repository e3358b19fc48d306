"""A mask by ADMM on the layer loss with the support as a constraint.

Meng et al. 2024, ALPS, algorithm 1 (arXiv 2406.07831).
"""

import torch
from torch import Tensor

from paredown.compress.numerics.masks import Sparsity, keep_mask

EVERY = 3  # iterations between two looks at how far the support has settled


def admm_mask(
    weight: Tensor, gram: Tensor, sparsity: Sparsity, iterations: int, penalty: float
) -> Tensor:  # (out, in) bool
    """Which weights stay: of `|W + V / rho|`, over the whole layer or in each group of m, once the support has settled.

    weight (out, in) and gram (in, in), damped, float32. `penalty` is the first rho, where inputs are scaled to unit moments:
    the larger, the sooner the support settles. One eigendecomposition of the scaled gram serves all iterations.
    """
    scale = gram.diagonal().sqrt()  # (in,)
    scaled = gram / scale[:, None] / scale
    values, vectors = torch.linalg.eigh(scaled)
    wanted = weight * scale  # (out, in)
    pull = wanted @ scaled
    sparse, dual, rho = wanted.clone(), torch.zeros_like(wanted), penalty
    keep = settled = keep_mask(wanted.abs(), sparsity, within="layer")
    for i in range(1, iterations + 1):
        free = ((pull - dual + rho * sparse) @ vectors / (values + rho)) @ vectors.T
        point = free + dual / rho
        keep = keep_mask(point.abs(), sparsity, within="layer")
        sparse = point * keep
        dual += rho * (free - sparse)
        if i % EVERY == 0:
            changed = int((keep ^ settled).sum()) / max(int(keep.sum()), 1)
            if not changed:
                break
            rho *= 1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1
            settled = keep
    return keep
