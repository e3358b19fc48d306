"""What methods share that remove columns of a reader: scores choose the units, least squares or a bias makes up for them."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Damping, GroupMethod, Kind, Shape, Sliced, Units
from paredown.compress.numerics.moments import Need
from paredown.compress.numerics.units import refitted


@dataclass(frozen=True)
class WidthMethod(GroupMethod):
    """Makes MLPs, attention or state spaces narrower. `kept` is a share of all blocks' parameters, whatever the unit."""

    # channels of MLPs; key/value heads, each with its query heads; heads of a state space or of linear attention
    unit: Literal["channels", "kv_groups", "ssm_heads"] = "channels"

    @property
    def kind(self) -> Kind:
        return self.unit


@dataclass(frozen=True)
class Scored(WidthMethod):
    """The units with the highest scores stay."""

    refit: bool = False  # least squares on the reader's columns that stay, towards the whole weight's output
    damping: Damping = 0.01  # of the refit

    reads: ClassVar[frozenset[Need]] = frozenset()  # the statistics that the scores are made of

    @abstractmethod
    def scores(self, units: Units) -> Tensor:  # (units * width,)
        """Of each column of the reader; a unit's score is the sum over its columns."""

    @property
    def needs(self) -> frozenset[Need]:
        return self.reads | ({Need.GRAM} if self.refit else frozenset())

    def unit_scores(self, units: Units) -> Tensor:  # (units,)
        """Of each unit, float64."""
        of_columns: Tensor = self.scores(units).double().unflatten(0, (-1, units.width))
        return of_columns.sum(1)

    def compress(self, units: Units, keep: int) -> Sliced:
        """The `keep` units with the highest scores; of equal ones the first. What shifts the bias reads Need.MEAN."""
        check_count(units, keep)
        scores = self.unit_scores(units)
        stay = torch.zeros_like(scores, dtype=torch.bool)
        stay[scores.sort(descending=True, stable=True).indices[:keep]] = True
        return made_up(units, stay, self.damping if self.refit else None, self.shifts)

    def working_bytes(self, shape: Shape) -> int:
        out, inner = shape
        return 16 * out * inner + (20 * inner**2 if self.refit else 0)


def check_count(units: Units, keep: int) -> None:
    """Raises PareError if a group cannot have `keep` units."""
    if not 0 < keep <= units.group.units:
        raise PareError(
            f"{units.group.name} has {units.group.units} {units.group.kind}, of which {keep} cannot stay: "
            "ask for fewer with units, or for a share with kept."
        )


def made_up(units: Units, stay: Tensor, damping: float | None, shift: bool) -> Sliced:
    """The units that `stay` (units,), the reader's weight W_S' fitted to the whole one W if a `damping` is given.

    With `shift` the bias gains W E[x] - W_S' E[x_S], what removal takes from the mean of the output; the fit is then one of
    what varies about the mean, whose moments are H - E[x] E[x]^T.
    """
    keep = stay.repeat_interleave(units.width)  # (units * width,)
    inputs, weight, gain = units.stats.inputs, None, None
    if damping is not None:
        gram = inputs.gram  # (in, in)
        if shift:
            gram.addr_(inputs.mean, inputs.mean, alpha=-1.0)
        weight = refitted(units.weight, gram, keep, damping).to(units.weight.dtype)  # (out, kept)
    if shift:
        left = units.weight[:, keep] if weight is None else weight
        gain = units.weight.double() @ inputs.mean - left.double() @ inputs.mean[keep]  # (out,)
    return Sliced(stay, weight, gain)
