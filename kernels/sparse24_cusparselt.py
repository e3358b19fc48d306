"""2:4 products for many tokens by cuSPARSELt, through torch.

cuSPARSELt does not disclose how it orders indices, so that it keeps a compressed copy of its own: 9 bits a weight more,
made at a weight's first product of this kind. A device's table chooses it only where it was measured to win.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from paredown.kernels import sparse24_expand

_COPIES = WeakTensorKeyDictionary()  # values -> (their state, the copy)


def is_available(values: Tensor) -> bool:
    """Whether this torch has the library, and it takes such a weight. values (out, in / 2)."""
    fits = values.shape[0] % 16 == 0 and values.shape[1] % 8 == 0
    return fits and values.is_cuda and torch.backends.cusparselt.is_available()


def matmul(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` for x (tokens, in); a new contiguous tensor (tokens, out)."""
    now = _state(values), _state(indices)
    made, copy = _COPIES.get(values, (None, None))
    if made != now:
        copy = _compressed(values, indices)
        _COPIES[values] = now, copy
    return F.linear(x, copy, bias).contiguous()


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Differs when other weights were loaded into a tensor, or it was moved."""
    return tensor.device, tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _compressed(values: Tensor, indices: Tensor) -> Tensor:
    from torch.sparse.semi_structured import SparseSemiStructuredTensorCUSPARSELT

    dense = values.new_empty(values.shape[0], 2 * values.shape[1])
    sparse24_expand.decompress(values, indices, dense)
    return SparseSemiStructuredTensorCUSPARSELT(
        shape=dense.shape, packed=torch._cslt_compress(dense), meta=None, packed_t=None, meta_t=None,
        compressed_swizzled_bitmask=None, fuse_transpose_cusparselt=True, requires_grad=False,
    )  # fmt: skip
