"""SparseGPT as its paper states it, the formula against which `solvers` measures ours: algorithm 1 of Frantar and Alistarh
2023 (arXiv 2301.00774), one weight at a time, one column after another.
"""

import torch
from torch import Tensor

from paredown.compress.numerics.masks import NofM, Sparsity

BLOCK = 128  # both its lazy updates and its choice of a mask take so many columns


def reference_sweep(weight: Tensor, upper: Tensor, sparsity: Sparsity) -> Tensor:
    """The pruned weight (out, in) float32. weight (out, in) float32; upper (in, in): see `inverse_factor`.

    Masks are chosen from updated weights: of a block, the smallest `w^2 / diag(U)^2` over all rows, or m - n of each m.
    """
    work, size = weight.clone(), weight.shape[1]
    for begin in range(0, size, BLOCK):
        end = min(begin + BLOCK, size)
        block, local = work[:, begin:end].clone(), upper[begin:end, begin:end]
        errors = torch.zeros_like(block)  # (out, columns)
        removed = torch.zeros_like(block, dtype=torch.bool)
        if not isinstance(sparsity, NofM):
            scores = block**2 / local.diagonal() ** 2
            threshold = scores.flatten().sort().values[round(sparsity * scores.numel()) - 1]
            removed = scores <= threshold
        for i in range(end - begin):
            if isinstance(sparsity, NofM) and i % sparsity.m == 0:
                group = slice(i, i + sparsity.m)
                scores = block[:, group] ** 2 / local.diagonal()[group] ** 2  # (out, m)
                lowest = scores.topk(sparsity.m - sparsity.n, largest=False).indices
                removed[:, group].scatter_(1, lowest, True)
            pruned = block[:, i].masked_fill(removed[:, i], 0.0)
            error = (block[:, i] - pruned) / local[i, i]  # (out,)
            block[:, i:] -= torch.outer(error, local[i, i:])
            block[:, i], errors[:, i] = pruned, error
        work[:, begin:end] = block
        work[:, end:] -= errors @ upper[begin:end, end:]
    return work


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor (in, in) of the inverse of H + damping * mean(diag H); H (in, in) float32, no column dead."""
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper
