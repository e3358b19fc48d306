"""What all low-rank methods share: how much is kept, and how factors are computed and stored in a given metric."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import fsum, nan
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Budget, Choice, Shape, Share, WeightMethod
from paredown.compress.numerics.edits import Factored
from paredown.compress.numerics.factorize import (
    STEP,
    Factors,
    balanced,
    cost,
    factorize,
    largest_rank,
    outlined,
    rank_step,
    spectrum,
)
from paredown.compress.numerics.metric import Metric, Target
from paredown.compress.numerics.moments import InputStats, Need, Stats
from paredown.compress.numerics.pifa import pivoted
from paredown.compress.numerics.precision import narrowed
from paredown.compress.storage.spec import Spec

Count = Annotated[int, Field(ge=1)]
ASKED = ("kept", "rank", "energy", "target_parameters")


@dataclass(frozen=True)
class Factorized(WeightMethod):
    """A method is a subclass that says in `metric` how errors are weighed. At most one of the first four options is given."""

    kept: Share | None = None  # of the targeted parameters
    rank: Count | None = None  # of every layer
    energy: Share | None = None  # the share of each layer's energy, in the method's own metric, that must be kept
    target_parameters: Count | None = None  # of the whole model
    storage: Literal["factors", "pifa"] = "factors"
    rank_multiple: Count = STEP  # ranks of large weights are multiples of it, as kernels like them

    chain = True
    strategy = "uniform"
    # `kept` where no option says how much; None: the method has its own rule for ranks
    default_kept: ClassVar[float | None] = 0.8

    def __post_init__(self) -> None:
        asked = [name for name in ASKED if getattr(self, name) is not None]
        if len(asked) > 1:
            raise PareError(f"{' and '.join(asked)} say how much is kept in different ways: give one of them.")

    @property
    def precision(self) -> torch.dtype:
        """Of its moments and decompositions."""
        return torch.float64

    @property
    def kind(self) -> str:
        """The kind in which its factors are stored."""
        return "lowrank" if self.storage == "factors" else "pifa"

    @property
    def adds_bias(self) -> bool:
        """Whether every layer gets a bias, which then counts among the numbers kept."""
        return False

    @property
    def asked(self) -> bool:
        """Whether the recipe says how much is kept."""
        return any(getattr(self, name) is not None for name in ASKED)

    @property
    def share(self) -> float | None:
        """The share of the targeted parameters to keep; None if it is asked for in another way."""
        return None if self.rank or self.energy or self.target_parameters else self.kept or self.default_kept

    @property
    def budget(self) -> Budget:
        return Budget(self.share, self.target_parameters, self.asked, by_data=self.energy is not None)

    def own_option(self, weight: Tensor, stats: Stats) -> int | None:
        return self._rank_for((weight.shape[0], weight.shape[1]), self.losses(weight, stats)) or None

    def at(self, option: int) -> "Factorized":
        return replace(self, kept=None, rank=option, energy=None, target_parameters=None)

    @property
    def surveyed(self) -> "Factorized":
        return replace(self, kept=None, rank=None, energy=None, target_parameters=None)

    def metric(self, stats: Stats) -> Metric:
        """How errors of the weight are weighed."""
        raise NotImplementedError

    def target(self, weight: Tensor, stats: Stats) -> Target:
        """The matrix to approximate, by default the weight (out, in)."""
        return Target(weight.to(stats.inputs.precision))

    def shift(self, weight: Tensor, low: Tensor, stats: Stats) -> Tensor | None:
        """What the bias gains, (out,) float64, given the weight and its approximation `low` (out, in) float64."""
        return None

    def numbers(self, shape: Shape, rank: int) -> int:
        """How many numbers a weight (out, in) of this rank stores."""
        return cost(self.kind, shape, rank, self.adds_bias)

    def planned_rank(self, shape: Shape) -> int | None:
        """The rank of a weight (out, in); 0 if it stays dense, None if only the data can tell.

        Raises PareError if not even rank 1 fits.
        """
        if self.rank is None and self.share is None:
            return None
        size = shape[0] * shape[1]
        rank = self.rank or largest_rank(self.kind, shape, (self.share or 0) * size, self.adds_bias, self.rank_multiple)
        if not rank:
            raise PareError(
                f"{[*shape]}: not even rank {rank_step(shape, self.rank_multiple)} fits into {self.share:g} of it. "
                "Raise kept, or skip it with targets.skip; ranks of large weights are multiples of rank_multiple."
            )
        return rank if rank <= min(shape) and self.numbers(shape, rank) < size else 0

    def expect(self, shape: Shape, element_size: int) -> Spec | None:
        rank = self.planned_rank(shape)
        return Spec(self.kind, shape, rank=rank, bias=self.adds_bias) if rank else None

    def working_bytes(self, shape: Shape) -> int:
        """Copies of the weight, of a moment of its smaller side, and of the input's moment; a decomposition's float64."""
        out, inner = shape
        needs = self.needs
        # regression adds its target and the correction; two forms are compared if one has a bias
        copies = 4 + 2 * (Need.CROSS in needs) + (Need.MEAN in needs)
        held = copies * out * inner + 4 * min(shape) ** 2
        if Need.GRAM in needs:  # one to read, one that regression factors in place
            held += (1 + (Need.CROSS in needs)) * inner * inner
        if Need.CROSS in needs and Need.RESIDUAL not in needs:
            # its sums and a copy; with RESIDUAL the widest layer writes to the residual stream, without a cross moment
            held += 2 * inner * inner
        return self.precision.itemsize * held + 24 * min(shape) ** 2

    def losses(self, weight: Tensor, stats: Stats) -> Tensor:
        """All squared singular values, largest first: the loss at rank k is the sum of those past the k-th."""
        stats = stats.at(self.precision)
        return spectrum(self.target(weight, stats), self.metric(stats))

    def choices(self, shape: Shape, weight: Tensor | None = None, stats: Stats | None = None) -> list[Choice]:
        """Every multiple of its step at which less is stored than the dense weight."""
        if weight is None or stats is None:
            return self._choices(shape, [nan] * min(shape))
        return self._choices(shape, self.losses(weight, stats).tolist())

    def _choices(self, shape: Shape, losses: Sequence[float]) -> list[Choice]:
        tail = fsum(losses)
        choices = [Choice(0, tail, None)]
        for rank, loss in enumerate(losses, 1):
            tail = max(tail - loss, 0.0)
            if rank % rank_step(shape, self.rank_multiple):
                continue
            numbers = self.numbers(shape, rank)
            if numbers >= shape[0] * shape[1]:
                break
            choices.append(Choice(numbers, tail, rank))
        return choices

    def compress(self, weight: Tensor, stats: Stats) -> Factored | None:
        """None if factors would store no less than the weight."""
        if self.planned_rank((weight.shape[0], weight.shape[1])) == 0:
            return None
        stats = stats.at(self.precision)
        target, metric = self.target(weight, stats), self.metric(stats)
        edit = self.approximate(target, metric, weight.dtype)
        if edit is None:
            return None
        low = rounded(edit, weight.dtype).to(self.precision)
        loss = target.error_of(target.projected(low, metric), metric) / max(target.error_of_zero(metric), 1e-300)
        return replace(edit, shift=self.shift(weight, low, stats), loss=loss, aim=target.aim)

    def approximate(self, target: Target, metric: Metric, dtype: torch.dtype) -> Factored | None:
        """The best factors, still without loss and shift; None if they would store no less than the weight."""
        shape = (target.weight.shape[0], target.weight.shape[1])
        factors = factorize(target, metric, lambda losses: self._rank_for(shape, losses))
        if not factors.rank:
            return None
        parts, spectrum = self.store(factors, metric, dtype), outlined(factors.losses, factors.rank)
        return Factored(self.kind, shape, factors.rank, parts, spectrum=spectrum)

    def store(self, factors: Factors, metric: Metric, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors to store, rounded from float64 to `dtype`. Raises PareError where a value does not fit into it."""
        if self.kind == "pifa":
            tensors = pivoted(factors, metric, dtype)
        else:
            tensors = dict(zip(("left", "right"), balanced(factors), strict=True))
        return {name: narrowed(t, dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    def _rank_for(self, shape: Shape, losses: Tensor) -> int:
        planned = self.planned_rank(shape)
        if planned is not None:
            return planned
        if self.energy is None:
            raise PareError("target_parameters counts the whole model: the pipeline turns it into ranks.")
        energies = losses.cumsum(0)
        step = rank_step(shape, self.rank_multiple)
        rank = step * (int((energies < self.energy * energies[-1]).sum()) // step + 1)
        return rank if rank <= len(losses) and self.numbers(shape, rank) < shape[0] * shape[1] else 0


def rounded(edit: Factored, dtype: torch.dtype) -> Tensor:  # (out, in)
    """The approximation as the checkpoint holds it. Raises PareError if the product overflows `dtype`."""
    return narrowed(edit.dense(), dtype)


def centred(inputs: InputStats) -> Tensor:  # (in, in)
    """The covariance of the input, float64."""
    return inputs.gram.addr_(inputs.mean, inputs.mean, alpha=-1.0)


def affine_shift(weight: Tensor, low: Tensor, inputs: InputStats) -> Tensor:  # (out,)
    """`W E[x] - W' E[y]`, float64: with it the mean output is that of the dense model."""
    return weight.double() @ inputs.dense_mean - low @ inputs.mean
