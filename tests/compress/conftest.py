"""A weight, its inputs and its gradients, for tests of the low-rank methods."""

import pytest
import torch

from paredown.compress.methods import build
from paredown.compress.numerics.metric import OUTPUT_DAMPING
from paredown.compress.numerics.moments import GRADIENT_NEEDS, PAIRED_NEEDS, InputStats, Need, Residual, Stats

SHAPES = {"wide": (12, 20), "tall": (20, 12)}


@pytest.fixture(scope="session")
def lowrank_problem():
    """`lowrank_problem(shape, ...)` makes a Problem."""
    return Problem


class Problem:
    """A weight (out, in), inputs of both streams (tokens, in) and gradients (tokens, out) of a few sequences.

    Inputs are small whole numbers, correlated and with a mean, so that float32 sums of their products are exact. `lost`
    (tokens, out) is what a residual stream around the layer has lost.
    """

    def __init__(self, shape="wide", tokens=240, sequences=8, seed=0, dtype=torch.float32, apart=False):
        out, inner = SHAPES[shape] if isinstance(shape, str) else shape
        draw = torch.Generator().manual_seed(seed)

        def whole(low, high, *size):
            return torch.randint(low, high + 1, size, generator=draw).float()

        self.weight = torch.randn(out, inner, generator=draw).to(dtype)
        self.dense = whole(-3, 3, tokens, inner) @ whole(-1, 1, inner, inner) + whole(-5, 5, inner)
        self.x = self.dense + whole(-3, 3, tokens, inner) + 1
        if apart:  # the compressed stream has lost its mean, so that a map without a bias cannot give it
            self.x, self.dense = self.x - self.x.mean(0).round(), self.dense + 9
        self.delta = torch.randn(tokens, out, generator=draw) @ torch.randn(out, out, generator=draw)
        self.lost = (self.x[:, :out] if out <= inner else self.x.repeat(1, 2)[:, :out]).flip(1) + whole(
            -9, 9, tokens, out
        )
        self.sequences = sequences
        self.wide = self.weight.double()
        self.second = self.x.double().T @ self.x.double() / tokens  # (in, in)
        self.mean, self.dense_mean = self.x.double().mean(0), self.dense.double().mean(0)
        self.covariance = self.second - torch.outer(self.mean, self.mean)

    @property
    def outputs(self):
        """(tokens, out)"""
        return self.x.double() @ self.wide.T

    def gradient(self):
        """Moments of the gradients per token, by loops over tokens and sequences."""
        delta, x, (out, inner) = self.delta.double(), self.x.double(), self.weight.shape
        tokens = len(x)
        moment = sum(torch.outer(d, d) for d in delta) / tokens
        fisher, per_token = torch.zeros(out, inner).double(), torch.zeros(out, inner).double()
        for begin in range(0, tokens, tokens // self.sequences):
            summed = torch.zeros(out, inner).double()
            for t in range(begin, begin + tokens // self.sequences):
                summed += torch.outer(delta[t], x[t])
                per_token += torch.outer(delta[t], x[t]) ** 2
            fisher += summed**2
        return {
            Need.OUTPUT_GRADIENT: moment if out <= inner else self.wide.T @ moment @ self.wide,
            Need.OUTPUT_GRADIENT_DIAGONAL: moment.diagonal(),
            Need.FISHER: fisher / tokens,
            Need.FISHER_ROWS: fisher.sum(1) / tokens,
            Need.FISHER_ROWS_PER_TOKEN: per_token.sum(1) / tokens,
            Need.WEIGHT_GRADIENT: delta.T @ x / tokens,
        }

    def inputs(self, method):
        """Moments of the inputs that a run collects for the method, fed in uneven batches."""
        needs = method.needs & PAIRED_NEEDS
        needs = needs if Need.GRAM in needs else needs | {Need.SECOND_MOMENT}  # which the reported error takes
        stats = InputStats(self.weight.shape[1], needs)
        for x, dense in zip(self.x.tensor_split([7, 50]), self.dense.tensor_split([7, 50]), strict=True):
            stats.update(x, dense if "cross" in method.needs else None)
        return stats

    def stats(self, method):
        """All that the method asks for of this layer."""
        return Stats(self.inputs(method), self.gradient() if method.needs & GRADIENT_NEEDS else {})

    def damped_outputs(self, share=OUTPUT_DAMPING):
        """G (out, out) with what is added for directions that no gradient saw."""
        delta = self.delta.double()
        moment = delta.T @ delta / len(delta)
        return moment + share * moment.diagonal().mean() * torch.eye(len(moment)).double()

    def residual(self):
        """As `observe_residual` finds them: what was lost, and what the dense weight makes of what the input lacks."""
        z = self.lost.double() + (self.dense - self.x).double() @ self.wide.T  # (tokens, out)
        return Residual(z.T @ self.x.double() / len(z), z.mean(0))

    def compress(self, name, **options):
        method = build(name, options)
        return method.compress(self.weight, self.stats(method))
