"""Products with low-rank weights (out, in) of rank k: one factor after the other, never the dense matrix.

A weight is stored in one of three forms. Two factors: `left @ right`. PIFA (Zhao et al., ICML 2025): k rows of the
matrix itself, the pivots, and coefficients that express the other rows by the pivots; k (out + in - k) numbers instead
of k (out + in). CUR: some columns, some rows, and a small matrix that links them.

These are the reference functions: plain torch, for any device and any floating dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# numbers of a weight: up to here PIFA's outputs come in order from a left factor that has its rows so, whose further products
# take less time than permuting outputs
SMALL = 1 << 20
AT_ONCE = 512  # tokens whose outputs a CPU permutes while they are in its cache


def lowrank_matmul(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ (left @ right).T + bias`. x (..., in); left (out, k); right (k, in); bias (out,). Returns (..., out)."""
    return F.linear(F.linear(x, right), left, bias)


def pifa_matmul(
    x: Tensor, pivots: Tensor, coefficients: Tensor, order: Tensor, bias: Tensor | None = None
) -> Tensor:  # (..., out)
    """`x @ weight.T + bias`, where weight is `cat(pivots, coefficients @ pivots)[order]`.

    x (..., in); pivots (k, in); coefficients (out - k, k); order (out,) integer: the place of each row of the weight in
    the list of pivots followed by the other rows; bias (out,).
    """
    if len(order) * x.shape[-1] <= SMALL:
        return lowrank_matmul(x, pifa_left(coefficients, order), pivots, bias)
    tokens = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu" and len(tokens) > AT_ONCE:
        y = torch.cat([_pifa_rows(part, pivots, coefficients, order) for part in tokens.split(AT_ONCE)])
    else:
        y = _pifa_rows(tokens, pivots, coefficients, order)
    y = y.view(*x.shape[:-1], len(order))
    return y if bias is None else y + bias


def _pifa_rows(x: Tensor, pivots: Tensor, coefficients: Tensor, order: Tensor) -> Tensor:  # (tokens, out)
    """By way of one token a column: rows are permuted many times faster than columns."""
    hidden = pivots @ x.T  # (k, tokens)
    return torch.cat((hidden, coefficients @ hidden)).index_select(0, order).T.contiguous()


def pifa_left(coefficients: Tensor, order: Tensor) -> Tensor:  # (out, k)
    """The factor whose product with the pivots is the weight; coefficients (out - k, k), order (out,) as in `pifa_matmul`."""
    identity = torch.eye(coefficients.shape[1], dtype=coefficients.dtype, device=coefficients.device)
    return torch.cat((identity, coefficients)).index_select(0, order)


def cur_matmul(x: Tensor, columns: Tensor, link: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ (columns @ link @ rows).T + bias`.

    x (..., in); columns (out, c); link (c, r); rows (r, in); bias (out,). Returns (..., out).
    """
    return F.linear(F.linear(F.linear(x, rows), link), columns, bias)


def grouped_lowrank_matmul(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, ranks: list[int], outs: list[int]
) -> Tensor:  # (..., sum of outs)
    """Several linears with the same input, their outputs side by side.

    x (..., in); right (sum of ranks, in); left: the (out, rank) factor of each linear, one after the other, in one tensor
    of any shape; bias (sum of outs,).
    """
    if len(ranks) == 1:
        return lowrank_matmul(x, left.view(outs[0], ranks[0]), right, bias)
    sizes = [out * rank for out, rank in zip(outs, ranks, strict=True)]
    lefts = [part.view(-1, rank) for part, rank in zip(left.flatten().split(sizes), ranks, strict=True)]
    hidden = F.linear(x, right).split(ranks, dim=-1)
    y = torch.cat([F.linear(h, part) for h, part in zip(hidden, lefts, strict=True)], dim=-1)
    return y if bias is None else y + bias


def grouped_pifa_matmul(
    x: Tensor,
    pivots: Tensor,
    coefficients: Tensor,
    order: Tensor,
    bias: Tensor | None,
    ranks: list[int],
    outs: list[int],
) -> Tensor:  # (..., sum of outs)
    """Several linears with the same input, their outputs side by side.

    x (..., in); pivots (sum of ranks, in); coefficients: the (out - rank, rank) matrix of each linear, one after the
    other, in one tensor of any shape; order (sum of outs,): as in `pifa_matmul`, counted within each linear; bias (sum
    of outs,).
    """
    if len(ranks) == 1:
        return pifa_matmul(x, pivots, coefficients.view(outs[0] - ranks[0], ranks[0]), order, bias)
    others = [out - rank for out, rank in zip(outs, ranks, strict=True)]
    sizes = [other * rank for other, rank in zip(others, ranks, strict=True)]
    parts = zip(pivots.split(ranks), coefficients.flatten().split(sizes), order.split(outs), ranks, strict=True)
    y = torch.cat([pifa_matmul(x, p, c.view(-1, rank), o) for p, c, o, rank in parts], dim=-1)
    return y if bias is None else y + bias


def lowrank_dense(left: Tensor, right: Tensor) -> Tensor:  # (out, in)
    """The dense weight: left (out, k) @ right (k, in) in float32, rounded once to the dtype of the factors."""
    return (left.float() @ right.float()).to(left.dtype)


def pifa_dense(pivots: Tensor, coefficients: Tensor, order: Tensor) -> Tensor:  # (out, in)
    """The dense weight: the pivots bit for bit, the other rows multiplied in float32 and rounded once.

    pivots (k, in); coefficients (out - k, k); order (out,) as in `pifa_matmul`.
    """
    others = (coefficients.float() @ pivots.float()).to(pivots.dtype)
    return torch.cat((pivots, others)).index_select(0, order)


def cur_dense(columns: Tensor, link: Tensor, rows: Tensor) -> Tensor:  # (out, in)
    """The dense weight: columns (out, c) @ link (c, r) @ rows (r, in) in float32, rounded once."""
    return (columns.float() @ link.float() @ rows.float()).to(columns.dtype)
