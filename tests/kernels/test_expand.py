"""Dense weights of masked ones: exact, with the dense weight's gradient at the kept places, and traceable."""

import pytest
import torch

from paredown.kernels.bitmap import kept_values, pack_bitmap
from paredown.kernels.expand import bitmap_dense, sparse24_dense
from paredown.kernels.sparse24 import kept24, pack24

SHAPES = [(6, 8), (5, 132), (3, 4, 20)]


def packed(kind, shape, dtype=torch.float64):
    """A weight, its mask, its values, and the function that makes the dense weight of these."""
    weight = torch.randn(shape, dtype=dtype)
    if kind == "sparse24":
        keep = (torch.rand(*shape[:-1], shape[-1] // 4, 4).argsort(-1) < 2).reshape(shape)
        values, indices = pack24(weight, keep)
        return weight, keep, values, lambda v: sparse24_dense(v, indices), lambda d: kept24(d, indices)
    keep = torch.rand(shape) < 0.4
    values, bitmap = pack_bitmap(weight, keep)
    return weight, keep, values, lambda v: bitmap_dense(v, bitmap, shape[-1]), lambda d: kept_values(d, bitmap)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["sparse24", "bitmap"])
def test_a_kept_value_gets_the_gradient_of_its_place_in_the_dense_weight(kind, shape):
    weight, keep, values, dense, kept = packed(kind, shape)
    values.requires_grad_()
    assert torch.equal(dense(values), weight * keep)
    outward = torch.randn(shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad(dense(values), values, outward)
    assert torch.equal(grad, kept(outward)) and torch.equal(dense(grad), outward * keep)
    assert torch.autograd.gradcheck(dense, values)


@pytest.mark.parametrize("kind", ["sparse24", "bitmap"])
def test_the_operators_are_what_they_say_to_torch(kind):
    _, _, values, dense, _ = packed(kind, (6, 8), torch.float32)
    op = torch.ops.paredown.sparse24_dense if kind == "sparse24" else torch.ops.paredown.bitmap_dense
    index = dense.__closure__[0].cell_contents
    torch.library.opcheck(
        op, (values.requires_grad_(), index) if kind == "sparse24" else (values.requires_grad_(), index, 8)
    )


def test_a_weight_without_a_kept_value_has_an_empty_gradient():
    values, bitmap = pack_bitmap(torch.randn(3, 5), torch.zeros(3, 5, dtype=torch.bool))
    values.requires_grad_()
    bitmap_dense(values, bitmap, 5).sum().backward()
    assert values.grad.shape == (0,)
