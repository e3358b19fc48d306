"""Model folding: channels that are alike become one, without data. Wang et al. 2025 (arXiv 2502.10216).

k-means over channels, each a vector of its rows in the writers and its columns in the reader; a cluster becomes one channel
with the mean of the rows and the sum of the columns, C W and W' C^T with C = U (U^T U)^-1 U^T for the clusters U. The paper
also restores variances of batch norms, which language models have none of.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Shape, Sliced, Units, register
from paredown.compress.methods.structured.width import WidthMethod, check_count
from paredown.compress.numerics.clusters import kmeans


@register("fold")
@dataclass(frozen=True)
class Fold(WidthMethod):
    seed: int = 0  # of the first centres

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "channels":
            raise PareError(
                f"fold makes one unit of several that are alike, which {self.kind} do not allow: leave unit out, or name "
                "paredown_width, which removes them."
            )

    def compress(self, units: Units, keep: int) -> Sliced:
        check_count(units, keep)
        count = units.group.units
        products = torch.zeros(count, count, dtype=torch.float64, device=units.weight.device)
        for rows in _vectors(units):
            products += rows @ rows.T
        labels = kmeans(products, keep, self.seed)  # (units,)
        into = _first_of_each(labels, keep)[labels]
        stay = torch.zeros(count, dtype=torch.bool, device=labels.device)
        stay[into] = True
        columns = units.weight.double().unflatten(1, (count, units.width))  # (out, units, width)
        summed = torch.zeros_like(columns).index_add_(1, into, columns)[:, stay]
        return Sliced(stay, summed.flatten(1).to(units.weight.dtype), into=into)

    def working_bytes(self, shape: Shape) -> int:
        out, inner = shape
        return 28 * inner**2 + 16 * out * inner


def _vectors(units: Units) -> Iterator[Tensor]:
    """What describes each unit: its rows in each writer (units, width * in), and its columns in the reader, float64."""
    count = units.group.units
    for name, writer in units.writers.items():
        for part in units.group.parts:
            if part.name.startswith(f"{name}.") and not part.name.endswith(".bias"):
                yield writer[part.first : part.first + count * part.width].double().reshape(count, -1)
    yield units.weight.T.double().reshape(count, -1)


def _first_of_each(labels: Tensor, count: int) -> Tensor:  # (count,)
    """The first unit with each label."""
    first = torch.full((count,), len(labels), device=labels.device)
    return first.scatter_reduce_(0, labels, torch.arange(len(labels), device=labels.device), "amin")
