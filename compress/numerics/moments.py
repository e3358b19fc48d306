"""Statistics of a layer's inputs and outputs: moments summed batch by batch, under the names that methods ask for."""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.numerics.admm import UnitMoment
from paredown.compress.numerics.cholesky import InverseCholesky, inverse_cholesky
from paredown.compress.numerics.masked_least_squares import damped_gram
from paredown.compress.numerics.precision import exact_products

STRIP = 512  # columns of the Gram matrix that are summed at a time; what lies above the diagonal is not computed
ROWS_AT_ONCE = 1024  # of a weight, whose energy is taken together
TOKENS_AT_ONCE = 64  # squared together, so that they stay in cache

Labels = Literal[
    "data", "sampled"
]  # gradients of the text's own next tokens (empirical Fisher), or of the model's draws


class Need(StrEnum):
    """A statistic of one layer that a method can ask for: a mean over the tokens that reach the layer."""

    SECOND_MOMENT = "second_moment_diagonal"  # E[x^2] (in,)
    GRAM = "gram"  # E[x x^T] (in, in); holds the second moment too
    MEAN = "mean"  # E[x] (in,)
    ABSOLUTE_MEAN = "absolute_mean"  # E|x| (in,)
    # of each window's tokens first, then over windows, each of which weighs as many as it has tokens
    WINDOW_MEAN = "window_mean"  # E[(mean |x|)^2] (in,); of wider vectors |x| is the norm
    WINDOW_NORM = "window_norm"  # E[(mean x^2)^(1/2)] (in,)
    CROSS = "cross"  # E[x y^T] (in, in) of the dense model's input x and the compressed one's y, and E[x]
    RESIDUAL = "residual"  # of layers that write to the residual stream: see Residual
    # moments of the gradient of the loss at the layer's output: see survey/gradients.py
    OUTPUT_GRADIENT = "output_gradient"
    OUTPUT_GRADIENT_DIAGONAL = "output_gradient_diagonal"
    FISHER = "fisher"
    FISHER_ROWS = "fisher_rows"
    FISHER_ROWS_PER_TOKEN = "fisher_rows_per_token"
    WEIGHT_GRADIENT = "weight_gradient"


INPUT_NEEDS = frozenset(
    {Need.SECOND_MOMENT, Need.GRAM, Need.MEAN, Need.ABSOLUTE_MEAN, Need.WINDOW_MEAN, Need.WINDOW_NORM}
)
PAIRED_NEEDS = INPUT_NEEDS | {Need.CROSS}
GRADIENT_NEEDS = frozenset(
    {
        Need.OUTPUT_GRADIENT,
        Need.OUTPUT_GRADIENT_DIAGONAL,
        Need.FISHER,
        Need.FISHER_ROWS,
        Need.FISHER_ROWS_PER_TOKEN,
        Need.WEIGHT_GRADIENT,
    }
)


def gradients_read(needs: frozenset[Need]) -> frozenset[Need]:
    """Which moments of output gradients are collected for these needs: a solver reads the diagonal beside the whole."""
    read = needs & GRADIENT_NEEDS
    return read | {Need.OUTPUT_GRADIENT_DIAGONAL} if Need.OUTPUT_GRADIENT in read else read


class NotCollected(RuntimeError):
    """A method read a statistic that it had not asked for."""

    def __init__(self, need: str) -> None:
        super().__init__(f"{str(need)!r} was not collected: add it to the method's `needs`")


