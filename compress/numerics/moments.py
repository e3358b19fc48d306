"""Streaming moments of one input stream. Linears that read the same input (q/k/v; gate/up) share one object."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.compress.errors import PareError

# of a layer's input
NEEDS = frozenset({"second_moment_diagonal", "gram", "mean", "absolute_mean"})
# and between the dense model's input and the compressed one's
PAIRED_NEEDS = NEEDS | {"cross"}
# and, of layers that write to the residual stream, between what that stream misses and the layer's input: collect.py
RESIDUAL_NEEDS = frozenset({"residual"})
# of the gradient of the loss with respect to a layer's output: see gradients.py
GRADIENT_NEEDS = frozenset(
    {"output_gradient", "output_gradient_diagonal", "fisher", "fisher_rows", "fisher_rows_per_token"}
)
STRIP = 512  # columns of the Gram matrix that are summed at a time: what lies above the diagonal is never computed
ROWS = 64  # tokens that are squared at a time, so that they stay in cache
ESCALATIONS = 6  # times that the damping may grow tenfold before a layer is given up


@dataclass(frozen=True)
class InverseCholesky:
    """`factor` U (in, in) float32, upper, with U^T U = (H + damping I)^-1, of the live columns; `dead` (in,) bool."""

    factor: Tensor
    dead: Tensor
    damping: float  # the fraction of the mean diagonal that was added
    escalated: bool

    def told(self, asked: float) -> str | None:
        """What the report must tell of a damping that had to be raised."""
        return f"damping raised from {asked:g} to {self.damping:g}" if self.escalated else None


class InputStats:
    """Moments of the inputs `x` (tokens, in): float32 within a batch, float64 across batches.

    `needs` names what is collected, out of NEEDS; asking for anything else raises RuntimeError. Of the Gram matrix the
    lower triangle is summed.
    """

    def __init__(self, in_features: int, needs: frozenset[str], device: torch.device | str = "cpu") -> None:
        if unknown := needs - PAIRED_NEEDS:
            raise ValueError(f"unknown statistics {sorted(unknown)}; there are {sorted(PAIRED_NEEDS)}")
        self.in_features, self.needs, self.count = in_features, needs, 0
        square = {"gram", "cross"}
        shapes = {name: (in_features, in_features) if name in square else (in_features,) for name in needs}
        if "cross" in needs:
            shapes |= {"dense_mean": (in_features,)}
        self._sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        self._factors: dict[float, InverseCholesky] = {}
        self._gradient: dict[str, Tensor] = {}

    @classmethod
    def uniform(cls, in_features: int, needs: frozenset[str], device: torch.device | str = "cpu") -> "InputStats":
        """As if every input were independent with unit variance: for layers that no token reached."""
        stats = cls(in_features, needs, device)
        stats.count = 1
        for name, total in stats._sums.items():
            if name in ("gram", "cross"):
                total.fill_diagonal_(1.0)
            elif "mean" not in name or name == "absolute_mean":
                total.fill_(1.0)
        return stats

    @torch.no_grad()
    def update(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add a batch `(..., in)`; `dense` is what the uncompressed model feeds the same layer for the same tokens.

        Raises PareError if the batch holds NaN or infinite values.
        """
        x = x.reshape(-1, self.in_features)  # (tokens, in)
        if not len(x):
            return
        squares = torch.stack([part.float().square().sum(0) for part in x.split(ROWS)]).sum(0)  # (in,)
        if not bool(torch.isfinite(squares.sum())):
            raise PareError("its inputs hold NaN or infinite values: try --dtype float32, or check the checkpoint.")
        for name, total in self._sums.items():
            if name == "gram":
                wide = x.float()  # (tokens, in)
                for i in range(0, self.in_features, STRIP):
                    total[i:, i : i + STRIP] += wide[:, i:].T @ wide[:, i : i + STRIP]
            elif name in ("cross", "dense_mean"):
                if dense is None:
                    raise ValueError("'cross' needs the dense model's inputs beside the compressed one's")
                flat = dense.reshape(-1, self.in_features).float()  # (tokens, in)
                if name == "dense_mean":
                    total += flat.sum(0)
                    continue
                wide = x.float()  # (tokens, in)
                for i in range(0, self.in_features, STRIP):
                    total[i : i + STRIP] += flat[:, i : i + STRIP].T @ wide
            else:
                total += squares if name == "second_moment_diagonal" else _BATCH_SUMS[name](x.float())
        self.count += len(x)
        self._factors.clear()

    @property
    def gram(self) -> Tensor:  # (in, in)
        """H = X^T X / tokens, float64."""
        full = self._mean("gram")
        for i in range(0, self.in_features, STRIP):  # mirrored strip by strip: a second copy would be large
            corner = full[i : i + STRIP, i : i + STRIP].tril_()
            corner += corner.tril(-1).T
            full[i : i + STRIP, i + STRIP :] = full[i + STRIP :, i : i + STRIP].T
        return full

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

    @property
    def cross(self) -> Tensor:  # (in, in)
        """E[x y^T] of the dense model's input x and the compressed one's y, float64."""
        return self._mean("cross")

    @property
    def dense_mean(self) -> Tensor:  # (in,)
        """The mean of the dense model's input; where that is not followed, of the only one."""
        return self._mean("dense_mean" if "cross" in self.needs else "mean")

    def with_gradient(self, gradient: dict[str, Tensor]) -> "InputStats":
        """The same moments, and of one layer also those of its output's gradient (by names out of GRADIENT_NEEDS)."""
        mine = copy.copy(self)
        mine._gradient = {**self._gradient, **gradient}
        return mine

    with_residual = with_gradient  # "missing" (out, in) and "missing_mean" (out,): see `collect.observe_writer`

    def has(self, name: str) -> bool:
        """Whether a moment that belongs to one layer was collected."""
        return name in self._gradient

    def gradient(self, name: str) -> Tensor:
        """`output_gradient` and the others: see `gradients.moments`. float64."""
        if name not in self._gradient:
            raise RuntimeError(f"{name!r} was not collected: add it to the method's `needs`")
        return self._gradient[name].double()

    def energy(self, rows: Tensor) -> float:
        """`tr(R H R^T)` of some rows (rows, in): the mean square of what they make of this input, summed over rows.

        Products in float32, their sum in float64. Without a Gram matrix H is its diagonal: uncorrelated inputs.
        """
        rows = rows.float()
        if "gram" not in self.needs:
            return float((rows.square() @ self.second_moment_diagonal.float()).sum(dtype=torch.float64))
        found = 0.0
        for i in range(0, self.in_features, STRIP):
            below = self._sums["gram"][i:, i : i + STRIP].tril() / max(self.count, 1)  # (in - i, strip)
            below.diagonal().mul_(0.5)  # what lies off the diagonal counts twice
            product = rows[:, i:] @ below.float()  # (rows, strip)
            found += 2 * float((product * rows[:, i : i + STRIP]).sum(dtype=torch.float64))
        return found

    def inverse_cholesky(self, damping: float = 0.01) -> InverseCholesky:
        """U upper with U^T U = (H + lambda I)^-1, lambda = damping * mean(diag H). Computed once per damping.

        Dead columns (no input ever) get H_ii = 1. Where a factorisation fails the damping grows tenfold, which the
        result tells. Factored in float64, inverted in float32. Raises PareError after ESCALATIONS failures.
        """
        if "gram" not in self.needs:
            raise RuntimeError("'gram' was not collected: add it to the method's `needs`")
        if damping not in self._factors:
            self._factors[damping] = _inverse_cholesky(self._sums["gram"], max(self.count, 1), damping)
        return self._factors[damping]

    def _mean(self, name: str) -> Tensor:
        if name not in self._sums:
            raise RuntimeError(f"{name!r} was not collected: add it to the method's `needs`")
        return self._sums[name] / max(self.count, 1)


