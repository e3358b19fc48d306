"""Borders between precisions: from a solver to a checkpoint, and where a shorter one loses nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
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
def exact_products(*factors: Tensor) -> Iterator[None]:
    """Inside, float32 products of numbers that these tensors hold are as exact as ever, and faster if all are bfloat16.

    Units for bfloat16 (on a CPU) and TF32 (on CUDA) keep all bits of such numbers, and sum in float32. It holds for the whole
    process, so nothing else may be multiplied meanwhile.
    """
    kind = factors[0].device.type
    if kind not in ("cpu", "cuda") or any(factor.dtype != torch.bfloat16 for factor in factors):
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


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float32, under `exact_products`."""
    with exact_products(a, b):
        return a.float() @ b.float()


def like(a: Tensor, b: Tensor) -> Tensor:
    """`a` rounded to bfloat16 where b is, for an `exact_product` with it: where a mean over tokens averages roundings out."""
    return a.to(b.dtype) if b.dtype == torch.bfloat16 else a
