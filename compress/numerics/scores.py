"""How important each weight is: a mask keeps the highest scores."""

from torch import Tensor


def magnitude_score(weight: Tensor) -> Tensor:  # (out, in)
    """`|W|`, float32."""
    return weight.float().abs()


def wanda_score(weight: Tensor, rms: Tensor) -> Tensor:  # (out, in)
    """`|W| * ||x||`, float32; rms (in,) is the root mean square of each input. Sun et al. 2023, eq. 1 (arXiv 2306.11695)."""
    return weight.float().abs() * rms.float()
