"""How important each weight is: a mask keeps the highest scores."""

from torch import Tensor


def magnitude_score(weight: Tensor) -> Tensor:  # (out, in)
    """`|W|`, float32."""
    return weight.float().abs()


def wanda_score(weight: Tensor, rms: Tensor) -> Tensor:  # (out, in)
    """`|W| * ||x||`, float32; rms (in,) is the root mean square of each input. Sun et al. 2023, eq. 1 (arXiv 2306.11695)."""
    return weight.float().abs() * rms.float()


def ria_score(weight: Tensor, rms: Tensor, power: float = 0.5) -> Tensor:  # (out, in)
    """`(|W| / column sum + |W| / row sum) * ||x||^power`, float32; rms (in,) as above. Zhang et al. 2024 (ICLR 2024)."""
    size = weight.float().abs()
    columns, rows = (size.sum(dim, keepdim=True).clamp_min(1e-30) for dim in (0, 1))
    return (size / columns + size / rows) * rms.float().pow(power)
