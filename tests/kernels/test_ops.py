"""The operators on a CPU: equal to the reference, accepted by torch.compile and torch.export, launched as the table says."""

import pytest
import torch
from torch.nn import functional as F

from paredown.kernels import dispatch, lowrank, ops, paths
from paredown.kernels.bitmap import pack_bitmap
from paredown.kernels.dispatch import Choice, DispatchTable
from paredown.kernels.sparse24 import pack24

OUT, IN = 24, 40


def sparse24():
    weight = torch.randn(OUT, IN).bfloat16()
    keep = torch.rand(OUT, IN // 4, 4).argsort(-1).argsort(-1).lt(2).reshape(OUT, IN)
    return pack24(weight, keep), weight * keep


def bitmap():
    weight, keep = torch.randn(OUT, IN).bfloat16(), torch.rand(OUT, IN) < 0.4
    return pack_bitmap(weight, keep), weight * keep


def factors(out=OUT, rank=5):
    left, right = torch.randn(out, rank).bfloat16(), torch.randn(rank, IN).bfloat16()
    return (left, right), left.double() @ right.double()


def pifa(out=OUT, rank=5):
    pivots, coefficients = torch.randn(rank, IN).bfloat16(), torch.randn(out - rank, rank).bfloat16()
    order = torch.randperm(out).int()
    rows = torch.cat((pivots.double(), coefficients.double() @ pivots.double()))
    return (pivots, coefficients, order), rows[order.long()]


def cur():
    columns, link, rows = torch.randn(OUT, 6).bfloat16(), torch.randn(6, 4).bfloat16(), torch.randn(4, IN).bfloat16()
    return (columns, link, rows), columns.double() @ link.double() @ rows.double()


def sparse24_lowrank():
    (values, indices), sparse = sparse24()
    (left, right), product = factors()
    return (values, indices, left, right), sparse.double() + product


REGISTERED = torch.ops.paredown  # the operators as torch.compile sees them

CASES = {
    "sparse24": (sparse24, ops.sparse24_matmul, REGISTERED.sparse24_matmul, lambda t, b: (*t, b)),
    "sparse24_lowrank": (sparse24_lowrank, ops.sparse24_lowrank_matmul, REGISTERED.sparse24_lowrank_matmul, lambda t, b: (*t, b)),
    "bitmap": (bitmap, ops.bitmap_matmul, REGISTERED.bitmap_matmul, lambda t, b: (*t, None, b)),
    "lowrank": (factors, ops.lowrank_matmul, REGISTERED.lowrank_matmul, lambda t, b: (*t, b, [5], [OUT])),
    "pifa": (pifa, ops.pifa_matmul, REGISTERED.pifa_matmul, lambda t, b: (*t, b, [5], [OUT])),
    "cur": (cur, ops.cur_matmul, REGISTERED.cur_matmul, lambda t, b: (*t, b)),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    make, call, op, arguments = CASES[request.param]
    return *make(), call, op, arguments


@pytest.mark.parametrize("tokens", [(), (1,), (3,), (2, 5), (0,)])
def test_products_equal_those_of_the_dense_weight(case, tokens):
    tensors, dense, call, _, _ = case
    x, bias = torch.randn(*tokens, IN).bfloat16(), torch.randn(OUT).bfloat16()
    y, wanted = call(x, *tensors, bias), x.double() @ dense.double().T + bias.double()
    assert y.shape == (*tokens, OUT) and y.dtype == torch.bfloat16
    if y.numel():
        assert float((y.double() - wanted).norm() / wanted.norm()) < 1e-2  # bfloat16 between the steps and at the end


@pytest.mark.parametrize("biased", [False, True])
def test_torch_accepts_every_operator(case, biased):
    tensors, _, _, op, arguments = case
    bias = torch.randn(OUT).bfloat16() if biased else None
    torch.library.opcheck(op, (torch.randn(2, 3, IN).bfloat16(), *arguments(tensors, bias)))


def test_compiled_whole_and_exported_they_give_the_same(case):
    tensors, _, call, _, _ = case

    class Layer(torch.nn.Module):
        def forward(self, x):
            return call(x, *tensors) * 2

    layer, x = Layer(), torch.randn(2, 3, IN).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_gradients_flow_to_the_input_as_through_the_dense_weight(case):
    tensors, dense, call, _, _ = case
    x = torch.randn(3, IN, dtype=torch.bfloat16, requires_grad=True)
    call(x, *tensors).float().sum().backward()
    wanted = dense.double().sum(0).expand(3, IN)
    assert float((x.grad.double() - wanted).norm() / wanted.norm()) < 2e-2


@pytest.mark.parametrize("make", [factors, pifa])
def test_linears_of_one_input_are_one_product(make):
    torch.manual_seed(0)
    outs, ranks = [24, 9, 16], [5, 3, 5]
    parts = [make(out, rank) for out, rank in zip(outs, ranks, strict=True)]
    x, bias = torch.randn(4, IN).bfloat16(), torch.randn(sum(outs)).bfloat16()
    tensors = list(zip(*(tensors for tensors, _ in parts), strict=True))
    if make is factors:
        left, right = torch.cat([t.flatten() for t in tensors[0]]), torch.cat(tensors[1])
        y = ops.lowrank_matmul(x, left, right, bias, ranks, outs)
    else:
        coefficients = torch.cat([t.flatten() for t in tensors[1]])
        y = ops.pifa_matmul(x, torch.cat(tensors[0]), coefficients, torch.cat(tensors[2]), bias, ranks, outs)
    wanted = torch.cat([x.double() @ dense.double().T for _, dense in parts], dim=-1) + bias.double()
    assert float((y.double() - wanted).norm() / wanted.norm()) < 1e-2


def test_sizes_that_do_not_fit_are_refused_by_name(case):
    tensors, _, call, _, _ = case
    with pytest.raises(ValueError, match=r"features|bitmap|does not belong"):
        call(torch.randn(2, IN + 8).bfloat16(), *tensors)
    with pytest.raises(ValueError, match="bias"):
        call(torch.randn(2, IN).bfloat16(), *tensors, torch.randn(OUT + 1).bfloat16())


def test_the_reference_stands_behind_the_operator_bit_for_bit():
    (values, indices), dense = sparse24()
    x = torch.randn(3, IN).bfloat16()
    assert torch.equal(ops.sparse24_matmul(x, values, indices), F.linear(x, dense))
    (left, right), _ = factors()
    assert torch.equal(ops.lowrank_matmul(x, left, right), lowrank.lowrank_matmul(x, left, right))


@pytest.mark.parametrize("lead", [(), (3,)])
def test_unpacking_on_a_gpu_goes_through_the_kernels_and_gives_the_same_bits(lead):
    weight = torch.randn(*lead, 10, 24).bfloat16()
    keep = torch.rand(*lead, 10, 6, 4).argsort(-1).argsort(-1).lt(2).flatten(-2)
    packed, loose = pack24(weight, keep), pack_bitmap(weight, keep)
    with dispatch.using(DispatchTable("an interpreter", 90, "modelled", ())):
        assert paths.kernels_run(packed[0]) and paths.kernels_run(loose[0])
        for dense in (paths.sparse24_dense(*packed), paths.bitmap_dense(*loose, 24)):
            assert torch.equal(dense, weight * keep)


def test_kernels_take_half_precision_of_one_dtype_and_cpu_tensors_only_while_a_table_is_in_use():
    half, other, single = torch.zeros(2).half(), torch.zeros(2).bfloat16(), torch.zeros(2)
    assert not paths.kernels_run(half, half)
    with dispatch.using(DispatchTable("an interpreter", 90, "modelled", ())):
        assert paths.kernels_run(half, half) and paths.kernels_run(other)
        assert not paths.kernels_run(half, other) and not paths.kernels_run(single)
        assert not paths.kernels_run(half.to("meta"))


def test_what_a_gpu_would_launch_is_what_the_table_says():
    (values, indices), dense = sparse24()
    asked = []

    class Recording(DispatchTable):
        def find(self, op, tokens, rows, columns):
            asked.append((op, tokens, rows, columns))
            return Choice(op, rows, columns, tokens, "portable")

    table = Recording("an interpreter", 90, "modelled", ())
    x = torch.randn(IN, 6).bfloat16().t()[1:].unflatten(0, (5, 1))  # neither contiguous nor aligned
    wide, bias = torch.cat((values, values), dim=1), torch.randn(OUT, 2).bfloat16()[:, 0]
    wanted = x.double() @ dense.double().T + bias.double()
    for stored in (values, wide[:, : values.shape[1]]):
        with dispatch.using(table):
            y = ops.sparse24_matmul(x, stored, indices, bias)
        assert y.shape == (5, 1, OUT)
        assert float((y.double() - wanted).norm() / wanted.norm()) < 2e-2  # the interpreter truncates to bfloat16
    assert asked == [("sparse24", 5, OUT, IN)] * 2
