"""What methods share that remove whole experts of a mixture: as many from every layer, those with the lowest scores."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Group, GroupMethod, Shape, Sliced


@dataclass(frozen=True)
class ExpertStats:
    """What a layer's experts gave for the tokens that the router sent to them, float64. Zero where it sent none."""

    count: Tensor  # tokens (experts,)
    norm: Tensor  # mean of |E(x)|, before the router's weight is applied (experts,)
    gated: Tensor  # mean of the router's weight times |E(x)| (experts,)


@dataclass(frozen=True)
class Experts:
    """A group of experts as a method reads it."""

    group: Group
    weights: Mapping[str, Tensor]  # all matrices of the experts, by parameter (experts, out, in)
    stats: ExpertStats | None  # None of a method that does not read it


@dataclass(frozen=True)
class ExpertMethod(GroupMethod):
    """Removes experts: `kept` is a share of them, `units` their number. The router chooses among those that stay."""

    multiple: Annotated[int, Field(ge=1)] = 1

    kind: ClassVar[Literal["channels", "experts"]] = "experts"
    of_units: ClassVar[bool] = True
    reads_outputs: ClassVar[bool] = True  # `stats` of Experts

    @abstractmethod
    def scores(self, experts: Experts) -> Tensor:
        """Of each expert (experts,). Those with the highest stay."""

    def compress(self, units: Experts, keep: int) -> Sliced:  # type: ignore[override]  # `kind` says what it gets
        """The `keep` experts with the highest scores; of equal ones the first. Raises PareError if a score is not finite."""
        scores = self.scores(units).double()
        if not bool(scores.isfinite().all()):
            raise PareError(
                f"the experts of {units.group.name} give numbers that are not finite, so that they cannot be compared: "
                "check the model, or calibrate on other text."
            )
        stay = torch.zeros_like(scores, dtype=torch.bool)
        stay[scores.sort(descending=True, stable=True).indices[:keep]] = True
        return Sliced(stay)

    def working_bytes(self, shape: Shape) -> int:
        return 0


def outputs_of(experts: Experts) -> ExpertStats:
    """The statistics of a method that reads them."""
    assert experts.stats is not None
    return experts.stats