_BATCH_SUMS = {
    "mean": lambda x: x.sum(0),
    "absolute_mean": lambda x: x.abs().sum(0),
}


def _inverse_cholesky(lower_sums: Tensor, count: int, damping: float) -> InverseCholesky:
    used = damping
    for attempt in range(ESCALATIONS + 1):
        # reversed, so that its ordinary lower factor gives the upper one of H; transposed, because LAPACK works on
        # columns and then factors in place. Of both only the lower triangle is read.
        hessian = lower_sums.T.flip(0, 1).div_(count)  # (in, in)
        diagonal = hessian.diagonal()  # (in,)
        dead, mean = diagonal == 0, diagonal.mean()
        diagonal.add_(used * mean)
        diagonal[dead] = 1.0
        failed = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(hessian, out=(hessian, failed))
        if not failed:
            # H = V V^T with V = L reversed, upper, and U = V^-1 = L^-1 reversed
            lower = hessian.float()
            del hessian, diagonal
            _invert_lower_(lower)
            if bool(torch.isfinite(lower.sum())):
                return InverseCholesky(lower.flip(0, 1), dead.flip(0), used, attempt > 0)
        used = max(used, 1e-8) * 10
    raise PareError(
        f"the Hessian cannot be factored even with damping {used / 10:g} of its mean diagonal. "
        "Calibrate on more text, or use a method without second-order updates (wanda)."
    )


def _invert_lower_(lower: Tensor, leaf: int = 256) -> None:
    """Invert a lower triangular matrix in place, by halves: a third of the operations of solving for the identity.

    [[A, 0], [C, D]]^-1 = [[A^-1, 0], [-D^-1 C A^-1, D^-1]].
    """
    size = len(lower)
    if size <= leaf:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = size // 2
    first, last, corner = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    solved = torch.linalg.solve_triangular(last, corner, upper=False)  # (rest, half)
    corner.copy_(torch.linalg.solve_triangular(first, solved, upper=False, left=False).neg_())
    _invert_lower_(first, leaf)
    _invert_lower_(last, leaf)
