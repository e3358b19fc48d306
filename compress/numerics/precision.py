"""Borders between precisions: from a solver to a checkpoint, and where a shorter one loses nothing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from paredown.compress.errors import PareError


def narrowed(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """`wide` in the checkpoint's dtype. Raises PareError where a value does not fit into it."""
    narrow = wide.to(dtype)
    if not bool(torch.isfinite(narrow.sum(dtype=torch.float32))):
        raise PareError(f"the update gave values that {dtype} cannot hold: raise damping, or try --dtype float32.")
    return narrow


@contextmanager
def short_products(kind: str) -> Iterator[None]:
    """Inside, float32 products round their factors to bfloat16 (a CPU with units for it) or TF32 (CUDA); sums are float32.

    On a device of another kind nothing changes. It holds for the whole process, so nothing else may be multiplied
    meanwhile.
    """
    if kind not in ("cpu", "cuda"):
        yield
        return
    backend: Any = torch.backends.mkldnn if kind == "cpu" else torch.backends.cuda
    settings = backend.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if kind == "cpu" else "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def exact_products(*factors: Tensor) -> AbstractContextManager[None]:
    """Inside, float32 products of numbers that these tensors hold are as exact as ever, and faster if all are bfloat16.

    Short products keep all bits of such numbers.
    """
    exact = all(factor.dtype == torch.bfloat16 for factor in factors)
    return short_products(factors[0].device.type) if exact else nullcontext()


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float32, under `exact_products`."""
    with exact_products(a, b):
        return a.float() @ b.float()


def like(a: Tensor, b: Tensor) -> Tensor:
    """`a` rounded to bfloat16 where b is, for an `exact_product` with it: where a mean over tokens averages roundings out."""
    return a.to(b.dtype) if b.dtype == torch.bfloat16 else a


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float32, but rounded to bfloat16, with its factors, where a is: for a fraction of an exact one's time."""
    return a @ like(b, a) if a.dtype == torch.bfloat16 else a.float() @ b.float()
