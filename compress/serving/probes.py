"""Find out where an engine's own code puts each row and column of a weight, by letting it load numbers that say so.

Engines join weights, cut them among devices and sort their rows by head, each family in its own way. A probe is a matrix like
the weight in which each number names its own place; what was loaded then tells which part of which weight it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.compress.errors import PareError

BITS = 23  # of a row and of a column: with five of the matrix float64 holds them exactly
MARK = 0.5  # added to each: a number that was calculated with has lost it
UNFILLED = torch.nan


@dataclass(frozen=True)
class Place:
    """Some rows and columns of a matrix, in the order in which they are wanted; None: all of them as they are."""

    matrix: int
    rows: Tensor | None
    columns: Tensor | None


def probe(matrix: int, out: int, inner: int) -> Tensor:
    """(out, inner) float64: numbers that name this matrix (0 to 31), the row and the column."""
    if max(out, inner) >= 1 << BITS or matrix >= 32:
        raise PareError(
            f"a weight {[out, inner]}, or {matrix + 1} of them in one layer, is more than can be served packed."
        )
    rows = torch.arange(out, dtype=torch.float64, device="cpu") + (matrix << BITS)
    return rows[:, None] * (1 << BITS) + torch.arange(inner, dtype=torch.float64, device="cpu") + MARK


def is_filled(loaded: Tensor) -> bool:
    """Whether every number was loaded."""
    return not bool(loaded.isnan().any())


def places(loaded: Tensor, shapes: list[tuple[int, ...]]) -> list[Place]:
    """What a loaded matrix is made of, from the top down; `shapes` are those of the matrices whose probes were loaded.

    Raises PareError if it is not made of whole rows of them with the same columns, or was calculated with.
    """
    first = loaded[:, 0].long()
    matrices, rows = first >> (2 * BITS), (first >> BITS) & ((1 << BITS) - 1)
    columns = loaded[0].long() & ((1 << BITS) - 1)
    expected = (first >> BITS).double()[:, None] * (1 << BITS) + columns.double() + MARK
    kinds, counts = matrices.unique_consecutive(return_counts=True)
    parts = list(zip(kinds.tolist(), rows.split(counts.tolist()), strict=True))
    known = all(
        m < len(shapes) and int(own.max()) < shapes[m][0] and int(columns.max()) < shapes[m][1] for m, own in parts
    )
    if not torch.equal(loaded, expected) or len(kinds) != len(kinds.unique()) or not known:
        raise PareError("its loader does more than move whole rows and columns")
    return [Place(m, _unless_all(own, shapes[m][0]), _unless_all(columns, shapes[m][1])) for m, own in parts]


def _unless_all(indices: Tensor, size: int) -> Tensor | None:
    return None if torch.equal(indices, torch.arange(size, device=indices.device)) else indices
