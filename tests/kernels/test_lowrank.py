"""Factors, PIFA and CUR: their products and dense weights, compared with loops in float64."""

import pytest
import torch

from paredown.kernels import lowrank
from paredown.kernels.lowrank import cur_dense, cur_matmul, lowrank_dense, lowrank_matmul, pifa_dense, pifa_matmul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {"lowrank": (lowrank_matmul, lowrank_dense), "pifa": (pifa_matmul, pifa_dense), "cur": (cur_matmul, cur_dense)}
# (out, in, rank): odd, tall, wide, rank 1, full rank, a single number
SHAPES = [(7, 5, 3), (13, 4, 2), (3, 17, 2), (6, 9, 1), (5, 11, 5), (4, 4, 4), (1, 1, 1)]

kinds = pytest.mark.parametrize("kind", KINDS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def factors(kind, shape, dtype, seed=0):
    out, inner, rank = shape
    draw = torch.Generator().manual_seed(seed)
    sizes = {
        "lowrank": [(out, rank), (rank, inner)],
        "pifa": [(rank, inner), (out - rank, rank)],
        "cur": [(out, rank), (rank, rank), (rank, inner)],
    }[kind]
    tensors = [torch.randn(size, generator=draw).to(dtype) for size in sizes]
    return [*tensors, torch.randperm(out, generator=draw).int()] if kind == "pifa" else tensors


def product(a, b, size=float):
    """a @ b, number by number; `size=abs` sums absolute values."""
    a, b = a.double().tolist(), b.double().tolist()
    columns = len(b[0]) if b else 0
    rows = [[sum(size(x) * size(b[k][j]) for k, x in enumerate(row)) for j in range(columns)] for row in a]
    return torch.tensor(rows, dtype=torch.float64).view(len(a), columns)


def slow_weight(kind, parts, size=float):
    """The weight (out, in) that the parts stand for, in float64 loops."""
    if kind == "lowrank":
        return product(*parts, size)
    if kind == "cur":
        return product(product(parts[0], parts[1], size), parts[2], size)
    pivots, coefficients, order = parts
    rows = pivots.double().tolist() if size is float else pivots.double().abs().tolist()
    rows += product(coefficients, pivots, size).tolist()
    return torch.tensor([rows[place] for place in order.tolist()], dtype=torch.float64)


def slow_matmul(kind, x, parts, bias, size=float):
    """x (tokens, in) times the transposed weight, plus bias; `size=abs` gives the scale of rounding errors."""
    y = product(x, slow_weight(kind, parts, size).T.contiguous(), size)
    return y if bias is None else y + (bias.double() if size is float else bias.double().abs())


def check(kind, x, parts, bias, dtype):
    y = KINDS[kind][0](x, *parts, bias)
    out = len(slow_weight(kind, parts))
    assert y.dtype == dtype and y.shape == (*x.shape[:-1], out)
    flat = x.reshape(-1, x.shape[-1])
    wrong = (y.reshape(-1, out).double() - slow_matmul(kind, flat, parts, bias)).abs()
    # every step of the chain rounds once to dtype
    assert (wrong <= 3 * torch.finfo(dtype).eps * slow_matmul(kind, flat, parts, bias, abs) + 1e-30).all()


@kinds
@shapes
@dtypes
@pytest.mark.parametrize("biased", [False, True])
def test_a_chain_is_the_product_written_out(kind, shape, dtype, biased):
    torch.manual_seed(1)
    x, bias = torch.randn(6, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype) if biased else None
    check(kind, x, factors(kind, shape, dtype), bias, dtype)


@kinds
@dtypes
@pytest.mark.parametrize("tokens", [(), (1,), (2, 3), (2, 1, 4)], ids=str)
def test_any_leading_dimensions_are_kept(kind, dtype, tokens):
    torch.manual_seed(2)
    check(kind, torch.randn(*tokens, 5).to(dtype), factors(kind, (7, 5, 3), dtype), torch.randn(7).to(dtype), dtype)


@kinds
@dtypes
def test_no_token_gives_no_output(kind, dtype):
    y = KINDS[kind][0](torch.zeros(2, 0, 5, dtype=dtype), *factors(kind, (7, 5, 3), dtype))
    assert y.shape == (2, 0, 7) and y.dtype == dtype


@kinds
@dtypes
def test_inputs_need_not_be_contiguous(kind, dtype):
    torch.manual_seed(3)
    parts, bias = factors(kind, (7, 5, 3), dtype), torch.randn(7).to(dtype)
    transposed, strided = torch.randn(5, 6).to(dtype).T, torch.randn(4, 3, 10).to(dtype)[::2, :, ::2]
    for x in (transposed, strided, torch.randn(1, 5).to(dtype).expand(6, 5)):
        assert not x.is_contiguous()
        check(kind, x, parts, bias, dtype)
    check(kind, strided, [p.t().contiguous().t() if p.dim() == 2 else p for p in parts], bias, dtype)


@kinds
@shapes
@dtypes
def test_the_dense_weight_is_the_product_rounded_once(kind, shape, dtype):
    parts = factors(kind, shape, dtype)
    dense, wanted = KINDS[kind][1](*parts), slow_weight(kind, parts)
    assert dense.dtype == dtype and dense.shape == shape[:2]
    single = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * wanted.abs()
    summed = 3 * torch.finfo(torch.float32).eps * slow_weight(kind, parts, abs)
    assert ((dense.double() - wanted).abs() <= single + summed + 1e-30).all()


@shapes
@dtypes
def test_pivot_rows_come_back_bit_for_bit(shape, dtype):
    pivots, coefficients, order = factors("pifa", shape, dtype)
    dense = pifa_dense(pivots, coefficients, order)
    row_of = {place: row for row, place in enumerate(order.tolist()) if place < len(pivots)}
    assert len(row_of) == shape[2]
    assert all(torch.equal(dense[row], pivots[place]) for place, row in row_of.items())


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_either_integer_type_names_the_rows(index):
    pivots, coefficients, order = factors("pifa", (7, 5, 3), torch.float32)
    x, order = torch.randn(4, 5), order.to(index)
    check("pifa", x, [pivots, coefficients, order], None, torch.float32)
    assert torch.equal(pifa_dense(pivots, coefficients, order), pifa_dense(pivots, coefficients, order.int()))


@kinds
@pytest.mark.parametrize("shape", [(7, 5, 3), (5, 6, 5), (4, 3, 1)], ids=str)
def test_gradients_reach_the_input_every_factor_and_the_bias(kind, shape):
    torch.manual_seed(4)
    *parts, last = factors(kind, shape, torch.float64)
    order = [last] if kind == "pifa" else []
    free = [torch.randn(2, 3, shape[1]).double(), *parts, *([] if order else [last]), torch.randn(shape[0]).double()]
    for tensor in free:
        tensor.requires_grad_()

    def run(x, *others):
        return KINDS[kind][0](x, *others[:-1], *order, others[-1])

    assert torch.autograd.gradcheck(run, free)
    run(*free).square().sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in free)
    assert all(bool(t.grad.any()) for t in free if t.numel())


