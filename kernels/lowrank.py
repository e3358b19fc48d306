"""Low-rank weights (out, in) of rank k, multiplied as chains: never as the dense matrix.

Factors are `left @ right`. PIFA (Zhao et al., ICML 2025) stores k of the matrix's own rows, the pivots, and what the
other rows are made of: k (out + in - k) numbers instead of k (out + in). CUR stores some columns, some rows, and the
matrix that links them. These are the reference functions: plain torch, any device and any floating dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MANY = 32  # tokens from which PIFA permutes weights instead of outputs


def lowrank_matmul(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ (left @ right).T + bias`. x (..., in); left (out, k); right (k, in); bias (out,). Returns (..., out)."""
    return F.linear(F.linear(x, right), left, bias)


def pifa_matmul(
    x: Tensor, pivots: Tensor, coefficients: Tensor, order: Tensor, bias: Tensor | None = None
) -> Tensor:  # (..., out)
    """x (..., in); pivots (k, in); coefficients (out - k, k); order (out,) integer: where each row of the matrix stands
    among the pivots followed by the others."""
    first = F.linear(x, pivots)  # (..., k)
    if first.numel() >= MANY * len(pivots):
        # outputs of many tokens are dear to permute: rather the rows of what makes them, the pivots' own among them
        own = torch.eye(len(pivots), dtype=x.dtype, device=x.device)
        return F.linear(first, torch.cat((own, coefficients)).index_select(0, order), bias)
    both = torch.cat((first, F.linear(first, coefficients)), dim=-1).index_select(-1, order)  # (..., out)
    return both if bias is None else both + bias


def cur_matmul(x: Tensor, columns: Tensor, link: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ (columns @ link @ rows).T + bias`. columns (out, c); link (c, r); rows (r, in). Returns (..., out)."""
    return F.linear(F.linear(F.linear(x, rows), link), columns, bias)


def grouped_lowrank_matmul(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, ranks: list[int], outs: list[int]
) -> Tensor:  # (..., sum of outs)
    """Several linears of one input: right (sum of ranks, in); left, the (out, k) of each, in one tensor of any shape."""
    if len(ranks) == 1:
        return lowrank_matmul(x, left.view(outs[0], ranks[0]), right, bias)
    sizes = [out * rank for out, rank in zip(outs, ranks, strict=True)]
    lefts = [part.view(-1, rank) for part, rank in zip(left.flatten().split(sizes), ranks, strict=True)]
    hidden = F.linear(x, right).split(ranks, dim=-1)
    both = torch.cat([F.linear(h, part) for h, part in zip(hidden, lefts, strict=True)], dim=-1)
    return both if bias is None else both + bias


def grouped_pifa_matmul(
    x: Tensor,
    pivots: Tensor,
    coefficients: Tensor,
    order: Tensor,
    bias: Tensor | None,
    ranks: list[int],
    outs: list[int],
) -> Tensor:  # (..., sum of outs)
    """Several linears of one input: pivots (sum of ranks, in), coefficients as `left` above, each one's own order."""
    others = [out - rank for out, rank in zip(outs, ranks, strict=True)]
    sizes = [other * rank for other, rank in zip(others, ranks, strict=True)]
    parts = zip(pivots.split(ranks), coefficients.flatten().split(sizes), order.split(outs), ranks, strict=True)
    both = torch.cat([pifa_matmul(x, p, c.view(-1, rank), o) for p, c, o, rank in parts], dim=-1)
    return both if bias is None else both + bias


@torch.no_grad()
def lowrank_dense(left: Tensor, right: Tensor) -> Tensor:  # (out, in)
    """The product in float32, rounded once to the factors' dtype."""
    return (left.float() @ right.float()).to(left.dtype)


@torch.no_grad()
def pifa_dense(pivots: Tensor, coefficients: Tensor, order: Tensor) -> Tensor:  # (out, in)
    """The pivots bit for bit, the other rows in float32 and rounded once."""
    others = (coefficients.float() @ pivots.float()).to(pivots.dtype)
    return torch.cat((pivots, others)).index_select(0, order)


@torch.no_grad()
def cur_dense(columns: Tensor, link: Tensor, rows: Tensor) -> Tensor:  # (out, in)
    """The product in float32, rounded once."""
    return (columns.float() @ link.float() @ rows.float()).to(columns.dtype)
