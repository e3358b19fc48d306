"""What all low-rank methods share: how much is asked for, and the way from two weightings to a stored weight."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.numerics.edits import LowRank
from paredown.compress.numerics.factorize import (
    Factors,
    Metric,
    Target,
    balanced,
    cost,
    factorize,
    largest_rank,
    pivoted,
    rank_step,
    spectrum,
)
from paredown.compress.numerics.moments import InputStats
from paredown.compress.numerics.sweep import narrowed

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
ASKED = ("kept", "rank", "energy", "target_parameters")


@dataclass(frozen=True)
class Factorized:
    """A method is a subclass that says which moments weigh the error; at most one of the first four options is given."""

    kept: Share | None = None  # of the targeted parameters
    rank: Count | None = None  # of every layer
    energy: Share | None = None  # of each layer's loss in the method's own metric that must not be lost
    target_parameters: Count | None = None  # of the whole model
    storage: Literal["factors", "pifa"] = "factors"

    allocation: ClassVar[str] = "uniform"  # strategy, where the recipe names none
    kept_unasked: ClassVar[float | None] = 0.8  # None: it has a rule of its own for each layer's rank
    predicts: ClassVar[bool] = True  # whether `losses` are those of what it makes

    def __post_init__(self) -> None:
        asked = [name for name in ASKED if getattr(self, name) is not None]
        if len(asked) > 1:
            raise PareError(f"{' and '.join(asked)} say how much is kept in different ways: give one of them.")

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that `metric`, `target` and `shift` read."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        return "lowrank" if self.storage == "factors" else "pifa"

    @property
    def adds_bias(self) -> bool:
        return False

    @property
    def asked(self) -> bool:
        """Whether the recipe says how much is kept."""
        return any(getattr(self, name) is not None for name in ASKED)

    @property
    def share(self) -> float | None:
        """The fraction of the targeted parameters that is asked for, if that is how it is asked."""
        return None if self.rank or self.energy or self.target_parameters else self.kept or self.kept_unasked

    def with_share(self, kept: float) -> "Factorized":
        return replace(self, kept=kept, rank=None, energy=None, target_parameters=None)

    def with_rank(self, rank: int) -> "Factorized":
        return replace(self, kept=None, rank=rank, energy=None, target_parameters=None)

    def metric(self, stats: InputStats) -> Metric:
        """How an error of the weight is weighed."""
        raise NotImplementedError

    def target(self, weight: Tensor, stats: InputStats) -> Target:
        return Target(weight.double())

    def shift(self, weight: Tensor, made: Tensor, stats: InputStats) -> Tensor | None:
        """What the bias must take up, (out,), given the weight and what stands for it, (out, in) float64."""
        return None

    def largest(self, shape: tuple[int, int], numbers: float) -> int:
        """The largest rank that stores at most so many numbers, 0 if there is none."""
        return largest_rank(self.kind, shape, numbers, self.adds_bias)

    def numbers(self, shape: tuple[int, int], rank: int) -> int:
        return cost(self.kind, shape, rank, self.adds_bias)

    def planned_rank(self, shape: tuple[int, int]) -> int | None:
        """The rank that a weight of this shape gets, 0 where it stays dense, None where only the data can tell."""
        if self.rank is None and self.share is None:
            return None
        size = shape[0] * shape[1]
        rank = self.rank or self.largest(shape, (self.share or 0) * size)
        if not rank:
            raise PareError(
                f"{[*shape]}: not even rank 1 fits into {self.share:g} of it. Raise kept, or skip it with targets.skip."
            )
        return rank if rank <= min(shape) and self.numbers(shape, rank) < size else 0

    def spec(self, shape: tuple[int, int], element_size: int) -> dict[str, Any] | None:
        """How such a weight will be stored; None where it stays dense, or where only the data can tell."""
        rank = self.planned_rank(shape)
        return {"kind": self.kind, "shape": [*shape], "rank": rank, "bias": self.adds_bias} if rank else None

    def losses(self, weight: Tensor, stats: InputStats) -> Tensor:
        """All squared singular values, largest first: the loss at rank k is the sum of those past the k-th."""
        return spectrum(self.target(weight, stats), self.metric(stats))

    def compress(self, weight: Tensor, stats: InputStats) -> LowRank | None:
        """None where factors would store no less than the weight."""
        if self.planned_rank((weight.shape[0], weight.shape[1])) == 0:
            return None
        target, metric = self.target(weight, stats), self.metric(stats)
        edit = self.approximate(target, metric, weight.dtype)
        if edit is None:
            return None
        made = dense64(edit, weight.dtype)
        loss = target.lost(target.seen(made, metric), metric) / max(target.dropped(metric), 1e-300)
        return replace(edit, shift=self.shift(weight, made, stats), loss=loss)

    def approximate(self, target: Target, metric: Metric, dtype: torch.dtype) -> LowRank | None:
        """The best that the rank allows; None where factors would store no less. Without its loss and shift."""
        shape = (target.weight.shape[0], target.weight.shape[1])
        factors = factorize(target, metric, lambda losses: self._choose(shape, losses))
        if not factors.rank:
            return None
        return LowRank(self.kind, shape, factors.rank, self.store(factors, metric, dtype))

    def store(self, factors: Factors, metric: Metric, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors to write. Narrowed from float64 here and nowhere else."""
        if self.kind == "pifa":
            tensors = pivoted(factors, metric, dtype)
        else:
            tensors = dict(zip(("left", "right"), balanced(factors), strict=True))
        return {name: narrowed(t, dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    def _choose(self, shape: tuple[int, int], losses: Tensor) -> int:
        planned = self.planned_rank(shape)
        if planned is not None:
            return planned
        if self.energy is None:
            raise PareError("target_parameters counts the whole model: it is turned into ranks by the pipeline.")
        held = losses.cumsum(0)
        step = rank_step(shape)
        rank = step * (int((held < self.energy * held[-1]).sum()) // step + 1)
        return rank if rank <= len(losses) and self.numbers(shape, rank) < shape[0] * shape[1] else 0


def dense64(edit: LowRank, dtype: torch.dtype) -> Tensor:  # (out, in)
    """What stands for the weight, float64. Raises PareError where the product overflows."""
    return narrowed(edit.dense(), dtype).double()


def centred(stats: InputStats) -> Tensor:  # (in, in)
    """The covariance of the input, float64."""
    return stats.gram.addr_(stats.mean, stats.mean, alpha=-1.0)


def affine_shift(weight: Tensor, made: Tensor, stats: InputStats) -> Tensor:  # (out,)
    """`W E[x] - W' E[y]`: with it the mean output is the dense model's."""
    return weight.double() @ stats.dense_mean - made @ stats.mean
