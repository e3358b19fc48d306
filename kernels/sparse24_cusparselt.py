"""2:4 products for many tokens by cuSPARSELt, through torch.

The order of indices in cuSPARSELt is not documented, so each weight needs a second, compressed copy in the library's own
format: 9 more bits per weight. The copy is made at the first product. torch plans each product anew, which takes more than a
millisecond of the CPU, so only products of very many tokens gain. A dispatch table chooses this path only where it was
measured to be the fastest.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from paredown.kernels import sparse24_expand

_COPIES = WeakTensorKeyDictionary()  # values -> (state of values and indices, their compressed copy)


def is_available(values: Tensor) -> bool:
    """Whether torch comes with the library and the library takes this weight. values (out, in / 2).

    It takes others too, but for parts of its tiles of 64 x 128 it reads beyond the end of their copies (compute-sanitizer,
    cuSPARSELt 0.8.0, a weight of 16 x 64).
    """
    fits = values.shape[0] % 64 == 0 and values.shape[1] % 64 == 0
    return fits and values.is_cuda and torch.backends.cusparselt.is_available()


def compressed(values: Tensor, indices: Tensor) -> Tensor:
    """The weight (out, in) in cuSPARSELt's own format. values (out, in / 2); indices (out, index_bytes(in))."""
    dense = values.new_empty(values.shape[0], 2 * values.shape[1])
    sparse24_expand.decompress(values, indices, dense)
    return torch._cslt_compress(dense)


def multiply(copy: Tensor, x: Tensor, bias: Tensor | None, algorithm: Mapping[str, int]) -> Tensor:
    """The library's product with a compressed copy. x (tokens, in); a new tensor (tokens, out)."""
    product = torch._cslt_sparse_mm(
        copy, _by_columns(x), bias, transpose_result=True, alg_id=algorithm.get("alg_id", 0),
        split_k=algorithm.get("split_k", 1), split_k_mode=algorithm.get("split_k_mode", -1),
    )  # fmt: skip
    return product[: len(x)]


def matmul(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, algorithm: Mapping[str, int] | None = None,
    compress: Callable[[Tensor, Tensor], Tensor] = compressed, product: Callable[..., Tensor] = multiply,
) -> Tensor:  # fmt: skip
    """`x @ weight.T + bias` for x (tokens, in); a new contiguous tensor (tokens, out). `algorithm`: what `searched` found.

    `compress(values, indices)` returns the copy that `product` multiplies with. It is called at the first product, and
    again after values or indices were overwritten or moved.
    """
    return product(_copy_of(values, indices, compress), x, bias, algorithm or {})


def searched(x: Tensor, values: Tensor, indices: Tensor) -> dict[str, int]:
    """The library's algorithm for a product of this size: it times them on this device. Arguments of `matmul`."""
    copy = _copy_of(values, indices, compressed)
    algorithm, split, mode, _ = torch._C._cusparselt.mm_search(copy, _by_columns(x), None, None, None, True)  # type: ignore[attr-defined]
    return {"alg_id": algorithm, "split_k": split, "split_k_mode": mode}


def _by_columns(x: Tensor) -> Tensor:  # (in, tokens): the library takes multiples of 8 tokens
    return F.pad(x, (0, 0, 0, -len(x) % 8)).t()


def _copy_of(values: Tensor, indices: Tensor, compress: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    state = _state(values), _state(indices)
    copied_state, copy = _COPIES.get(values, (None, None))
    if copied_state == state:
        return cast(Tensor, copy)
    copy = compress(values, indices)
    _COPIES[values] = state, copy
    return copy


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Changes when the tensor is overwritten or moved."""
    return tensor.device, tensor.data_ptr(), None if tensor.is_inference() else tensor._version
