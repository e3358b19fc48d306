"""2:4 products for many tokens by cuSPARSELt, through torch.

The order of indices in cuSPARSELt is not documented, so each weight needs a second, compressed copy in the library's own
format: 9 more bits per weight. The copy is made at the first product. A dispatch table chooses this path only where it was
measured to be the fastest.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from paredown.kernels import sparse24_expand

_COPIES = WeakTensorKeyDictionary()  # values -> (state of values and indices, their compressed copy)


def is_available(values: Tensor) -> bool:
    """Whether torch comes with the library and the library accepts this weight. values (out, in / 2)."""
    fits = values.shape[0] % 16 == 0 and values.shape[1] % 8 == 0
    return fits and values.is_cuda and torch.backends.cusparselt.is_available()


def compressed(values: Tensor, indices: Tensor) -> Tensor:
    """The weight (out, in) in cuSPARSELt's own format. values (out, in / 2); indices (out, index_bytes(in))."""
    from torch.sparse.semi_structured import SparseSemiStructuredTensorCUSPARSELT

    dense = values.new_empty(values.shape[0], 2 * values.shape[1])
    sparse24_expand.decompress(values, indices, dense)
    return SparseSemiStructuredTensorCUSPARSELT(
        shape=dense.shape, packed=torch._cslt_compress(dense), meta=None, packed_t=None, meta_t=None,
        compressed_swizzled_bitmask=None, fuse_transpose_cusparselt=True, requires_grad=False,
    )  # fmt: skip


def matmul(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None,
    compress: Callable[[Tensor, Tensor], Tensor] = compressed,
) -> Tensor:  # fmt: skip
    """`x @ weight.T + bias` for x (tokens, in); a new contiguous tensor (tokens, out).

    `compress(values, indices)` returns the copy that F.linear multiplies with. It is called at the first product, and again
    after values or indices were overwritten or moved.
    """
    state = _state(values), _state(indices)
    copied_state, copy = _COPIES.get(values, (None, None))
    if copied_state != state:
        copy = compress(values, indices)
        _COPIES[values] = state, copy
    return F.linear(x, copy, bias).contiguous()


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Changes when the tensor is overwritten or moved."""
    return tensor.device, tensor.data_ptr(), None if tensor.is_inference() else tensor._version
