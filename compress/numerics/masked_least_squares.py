"""The best weights on a given mask: conjugate gradients on `tr((T - X) A (T - X)^T)`, for all rows at once.

A is shared by all rows, each of which has a mask of its own: one product (out, in) x (in, in) an iteration does what a
factorisation for each row would (Meng et al. 2024, ALPS, section 3.3, arXiv 2406.07831).
"""

import torch
from torch import Tensor


def damped_gram(gram: Tensor, damping: float) -> Tensor:  # (in, in)
    """`gram + damping * mean(diag gram) I` in float32; dead inputs, whose moments are zero, get 1 on the diagonal."""
    diagonal = gram.diagonal()
    matrix = gram.float()
    matrix.diagonal().copy_(torch.where(diagonal == 0, 1.0, diagonal + damping * diagonal.mean()))
    return matrix


def fitted(target: Tensor, keep: Tensor, gram: Tensor, iterations: int, start: Tensor | None = None) -> Tensor:
    """X (out, in), zero where `keep` is False, that nearly minimises `tr((T - X) A (T - X)^T)`.

    target T (out, in), keep bool (out, in), gram A (in, in) positive definite, all of one float dtype in which it is
    computed. Preconditioned by diag A; after each row's number of kept weights in iterations it is exact but for rounding.
    `start` is an approximation to begin from, by default the target itself.
    """
    mask = keep.to(target.dtype)  # a product with bools takes nearly three times as long
    x = (target if start is None else start) * mask
    diagonal = gram.diagonal()  # (in,)
    residual = ((target - x) @ gram).mul_(mask)
    direction = residual / diagonal
    norm = (residual * direction).sum(1, keepdim=True)  # (out, 1)
    for _ in range(iterations):
        image = (direction @ gram).mul_(mask)
        step = norm / (direction * image).sum(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        x.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        scaled = residual / diagonal
        new = (residual * scaled).sum(1, keepdim=True)
        direction = scaled.addcmul_(new / norm.clamp_min(torch.finfo(x.dtype).tiny), direction)
        norm = new
    return x


def row_losses(target: Tensor, x: Tensor, gram: Tensor) -> Tensor:  # (out,)
    """`(t - x) A (t - x)^T` of each row."""
    error = target - x
    return ((error @ gram) * error).sum(1)
