"""Slow and plain forms that the low-rank tests compare with."""

import torch

SHAPES = {"wide": (12, 20), "tall": (20, 12)}


def truncated(matrix, rank):
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def close(edit, wanted, within=2e-5):
    torch.testing.assert_close(edit.dense().double(), wanted, rtol=0, atol=within * float(wanted.abs().max()))


def mean_square(rows):
    return float(rows.square().sum(1).mean())


def rank_beside_a_bias(shape, rank, storage):
    """The largest rank that together with a bias stores at most what `rank` stores without; 0 if there is none."""
    most = numbers_by_hand(shape, rank, storage, False)
    return max((k for k in range(1, rank + 1) if numbers_by_hand(shape, k, storage, True) <= most), default=0)


def numbers_by_hand(shape, rank, storage, bias):
    out, inner = shape
    return rank * (out + inner) - (rank * rank if storage == "pifa" else 0) + (out if bias else 0)
