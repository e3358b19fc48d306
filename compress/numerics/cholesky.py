"""The upper factor U of an inverse Hessian, U^T U = (H + damping I)^-1, from which OBS solvers read their updates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.compress.errors import PareError

ESCALATIONS = 6  # how often the damping may grow tenfold before the layer fails


@dataclass(frozen=True)
class InverseCholesky:
    """`factor` U (in, in) float32, upper; `dead` (in,) bool: columns whose input was always zero."""

    factor: Tensor
    dead: Tensor
    damping: float  # the fraction of the mean diagonal that was added
    asked: float  # the one that was asked for

    @property
    def escalated(self) -> bool:
        """Whether the damping had to be raised."""
        return self.damping != self.asked

    @property
    def fallback(self) -> str | None:
        """What the report says of a damping that had to be raised."""
        return f"damping raised from {self.asked:g} to {self.damping:g}" if self.escalated else None


def inverse_cholesky(lower_sums: Tensor, count: int, damping: float) -> InverseCholesky:
    """Factor H = lower_sums / count (in, in), float64, of which only the lower triangle is read.

    Dead columns get H_ii = 1. Where the factorisation fails, the damping grows tenfold, and the result says so. Factored
    in float64, inverted in float32. Raises PareError after ESCALATIONS failures.
    """
    used = damping
    for _ in range(ESCALATIONS + 1):
        # flipped, so that its lower factor, flipped back, is an upper factor of H; transposed, because LAPACK works on
        # columns and can then factor in place. Only lower triangles are read.
        hessian = lower_sums.T.flip(0, 1).div_(count)  # (in, in)
        diagonal = hessian.diagonal()  # (in,)
        dead, mean = diagonal == 0, diagonal.mean()
        diagonal.add_(used * mean)
        diagonal[dead] = 1.0
        failed = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(hessian, out=(hessian, failed))
        if not failed:
            # H = V V^T, where V is L flipped, and U = V^-1 is L^-1 flipped
            lower = hessian.float()
            del hessian, diagonal
            invert_lower_(lower)
            if bool(torch.isfinite(lower.sum())):
                return InverseCholesky(lower.flip(0, 1), dead.flip(0), used, damping)
        used = max(used, 1e-8) * 10
    raise PareError(
        f"the Hessian cannot be factored even with damping {used / 10:g} of its mean diagonal. "
        "Calibrate on more text, or use a method without second-order updates (wanda)."
    )


def invert_lower_(lower: Tensor, leaf: int = 256) -> None:
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
    invert_lower_(first, leaf)
    invert_lower_(last, leaf)
