"""Streaming moments of one input stream. Linears that read the same input (q/k/v; gate/up) share one object."""

from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.compress.errors import PareError

NEEDS = frozenset({"second_moment_diagonal", "gram", "mean", "absolute_mean"})
ESCALATIONS = 6  # times that the damping may grow tenfold before a layer is given up


@dataclass(frozen=True)
class InverseCholesky:
    """`factor` U (in, in) float32, upper, with U^T U = (H + damping I)^-1, of the live columns; `dead` (in,) bool."""

    factor: Tensor
    dead: Tensor
    damping: float  # the fraction of the mean diagonal that was added
    escalated: bool


class InputStats:
    """Moments of the inputs `x` (tokens, in): float32 within a batch, float64 across batches.

    `needs` names what is collected, out of NEEDS; asking for anything else raises RuntimeError.
    """

    def __init__(self, in_features: int, needs: frozenset[str], device: torch.device | str = "cpu") -> None:
        if unknown := needs - NEEDS:
            raise ValueError(f"unknown statistics {sorted(unknown)}; there are {sorted(NEEDS)}")
        self.in_features, self.needs, self.count = in_features, needs, 0
        shapes = {name: (in_features, in_features) if name == "gram" else (in_features,) for name in needs}
        self._sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        self._factors: dict[float, InverseCholesky] = {}

    @classmethod
    def uniform(cls, in_features: int, needs: frozenset[str], device: torch.device | str = "cpu") -> "InputStats":
        """As if every input were independent with unit variance: for layers that no token reached."""
        stats = cls(in_features, needs, device)
        stats.count = 1
        for name, total in stats._sums.items():
            if name == "gram":
                total.fill_diagonal_(1.0)
            elif name != "mean":
                total.fill_(1.0)
        return stats

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add a batch `(..., in)`. Raises PareError if it holds NaN or infinite values."""
        x = x.reshape(-1, self.in_features)  # (tokens, in)
        if not len(x):
            return
        wide = x.float()
        added = {name: _BATCH_SUMS[name](wide) for name in self.needs}
        if not all(bool(torch.isfinite(total.sum())) for total in added.values()):
            raise PareError("its inputs hold NaN or infinite values: try --dtype float32, or check the checkpoint.")
        for name, total in added.items():
            self._sums[name] += total
        self.count += len(x)
        self._factors.clear()

    @property
    def gram(self) -> Tensor:  # (in, in)
        """H = X^T X / tokens, float64."""
        return self._mean("gram")

    @property
    def second_moment_diagonal(self) -> Tensor:  # (in,)
        """E[x^2], float64."""
        if "gram" in self.needs:
            return self._sums["gram"].diagonal() / max(self.count, 1)
        return self._mean("second_moment_diagonal")

    @property
    def rms(self) -> Tensor:  # (in,)
        """Root of E[x^2], float64."""
        return self.second_moment_diagonal.sqrt()

    @property
    def mean(self) -> Tensor:  # (in,)
        return self._mean("mean")

    @property
    def absolute_mean(self) -> Tensor:  # (in,)
        return self._mean("absolute_mean")

    def inverse_cholesky(self, damping: float = 0.01) -> InverseCholesky:
        """U upper with U^T U = (H + lambda I)^-1, lambda = damping * mean(diag H). Computed once per damping.

        Dead columns (no input ever) get H_ii = 1. Where a factorisation fails the damping grows tenfold, which the
        result tells. Factored in float64, returned in float32. Raises PareError after ESCALATIONS failures.
        """
        if damping not in self._factors:
            self._factors[damping] = _inverse_cholesky(self.gram, damping)
        return self._factors[damping]

    def _mean(self, name: str) -> Tensor:
        if name not in self._sums:
            raise RuntimeError(f"{name!r} was not collected: add it to the method's `needs`")
        return self._sums[name] / max(self.count, 1)


_BATCH_SUMS = {
    "second_moment_diagonal": lambda x: x.square().sum(0),
    "gram": lambda x: x.T @ x,
    "mean": lambda x: x.sum(0),
    "absolute_mean": lambda x: x.abs().sum(0),
}


def _inverse_cholesky(hessian: Tensor, damping: float) -> InverseCholesky:
    dead = hessian.diagonal() == 0  # (in,)
    mean = hessian.diagonal().mean()
    used = damping
    for attempt in range(ESCALATIONS + 1):
        damped = hessian.clone()
        damped.diagonal().add_(used * mean)
        damped.diagonal()[dead] = 1.0
        # H = V V^T with V upper: the ordinary lower factor of H with rows and columns reversed. Then U = V^-1.
        reversed_lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            upper = _triangular_inverse(reversed_lower.flip(0, 1))  # (in, in)
            if bool(torch.isfinite(upper.sum())):
                return InverseCholesky(upper.float(), dead, used, attempt > 0)
        used = max(used, 1e-8) * 10
    raise PareError(
        f"the Hessian cannot be factored even with damping {used / 10:g} of its mean diagonal. "
        "Calibrate on more text, or use a method without second-order updates (wanda)."
    )


def _triangular_inverse(upper: Tensor, leaf: int = 512) -> Tensor:
    """Inverse of an upper triangular matrix by halves: three times fewer operations than solving for the identity."""
    size = len(upper)
    if size <= leaf:
        eye = torch.eye(size, dtype=upper.dtype, device=upper.device)
        solved: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
        return solved
    half = size // 2
    first, last = _triangular_inverse(upper[:half, :half], leaf), _triangular_inverse(upper[half:, half:], leaf)
    inverse = torch.zeros_like(upper)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -(first @ upper[:half, half:]) @ last  # (half, rest)
    return inverse