class InputStats:
    """Moments of the inputs `x` (tokens, in): float32 within a batch, float64 across batches.

    `needs`, a subset of PAIRED_NEEDS, says what is collected; reading anything else raises NotCollected. Linears with the
    same input (q/k/v; gate/up) share one object. Of the Gram matrix only the lower triangle is summed. `vector` entries side
    by side are one vector, such as the output of an attention head. Means come in `precision`, by default float64.
    """

    precision = torch.float64

    def __init__(
        self, in_features: int, needs: frozenset[Need], device: torch.device | str = "cpu", vector: int = 1
    ) -> None:
        if unknown := needs - PAIRED_NEEDS:
            raise ValueError(
                f"unknown statistics: {', '.join(sorted(unknown))}. Known: {', '.join(sorted(PAIRED_NEEDS))}."
            )
        self.in_features, self.needs, self.vector, self.count = in_features, needs, vector, 0
        shapes = _shapes(in_features, needs)
        self._sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        self._factors: dict[float, InverseCholesky] = {}
        self._units: dict[float, UnitMoment] = {}

    @classmethod
    def uniform(cls, in_features: int, needs: frozenset[Need], device: torch.device | str = "cpu") -> "InputStats":
        """As if every input were independent with mean zero and unit variance: for layers that no token reached."""
        stats = cls(in_features, needs, device)
        stats.count = 1
        for name, total in stats._sums.items():
            if total.dim() == 2:
                total.fill_diagonal_(1.0)
            elif name in INPUT_NEEDS - {Need.MEAN}:
                total.fill_(1.0)
        return stats

    @classmethod
    def from_sums(cls, count: int, sums: Mapping[str, Tensor]) -> "InputStats":
        """From sums over `count` tokens, by need; CROSS comes with the sum DENSE_MEAN of the dense model's inputs."""
        example = next(iter(sums.values()))
        needs = frozenset(Need(name) for name in sums if name != DENSE_MEAN)
        stats = cls(example.shape[-1], needs, example.device)
        stats.count = count
        for name, total in stats._sums.items():
            total.copy_(sums[name])
        return stats

    @staticmethod
    def bytes(in_features: int, needs: frozenset[Need]) -> int:
        """How many bytes the sums of one input take: 8 a number."""
        return 8 * sum(torch.Size(shape).numel() for shape in _shapes(in_features, needs & PAIRED_NEEDS).values())

    @torch.no_grad()
    def update(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add a batch (..., in); `dense` (..., in) are the dense model's inputs of this layer for the same tokens.

        Of a batch (..., tokens, in) each (tokens, in) is a window. Raises PareError for NaN and infinite values.
        """
        tokens = x.shape[-2] if x.dim() > 1 else 1  # of a window
        x = x.reshape(-1, self.in_features)  # (tokens, in)
        if not len(x):
            return
        squares = torch.stack([part.float().square().sum(0) for part in x.split(TOKENS_AT_ONCE)]).sum(0)  # (in,)
        if not bool(torch.isfinite(squares.sum())):
            raise PareError("its inputs hold NaN or infinite values: try --dtype float32, or check the checkpoint.")
        for name, total in self._sums.items():
            if name == Need.SECOND_MOMENT:
                total += squares
            elif name == Need.GRAM:
                wide = x.float()  # (tokens, in)
                with exact_products(x):
                    for i in range(0, self.in_features, STRIP):
                        total[i:, i : i + STRIP] += wide[:, i:].T @ wide[:, i : i + STRIP]
            elif name == Need.MEAN:
                total += x.float().sum(0)
            elif name == Need.ABSOLUTE_MEAN:
                total += x.float().abs().sum(0)
            elif name == Need.WINDOW_MEAN:
                sizes = x.float().unflatten(1, (-1, self.vector)).norm(dim=2)  # (tokens, vectors)
                means = tokens * sizes.unflatten(0, (-1, tokens)).mean(1).square().sum(0)
                total += means.repeat_interleave(self.vector)
            elif name == Need.WINDOW_NORM:
                total += tokens * x.float().square().unflatten(0, (-1, tokens)).mean(1).sqrt().sum(0)
            else:
                self._add_dense(name, total, x, dense)
        self.count += len(x)
        self._factors.clear()
        self._units.clear()

    def _add_dense(self, name: str, total: Tensor, x: Tensor, dense: Tensor | None) -> None:
        if dense is None:
            raise ValueError("'cross' needs the dense model's inputs beside the compressed one's")
        flat = dense.reshape(-1, self.in_features).float()  # (tokens, in)
        if name == DENSE_MEAN:
            total += flat.sum(0)
            return
        wide = x.float()  # (tokens, in)
        with exact_products(x, dense):
            for i in range(0, self.in_features, STRIP):
                total[i : i + STRIP] += flat[:, i : i + STRIP].T @ wide

    @property
    def gram(self) -> Tensor:  # (in, in)
        """H = E[x x^T]."""
        full = self._mean(Need.GRAM)
        for i in range(0, self.in_features, STRIP):  # mirrored strip by strip: a second copy would be large
            corner = full[i : i + STRIP, i : i + STRIP].tril_()
            corner += corner.tril(-1).T
            full[i : i + STRIP, i + STRIP :] = full[i + STRIP :, i : i + STRIP].T
        return full

    @property
    def second_moment_diagonal(self) -> Tensor:  # (in,)
        """E[x^2], float64."""
        if Need.GRAM in self.needs:
            return self._sums[Need.GRAM].diagonal() / max(self.count, 1)
        return self._mean(Need.SECOND_MOMENT)

    @property
    def rms(self) -> Tensor:  # (in,)
        """Root of E[x^2], float64."""
        return self.second_moment_diagonal.sqrt()

    @property
    def mean(self) -> Tensor:  # (in,)
        """E[x]."""
        return self._mean(Need.MEAN)

    @property
    def absolute_mean(self) -> Tensor:  # (in,)
        """E|x|."""
        return self._mean(Need.ABSOLUTE_MEAN)

    @property
    def window_mean(self) -> Tensor:  # (in,)
        """E[(mean |x|)^2], the mean over a window's tokens and the expectation over windows.

        |x| is the norm of the vector that an entry lies in.
        """
        return self._mean(Need.WINDOW_MEAN)

    @property
    def window_norm(self) -> Tensor:  # (in,)
        """E[(mean x^2)^(1/2)], the mean over a window's tokens and the expectation over windows."""
        return self._mean(Need.WINDOW_NORM)

    @property
    def cross(self) -> Tensor:  # (in, in)
        """E[x y^T] of the dense model's input x and the compressed one's y."""
        return self._mean(Need.CROSS)

    @property
    def dense_mean(self) -> Tensor:  # (in,)
        """E[x] of the dense model's input; without CROSS there is one input, and this is its mean."""
        return self._mean(DENSE_MEAN if Need.CROSS in self.needs else Need.MEAN)

    def energy(self, rows: Tensor, minus: Tensor | None = None) -> float:
        """`tr(R H R^T)` of some rows R (rows, in), or of `rows - minus`: their products' mean square, summed over rows.

        Products in float32, their sum in float64. Without a Gram matrix H is diagonal, as of uncorrelated inputs.
        """
        total = 0.0
        for start, strip in self._strips():
            for i in range(0, len(rows), ROWS_AT_ONCE):
                part = rows[i : i + ROWS_AT_ONCE, start:].float()
                if minus is not None:
                    part = part - minus[i : i + ROWS_AT_ONCE, start:].float()
                own = part[:, : strip.shape[-1]]
                product = own * strip if strip.dim() == 1 else part @ strip
                total += float((product * own).sum(dtype=torch.float64))
        return total

    def _strips(self) -> Iterator[tuple[int, Tensor]]:
        """Where each strip of columns begins, and H there, float32: on and below the diagonal, doubled below it."""
        if Need.GRAM not in self.needs:
            yield 0, self.second_moment_diagonal.float()
            return
        for i in range(0, self.in_features, STRIP):
            below = self._sums[Need.GRAM][i:, i : i + STRIP].float() * (2 / max(self.count, 1))  # (in - i, strip)
            below[:STRIP].tril_().diagonal().mul_(0.5)
            yield i, below

    def inverse_cholesky(self, damping: float = 0.01) -> InverseCholesky:
        """U upper with U^T U = (H + damping * mean(diag H) I)^-1: see `cholesky`. Computed once per damping."""
        if Need.GRAM not in self.needs:
            raise NotCollected(Need.GRAM)
        if damping not in self._factors:
            self._factors[damping] = inverse_cholesky(self._sums[Need.GRAM], max(self.count, 1), damping)
        return self._factors[damping]

    def unit_moment(self, damping: float) -> UnitMoment:
        """Of H as `damped_gram` damps it. Computed once per damping, for all layers of this input and all sparsities."""
        if damping not in self._units:
            self._units[damping] = UnitMoment(damped_gram(self.gram, damping))
        return self._units[damping]

    def _mean(self, name: str) -> Tensor:
        if name not in self._sums:
            raise NotCollected(name)
        return self._sums[name].to(self.precision, copy=True).div_(max(self.count, 1))

    def at(self, precision: torch.dtype) -> "InputStats":
        """The same sums, whose means are given in another precision."""
        other = copy(self)
        other.precision = precision
        return other


@dataclass(frozen=True)
class Residual:
    """By how much the compressed residual stream falls short of the dense one at a layer that writes to it, float64.

    z is the dense residual stream minus the compressed one, after the dense weight's output was added to each; y is the
    layer's input in the compressed model.
    """

    missing: Tensor  # E[z y^T] (out, in)
    missing_mean: Tensor  # E[z] (out,)


@dataclass(frozen=True)
class Stats:
    """All statistics of one layer. Reading one that was not collected raises NotCollected."""

    inputs: InputStats
    gradients: Mapping[Need, Tensor] = field(default_factory=dict)  # moments of the gradient at its output
    residual: Residual | None = None  # of layers that write to the residual stream, if it was asked for
    # of some tokens, by batch: inputs (tokens, in), and gradients of the summed loss at the output (tokens, out)
    pairs: Sequence[tuple[Tensor, Tensor]] = ()

    def gradient(self, need: Need) -> Tensor:
        """One of GRADIENT_NEEDS, in the precision of the inputs. Shapes: see survey/gradients.py."""
        if need not in self.gradients:
            raise NotCollected(need)
        return self.gradients[need].to(self.inputs.precision)

    def at(self, precision: torch.dtype) -> "Stats":
        """The same, given in another precision than float64."""
        residual = self.residual
        if residual:
            residual = Residual(residual.missing.to(precision), residual.missing_mean.to(precision))
        return replace(self, inputs=self.inputs.at(precision), residual=residual)

    def with_gradients(self, gradients: Mapping[Need, Tensor]) -> "Stats":
        """The same with further moments of the output's gradient."""
        return replace(self, gradients={**self.gradients, **gradients})


def uniform_gradients(needs: frozenset[Need], weight: Tensor) -> dict[Need, Tensor]:
    """Moments of output gradients as if every output of a weight (out, in) counted alike: where none was measured."""
    out, inner = weight.shape
    eye = torch.eye(out, dtype=torch.float64, device=weight.device)
    moments = {
        Need.OUTPUT_GRADIENT: eye if out <= inner else weight.double().T @ weight.double(),
        Need.OUTPUT_GRADIENT_DIAGONAL: eye.diagonal(),
        Need.FISHER: torch.ones_like(weight, dtype=torch.float64),
        Need.FISHER_ROWS: eye.diagonal(),
        Need.FISHER_ROWS_PER_TOKEN: eye.diagonal(),
        Need.WEIGHT_GRADIENT: -weight.double(),  # every weight is worth its size: none should come nearer to zero
    }
    asked = needs | ({Need.OUTPUT_GRADIENT_DIAGONAL} if Need.OUTPUT_GRADIENT in needs else set())
    return {need: moments[need] for need in asked & GRADIENT_NEEDS}


DENSE_MEAN = "dense_mean"  # the sum that comes with CROSS


def _shapes(in_features: int, needs: frozenset[Need]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for need in needs:
        shapes[need] = (in_features, in_features) if need in (Need.GRAM, Need.CROSS) else (in_features,)
        if need == Need.CROSS:
            shapes[DENSE_MEAN] = (in_features,)
    return shapes
