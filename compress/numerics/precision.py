"""From the precision of a solver to that of a checkpoint."""

import torch
from torch import Tensor

from paredown.compress.errors import PareError


def narrowed(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """`wide` in the checkpoint's dtype. Raises PareError where a value does not fit into it."""
    narrow = wide.to(dtype)
    if not bool(torch.isfinite(narrow.sum(dtype=torch.float32))):
        raise PareError(f"the update gave values that {dtype} cannot hold: raise damping, or try --dtype float32.")
    return narrow
