"""Which windows of a text to train on: those where student and teacher disagree most, from every kind of text.

After PASER (He et al. 2025, arXiv 2502.12594), sections 3.2 and 3.3: windows are clustered by what they are about, the budget
goes to the clusters in proportion to how far the student's probabilities in them are from the teacher's, and within a cluster
to the windows where they are furthest. Here the clusters are k-means of the mean of the student's last hidden states, in the
place of an embedding model and spectral clustering; all windows cost the same, and their divergence is that of training.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from paredown.compress.text.mix import counts

ITERATIONS = 20  # of k-means
LEAST_WEIGHT = 1e-12  # of a cluster in which the two models agree


@dataclass(frozen=True)
class Choice:
    """The windows that are trained on, and where they come from, as plain data."""

    rows: list[int]
    candidates: int
    clusters: list[dict[str, Any]]  # how many windows each has, how many of them were chosen, and their mean divergence
    divergence: float  # the mean of all windows
    chosen_divergence: float

    def told(self) -> dict[str, Any]:
        """What a report says."""
        facts = asdict(self)
        return {**facts, "rows": len(self.rows)}


def chosen(divergence: Tensor, features: Tensor, clusters: int, count: int, seed: int) -> Choice:
    """`count` of the windows whose divergence is (windows,), and what they are about features (windows, hidden)."""
    labels = _clustered(features, clusters, seed)
    members = [[i for i, own in enumerate(labels) if own == label] for label in sorted(set(labels))]
    values: list[float] = divergence.double().tolist()
    means = [sum(values[i] for i in own) / len(own) for own in members]
    shares = shared(count, means, [len(own) for own in members])
    rows, told = list[int](), []
    for own, share, mean in zip(members, shares, means, strict=True):
        rows += sorted(own, key=lambda i: -values[i])[:share]
        told.append({"windows": len(own), "chosen": share, "divergence": mean})
    rows.sort()
    return Choice(rows, len(values), told, sum(values) / len(values), sum(values[i] for i in rows) / len(rows))


def shared(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """`total` divided in proportion to the weights, but of none more than `most`: what is left goes to the others."""
    found, free = [0] * len(weights), list(range(len(weights)))
    while free:
        parts = counts(total - sum(found), [max(weights[i], LEAST_WEIGHT) for i in free])
        given = dict(zip(free, parts, strict=True))
        full = [i for i in free if given[i] >= most[i]]
        for i in full or free:
            found[i] = min(given[i], most[i])
        free = [i for i in free if i not in full] if full else []
    return found


def _clustered(features: Tensor, clusters: int, seed: int) -> list[int]:
    """The number of each window's cluster; equal windows, of a text that repeats itself, are in one."""
    from scipy.cluster.vq import kmeans2

    points = features.double().cpu()
    most = min(clusters, len(points.unique(dim=0)))
    with warnings.catch_warnings(action="ignore"):  # that a cluster is empty
        labels: list[int] = kmeans2(points.numpy(), most, iter=ITERATIONS, minit="++", seed=seed)[1].tolist()
    return labels
