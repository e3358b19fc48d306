"""Merge a low-rank update into a weight without changing the form in which that is stored.

A mask multiplies the update: Munoz et al. 2024, SQFT (arXiv 2410.03750). A chain of smaller weights takes the best
approximation of weight + update of the rank that it has, in the plain Frobenius norm: no inputs are seen, which could weigh
it. A mask beside factors takes what its places can of the error that the factors leave.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.compress.numerics.factorize import Factors
from paredown.compress.numerics.metric import Metric
from paredown.compress.numerics.pifa import pivoted
from paredown.compress.numerics.precision import narrowed
from paredown.compress.storage.kinds import kind_of
from paredown.compress.storage.masked import kept_places, mask_kind, spread, values_at
from paredown.compress.storage.spec import Spec
from paredown.kernels.lowrank import pifa_left


@dataclass(frozen=True)
class Update:
    """What is added to a weight (out, in): `up @ down`, (out, r) and (r, in), the adapter's scale in `up`."""

    up: Tensor
    down: Tensor

    @classmethod
    def joined(cls, updates: "list[Update]") -> "Update":
        """The sum of several."""
        return cls(torch.cat([u.up for u in updates], 1), torch.cat([u.down for u in updates], 0))

    def to(self, device: torch.device) -> "Update":
        """On a device."""
        return Update(self.up.to(device), self.down.to(device))

    def dense(self) -> Tensor:  # (out, in)
        return self.up @ self.down

    @property
    def energy(self) -> float:
        """Sum of its squares."""
        up, down = self.up.double(), self.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum())


@dataclass(frozen=True)
class Lost:
    """Sums of squares: of updates, of what mask or rank left out of them, and of that with the rounding to the dtype."""

    update: float = 0.0
    form: float = 0.0
    written: float = 0.0

    def __add__(self, other: "Lost") -> "Lost":
        return Lost(self.update + other.update, self.form + other.form, self.written + other.written)

    def share(self, part: float) -> float:
        """The norm of a part relative to the update's."""
        return float((part / self.update) ** 0.5) if self.update > 0 else 0.0


@torch.no_grad()
def merge_dense(weight: Tensor, update: Update, keep: Tensor | None = None) -> tuple[Tensor, Lost]:
    """Weight (out, in) + update, in the weight's dtype; where `keep` is False the weight stays as it is.

    Raises PareError for a sum that the dtype cannot hold.
    """
    change = update.dense()
    kept = change if keep is None else change * keep
    exact = weight.float() + kept
    result = narrowed(exact, weight.dtype)
    left = _energy(change - kept)
    return result, Lost(update.energy, left, _energy(weight.float() + change - result.float()))


@torch.no_grad()
def merge_packed(spec: Spec, tensors: Mapping[str, Tensor], update: Update) -> tuple[dict[str, Tensor], Lost]:
    """The stored tensors of weight + update, of the same spec: masks, ranks and shapes stay as they are.

    spec: of one weight (out, in). Raises PareError for numbers that the dtype cannot hold.
    """
    by = _chain if mask_kind(spec.kind) is None else _masked if spec.rank is None else _sum
    result, exact = by(spec, tensors, update)
    new = {**tensors, **result}
    aim = _dense(spec, tensors) + update.dense().to(exact.dtype)
    return new, Lost(update.energy, _energy(aim - exact), _energy(aim - _dense(spec, new)))


def _masked(spec: Spec, tensors: Mapping[str, Tensor], update: Update) -> tuple[dict[str, Tensor], Tensor]:
    """W + M * (B A); before rounding it is the second result."""
    keep = kept_places(spec.kind, tensors, spec.shape)  # (out, in)
    exact = _dense(spec, tensors) + update.dense() * keep
    values = values_at(spec.kind, exact, keep)
    return {"values": narrowed(values, tensors["values"].dtype)}, exact


def _chain(spec: Spec, tensors: Mapping[str, Tensor], update: Update) -> tuple[dict[str, Tensor], Tensor]:
    """The best matrix of the same rank, as the kind stores one; before rounding it is the second result."""
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    assert spec.rank is not None
    left, right = CHAINS[spec.kind](tensors)
    rows, sizes, columns = truncated_sum(left, right, update, spec.rank)
    root = sizes.sqrt()
    exact = (rows * sizes @ columns).float()
    if spec.kind == "pifa":
        parts = pivoted(Factors(rows * sizes, columns, sizes.square()), Metric(), dtype)
    elif spec.kind == "cur":
        parts = {"columns": rows * root, "link": torch.eye(spec.rank).to(rows), "rows": root[:, None] * columns}
    else:
        parts = {"left": rows * root, "right": root[:, None] * columns}
    new = {name: narrowed(part, dtype) if part.is_floating_point() else part for name, part in parts.items()}
    return {name: part.contiguous() for name, part in new.items()}, exact


def _sum(spec: Spec, tensors: Mapping[str, Tensor], update: Update) -> tuple[dict[str, Tensor], Tensor]:
    """S + M * E beside the factors of (L R + B A) at the same rank, with E what those leave; before rounding."""
    factors, low = _chain(
        Spec("lowrank", spec.shape, rank=spec.rank), {n: tensors[n] for n in ("left", "right")}, update
    )
    keep = kept_places(spec.kind, tensors, spec.shape)  # (out, in)
    before = tensors["left"].float() @ tensors["right"].float() + update.dense()
    old = spread(spec.kind, tensors, tensors["values"], spec.shape).float()
    sparse = old + (before - low) * keep
    values = narrowed(values_at(spec.kind, sparse, keep), tensors["values"].dtype)
    return {"values": values, **factors}, sparse + low


def truncated_sum(left: Tensor, right: Tensor, update: Update, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The singular vectors (out, rank), values (rank,) and vectors (rank, in) of `left @ right + update`, float64.

    The sum has a rank of no more than k + r, so that a decomposition of that size between two QRs is enough.
    """
    rows, upper = torch.linalg.qr(torch.cat([left.double(), update.up.double()], 1))  # (out, k + r)
    columns, lower = torch.linalg.qr(torch.cat([right.double(), update.down.double()], 0).T)  # (in, k + r)
    inner, sizes, outer = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return rows @ inner[:, :rank], sizes[:rank], outer[:rank] @ columns.T


def _lowrank(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return tensors["left"], tensors["right"]


def _pifa(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return pifa_left(tensors["coefficients"], tensors["order"]), tensors["pivots"]


def _cur(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return tensors["columns"].double() @ tensors["link"].double(), tensors["rows"]


CHAINS = {"lowrank": _lowrank, "pifa": _pifa, "cur": _cur}  # kind -> its weight as two factors


def _dense(spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor:  # (out, in) float32
    wide = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    return kind_of(spec.kind).unpack(wide, spec.shape)


def _energy(tensor: Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))
