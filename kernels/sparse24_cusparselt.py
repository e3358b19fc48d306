"""2:4 products for many tokens by cuSPARSELt, through torch.

cuSPARSELt does not disclose how it orders indices, so that it keeps a compressed copy of its own: 9 bits a weight more,
made at a weight's first product of this kind. A device's table chooses it only where it was measured to win.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from paredown.kernels import sparse24_expand

_COPIES = WeakTensorKeyDictionary()


def is_available(rows: int, columns: int) -> bool:
    """Whether this torch has the library, and it takes weights of this shape."""
    return torch.backends.cusparselt.is_available() and rows % 16 == 0 and columns % 16 == 0


def matmul(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` for x (tokens, in); a new contiguous tensor (tokens, out)."""
    if values not in _COPIES:
        _COPIES[values] = _compressed(values, indices)
    return F.linear(x, _COPIES[values], bias).contiguous()


def _compressed(values: Tensor, indices: Tensor) -> Tensor:
    from torch.sparse.semi_structured import SparseSemiStructuredTensorCUSPARSELT

    dense = values.new_empty(values.shape[0], 2 * values.shape[1])
    sparse24_expand.decompress(values, indices, dense)
    return SparseSemiStructuredTensorCUSPARSELT(
        shape=dense.shape, packed=torch._cslt_compress(dense), meta=None, packed_t=None, meta_t=None,
        compressed_swizzled_bitmask=None, fuse_transpose_cusparselt=True, requires_grad=False,
    )  # fmt: skip
