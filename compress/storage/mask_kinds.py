"""Weights of which a mask keeps some values: 2 of every 4, or any."""

from typing import ClassVar

import torch
from torch import Tensor

from paredown.compress.storage.kind import Dtypes, Mask, Parts, Sizes, Tensors
from paredown.compress.storage.spec import Spec
from paredown.kernels import bitmap as bitmaps
from paredown.kernels import expand, ops
from paredown.kernels import sparse24 as sparse24s


class Sparse24(Mask):
    """2 of every 4 weights along the input, and the position of each in 2 bits."""

    tensors: ClassVar[Dtypes] = {"values": None, "indices": torch.uint8}
    joins = True

    @staticmethod
    def pack(weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
        values, indices = sparse24s.pack24(weight, keep)
        return {"values": values, "indices": indices}

    @staticmethod
    def sizes(spec: Spec) -> Sizes:
        shape, values = spec.shape, spec.values or 0
        *rows, inner = shape
        if inner % 4 or 2 * values != spec.size:
            raise ValueError(f"2:4 of {[*shape]} stores half of its weights and needs an input divisible by 4")
        return {"values": (*rows, inner // 2), "indices": (*rows, sparse24s.index_bytes(inner))}

    @staticmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return expand.sparse24_dense(tensors["values"], tensors["indices"])

    @staticmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None, ranks: Parts = None, outs: Parts = None) -> Tensor:
        return ops.sparse24_matmul(x, tensors["values"], tensors["indices"], bias)

    @staticmethod
    def fault(tensors: Tensors, shape: tuple[int, ...]) -> str | None:
        bad = sparse24s.count_invalid24(tensors["indices"])
        return f"indices: {bad} groups name no pair of columns" if bad else None


class Bitmap(Mask):
    """Any mask: one bit for each weight, and the kept values one after another."""

    tensors: ClassVar[Dtypes] = {"values": None, "bitmap": torch.uint8}
    joins = True

    @staticmethod
    def pack(weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
        values, bitmap = bitmaps.pack_bitmap(weight, keep)
        return {"values": values, "bitmap": bitmap}

    @staticmethod
    def sizes(spec: Spec) -> Sizes:
        shape, values = spec.shape, spec.values or 0
        if not 0 <= values <= spec.size:
            raise ValueError(f"a weight of {[*shape]} cannot keep {values} values")
        return {"values": (values,), "bitmap": (*shape[:-1], -(-shape[-1] // 8))}

    @staticmethod
    def unpack(tensors: Tensors, shape: tuple[int, ...]) -> Tensor:
        return expand.bitmap_dense(tensors["values"], tensors["bitmap"], shape[-1])

    @staticmethod
    def matmul(x: Tensor, tensors: Tensors, bias: Tensor | None, ranks: Parts = None, outs: Parts = None) -> Tensor:
        return ops.bitmap_matmul(x, tensors["values"], tensors["bitmap"], bias, tensors.get("starts"))

    @staticmethod
    def derive(tensors: Tensors) -> dict[str, Tensor]:
        return {"starts": bitmaps.row_starts(tensors["bitmap"])} if tensors["bitmap"].is_cuda else {}

    @staticmethod
    def starts(tensors: Tensors) -> list[int]:
        return [0, *bitmaps.count_bits(tensors["bitmap"]).sum(-1).cumsum(0).tolist()]

    @staticmethod
    def fault(tensors: Tensors, shape: tuple[int, ...]) -> str | None:
        bitmap, stored = tensors["bitmap"], tensors["values"].numel()
        marked = int(bitmaps.count_bits(bitmap).sum())
        if marked != stored:
            return f"bitmap: marks {marked} weights, and {stored} values are stored"
        if shape[-1] % 8 and bool((bitmap[..., -1] >> (shape[-1] % 8)).any()):
            return f"bitmap: marks columns past the last of {shape[-1]}"
        return None
