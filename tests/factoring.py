"""Weights with correlated inputs and gradients, and plain forms of what the factorizer does, for its tests."""

from itertools import product

import pytest
import torch

from paredown.compress.numerics.metric import OUTPUT_DAMPING, Metric

SHAPES = {"wide": (9, 14), "square": (11, 11), "tall": (14, 9)}
SIDES = ("none", "diagonal", "full")
COMBINATIONS = [pytest.param(*c, id="-".join(c)) for c in product(SHAPES, SIDES, SIDES)]  # shape, input, output


def data(out, inner, tokens=200, seed=0):
    """A weight (out, in), inputs (tokens, in) with a mean and correlated, gradients (tokens, out); all float64."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    x = normal(tokens, inner) * torch.linspace(2, 0.3, inner) @ normal(inner, inner) + 2 * normal(inner)
    return normal(out, inner), x, normal(tokens, out) @ normal(out, out)


def moment(rows):
    return rows.T @ rows / len(rows)


def weighed_by(weight, x, delta, input_side, output_side):
    """The metric as the factorizer takes it, and the same as full matrices A (in, in) and G (out, out), damping included."""
    out, inner = weight.shape
    full, outputs = moment(x), moment(delta)
    given_input = {"none": None, "diagonal": full.diagonal(), "full": full}[input_side]
    a = {"none": torch.eye(inner).double(), "diagonal": torch.diag(full.diagonal()), "full": full}[input_side]
    if output_side == "none":
        return Metric(given_input), a, torch.eye(out).double()
    if output_side == "diagonal":
        return Metric(given_input, outputs.diagonal()), a, torch.diag(outputs.diagonal())
    folded = outputs if out <= inner else weight.T @ outputs @ weight
    g = outputs + OUTPUT_DAMPING * outputs.diagonal().mean() * torch.eye(out).double()
    return Metric(given_input, folded, outputs.diagonal()), a, g


def symmetric_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def slow_loss(difference, a, g):
    """`tr(G D A D^T)`, entry by entry of the two moments."""
    return float(torch.einsum("ab,bc,cd,ad->", g, difference, a, difference))


def made(factors):
    return factors.left @ factors.right


def pifa_matrix(tensors):
    """The matrix that the stored tensors stand for, in float64, row by row."""
    pivots, coefficients = tensors["pivots"].double(), tensors["coefficients"].double()
    rank = len(pivots)
    rows = [pivots[i] if i < rank else coefficients[i - rank] @ pivots for i in tensors["order"].tolist()]
    return torch.stack(rows)
