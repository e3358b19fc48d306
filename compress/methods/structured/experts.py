"""What methods share that remove whole experts of a mixture: as many from every layer, those with the lowest scores."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Group, GroupMethod, Kind, Shape, Sliced


@dataclass(frozen=True)
class ExpertStats:
    """What a layer's experts gave for the tokens that the router sent to them, float64. Zero where it sent none."""

    count: Tensor  # tokens (experts,)
    norm: Tensor  # mean of |E(x)|, before the router's weight is applied (experts,)
    gated: Tensor  # mean of the router's weight times |E(x)| (experts,)
    # sums over all tokens of products of two experts' router logits (experts, experts); None unless the method reads them
    logits: Tensor | None = None


@dataclass(frozen=True)
class Experts:
    """A group of experts as a method reads it."""

    group: Group
    weights: Mapping[str, Tensor]  # all matrices of the experts, by parameter (experts, out, in)
    stats: ExpertStats | None  # None of a method that does not read it
    # what each hidden channel of an expert has in each part of `group.inner`: (experts, channels, ...) views
    channels: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Merged(Sliced):
    """Experts that go become part of one that stays, `into`; what chooses among them is only sliced."""

    weights: Tensor = field(kw_only=True)  # how much each counts in the mean (experts,)
    # place -> hidden channel, of each expert, before it is merged (experts, channels)
    order: Tensor = field(kw_only=True)


@dataclass(frozen=True)
class Fit:
    """How the last matrices of the experts that stay are fitted to what the whole mixture gave."""

    damping: float  # relative to the mean square of a hidden channel, as the router weighs it
    rounds: int  # steps, each of which is a pass over the calibration text


@dataclass(frozen=True)
class ExpertMethod(GroupMethod):
    """Removes experts: `kept` is a share of them, `units` their number. The router chooses among those that stay."""

    multiple: Annotated[int, Field(ge=1)] = 1

    of_units: ClassVar[bool] = True
    reads_outputs: ClassVar[bool] = True  # `stats` of Experts
    reads_logits: ClassVar[bool] = False  # `logits` of these
    merges: ClassVar[bool] = False  # what `compress` gives is Merged: `channels` of Experts are known

    @property
    def kind(self) -> Kind:
        return "experts"

    @property
    def fit(self) -> Fit | None:
        """None: the experts that stay are not fitted."""
        return None

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