@kinds
def test_gradients_reach_the_factors_through_the_dense_weight_as_through_the_product(kind):
    parts = [p.requires_grad_() if p.is_floating_point() else p for p in factors(kind, (7, 5, 3), torch.float32)]
    free, outward = [p for p in parts if p.requires_grad], torch.randn(7, 5)
    wanted = torch.autograd.grad(KINDS[kind][0](torch.eye(5), *parts, None).T, free, outward)
    torch.testing.assert_close(torch.autograd.grad(KINDS[kind][1](*parts), free, outward), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 7, 3), (12, 5, 5), (6, 8, 1)])
@pytest.mark.parametrize("small", [lowrank.SMALL, 0])
def test_pifa_gives_many_tokens_what_it_gives_each(shape, dtype, small, monkeypatch):
    """Of large weights also in several parts."""
    monkeypatch.setattr(lowrank, "SMALL", small)
    monkeypatch.setattr(lowrank, "AT_ONCE", 32)
    pivots, coefficients, order = factors("pifa", shape, dtype)
    bias, x = torch.randn(shape[0]).to(dtype), torch.randn(2, 40, shape[1]).to(dtype)
    many = pifa_matmul(x, pivots, coefficients, order, bias)
    each = torch.stack([pifa_matmul(token, pivots, coefficients, order, bias) for token in x.flatten(0, 1)])
    assert many.shape == (2, 40, shape[0])
    # the bias is added before rounding or after it
    assert torch.allclose(
        many.flatten(0, 1).float(),
        each.float(),
        rtol=torch.finfo(dtype).eps * 4,
        atol=1e-2 if dtype == torch.bfloat16 else 1e-5,
    )
