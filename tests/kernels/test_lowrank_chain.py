"""The low-rank kernels in Triton's interpreter; what they compile to is checked by test_aot.py.

Exact claims use small integers as activations and as weights of the first product: its result is then a number of the
16-bit type, and rounding it, which the interpreter does wrongly in bfloat16, changes nothing.
"""

from itertools import accumulate

import pytest
import torch

from paredown.kernels import lowrank_chain, primitives
from paredown.kernels.lowrank import cur_matmul, lowrank_matmul, pifa_matmul

NAN = float("nan")
DTYPES = [torch.bfloat16, torch.float16]
# (in, ranks, outs): even, odd, rank 1, one column, a single number, full rank, several steps; groups of 2, 3 and 4
GROUPS = [
    (256, [32], [64]),
    (100, [7], [45]),
    (33, [1], [5]),
    (1, [1], [3]),
    (1, [1], [1]),
    (20, [6], [6]),
    (130, [70], [77]),
    (256, [32, 16, 16], [64, 32, 32]),
    (100, [3, 17, 1], [40, 35, 2]),
    (64, [5, 5], [33, 33]),
    (17, [2, 4, 1, 3], [2, 50, 1, 32]),
]
groups = pytest.mark.parametrize("group", GROUPS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def nothing_starts_as_zeros():
    """torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def whole(low, high, *size, dtype):
    return torch.randint(low, high + 1, size).to(dtype)


def fine(*size, dtype):
    """Ordinary numbers, some -0.0."""
    numbers = torch.randn(size)
    numbers[torch.rand(size) < 0.05] = -0.0
    return numbers.to(dtype)


def fenced(tensor):
    """The same tensor between NaNs: anything read outside of it shows in the result."""
    size = tensor.numel()
    field = torch.full((size + 1024,), NAN if tensor.is_floating_point() else 2**30, dtype=tensor.dtype)
    field[512 : 512 + size] = tensor.flatten()
    return field[512 : 512 + size].view(tensor.shape)


def flat(parts):
    return fenced(torch.cat([part.flatten() for part in parts]))


def answer(tokens, outs, bias, launch):
    """What `launch(bias, y)` writes to y (tokens, outs). It must write all of y and nothing else."""
    field = torch.full((tokens * outs + 1024,), NAN)
    y = field[512 : 512 + tokens * outs].view(tokens, outs)
    launch(None if bias is None else fenced(bias), y)
    assert not y.isnan().any()
    assert field[:512].isnan().all() and field[512 + y.numel() :].isnan().all()
    return y


def error(y, wanted):
    return float((y.double() - wanted).norm() / max(float(wanted.norm()), 1e-30))


def exact(middle, dtype):
    assert torch.equal(middle.to(dtype).double(), middle), "the data of this test should be exact"
    return middle


def lowrank_group(group, dtype, tokens, biased, draw=whole):
    """x, the members' lefts and rights, and the bias."""
    inner, ranks, outs = group
    x, rights = draw(-1, 1, tokens, inner, dtype=dtype), [draw(-2, 2, k, inner, dtype=dtype) for k in ranks]
    lefts = [fine(out, k, dtype=dtype) for out, k in zip(outs, ranks, strict=True)]
    return x, lefts, rights, fine(sum(outs), dtype=dtype) if biased else None


def pifa_group(group, dtype, tokens, biased):
    inner, ranks, outs = group
    ranks = [min(k, out) for k, out in zip(ranks, outs, strict=True)]
    x, pivots = whole(-1, 1, tokens, inner, dtype=dtype), [whole(-2, 2, k, inner, dtype=dtype) for k in ranks]
    coefficients = [fine(out - k, k, dtype=dtype) for out, k in zip(outs, ranks, strict=True)]
    orders = [torch.randperm(out).int() for out in outs]
    return x, pivots, coefficients, orders, fine(sum(outs), dtype=dtype) if biased else None, ranks


def lowrank_slow(x, lefts, rights, bias):
    parts = [exact(x.double() @ r.double().T, x.dtype) @ m.double().T for m, r in zip(lefts, rights, strict=True)]
    return torch.cat(parts, dim=1) + (0 if bias is None else bias.double())


def pifa_slow(x, pivots, coefficients, orders, bias):
    """Row by row."""
    columns = []
    for own, others, order in zip(pivots, coefficients, orders, strict=True):
        h = exact(x.double() @ own.double().T, x.dtype)
        for place in order.tolist():
            columns.append(h[:, place] if place < len(own) else h @ others[place - len(own)].double())
    return torch.stack(columns, dim=1) + (0 if bias is None else bias.double())


def run_lowrank(x, lefts, rights, bias, **tile):
    ranks, outs = [len(r) for r in rights], [len(m) for m in lefts]
    x, left, right = fenced(x), flat(lefts), fenced(torch.cat(rights))
    return answer(
        len(x), sum(outs), bias, lambda b, y: lowrank_chain.lowrank_matmul(x, left, right, b, y, ranks, outs, **tile)
    )


def run_pifa(x, pivots, coefficients, orders, bias, **tile):
    ranks, outs = [len(p) for p in pivots], [len(o) for o in orders]
    x, own, others, order = fenced(x), fenced(torch.cat(pivots)), flat(coefficients), fenced(torch.cat(orders))
    return answer(
        len(x), sum(outs), bias,
        lambda b, y: lowrank_chain.pifa_matmul(x, own, others, order, b, y, ranks, outs, **tile),
    )  # fmt: skip


@groups
@dtypes
@pytest.mark.parametrize(("tokens", "biased"), [(1, False), (3, True), (17, False)])
def test_a_group_equals_the_float64_products(group, dtype, tokens, biased):
    torch.manual_seed(0)
    data = lowrank_group(group, dtype, tokens, biased)
    assert error(run_lowrank(*data), lowrank_slow(*data)) < 1e-6


@groups
@dtypes
@pytest.mark.parametrize(("tokens", "biased"), [(1, True), (5, False)])
def test_a_group_in_pifa_form_equals_its_rows_written_out(group, dtype, tokens, biased):
    torch.manual_seed(1)
    *data, _ = pifa_group(group, dtype, tokens, biased)
    assert error(run_pifa(*data), pifa_slow(*data)) < 1e-6


@pytest.mark.parametrize("sizes", [(64, 32, 16, 128), (45, 7, 9, 100), (5, 1, 1, 3), (70, 40, 37, 20)], ids=str)
@dtypes
@pytest.mark.parametrize(("tokens", "biased"), [(1, True), (19, False)])
def test_cur_equals_the_float64_product(sizes, dtype, tokens, biased):
    torch.manual_seed(2)
    out, kept, rank, inner = sizes
    x, rows = whole(-1, 1, tokens, inner, dtype=dtype), whole(-1, 1, rank, inner, dtype=dtype)
    link, columns = whole(-1, 1, kept, rank, dtype=dtype), fine(out, kept, dtype=dtype)
    bias = fine(out, dtype=dtype) if biased else None
    middle = exact(exact(x.double() @ rows.double().T, dtype) @ link.double().T, dtype)
    wanted = middle @ columns.double().T + (0 if bias is None else bias.double())
    parts = [fenced(part) for part in (x, columns, link, rows)]
    y = answer(tokens, out, bias, lambda b, y: lowrank_chain.cur_matmul(*parts, b, y))
    assert error(y, wanted) < 1e-6


@pytest.mark.parametrize("tokens", [16, 33, 64, 65])
def test_any_number_of_tokens(tokens):
    torch.manual_seed(3)
    group = (40, [5, 18], [33, 20])
    data = lowrank_group(group, torch.float16, tokens, True)
    assert error(run_lowrank(*data), lowrank_slow(*data)) < 1e-6
    *data, _ = pifa_group(group, torch.float16, tokens, True)
    assert error(run_pifa(*data), pifa_slow(*data)) < 1e-6


@pytest.mark.parametrize(
    "tile",
    [
        {"block_tokens": 16},
        {"block_tokens": 64},
        {"splits": 1},
        {"splits": 3, "down_columns": 16},
        {"splits": 64, "down_columns": 64},
        {"down_ranks": 16, "up_ranks": 16},
        {"up_rows": 16, "up_ranks": 32},
        {"up_rows": 128, "down_ranks": 64, "down_columns": 512, "up_ranks": 128},
        {"warps": 8, "stages": 1},
    ],
    ids=str,
)
def test_any_tile_gives_the_same_product(tile):
    torch.manual_seed(4)
    group = (130, [37, 3], [70, 33])
    data = lowrank_group(group, torch.bfloat16, 18, True)
    assert error(run_lowrank(*data, **tile), lowrank_slow(*data)) < 1e-6
    *data, _ = pifa_group(group, torch.bfloat16, 18, True)
    assert error(run_pifa(*data, **tile), pifa_slow(*data)) < 1e-6


@pytest.mark.parametrize(
    ("tile", "splits"), [({"splits": 3, "down_columns": 32}, 3), ({"splits": 9, "down_columns": 64}, 2)]
)
def test_partial_sums_add_up_and_no_split_is_empty(tile, splits):
    torch.manual_seed(9)
    x, right = fine(5, 100, dtype=torch.float16), fine(7, 100, dtype=torch.float16)
    sums = lowrank_chain.partial_sums(fenced(x), fenced(right), **tile)
    assert sums.dtype == torch.float32 and sums.shape == (splits, 5, 7)
    blocks = torch.arange(100) // tile["down_columns"] % splits
    for split in range(splits):
        own = blocks == split
        assert error(sums[split], x[:, own].double() @ right[:, own].double().T) < 1e-6


def test_an_unknown_tile_parameter_is_refused():
    with pytest.raises(TypeError, match="up_row'"):
        run_lowrank(*lowrank_group((4, [1], [4]), torch.float16, 1, False), up_row=16)


@dtypes
def test_members_do_not_know_of_each_other(dtype):
    torch.manual_seed(5)
    _, ranks, outs = group = (90, [4, 20, 9], [35, 7, 64])
    tile = {"splits": 2, "down_columns": 32, "up_ranks": 16}
    x, lefts, rights, bias = lowrank_group(
        group, dtype, 3, True, draw=lambda low, high, *s, dtype: fine(*s, dtype=dtype)
    )
    together = run_lowrank(x, lefts, rights, bias, **tile).split(outs, dim=1)
    alone = [
        run_lowrank(x, [m], [r], b, **tile) for m, r, b in zip(lefts, rights, bias.split(outs), strict=True)
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    rights[1].fill_(NAN)
    spoilt = run_spoilt(x, lefts, rights, bias, tile, ranks, outs)
    assert torch.equal(spoilt[0], alone[0]) and spoilt[1].isnan().all() and torch.equal(spoilt[2], alone[2])


def run_spoilt(x, lefts, rights, bias, tile, ranks, outs):
    y = torch.zeros(len(x), sum(outs))
    lowrank_chain.lowrank_matmul(x, flat(lefts), torch.cat(rights), bias, y, ranks, outs, **tile)
    return y.split(outs, dim=1)


@dtypes
def test_the_same_call_gives_the_same_bits(dtype):
    torch.manual_seed(6)
    data = lowrank_group((200, [40], [50]), dtype, 4, True, draw=lambda low, high, *s, dtype: fine(*s, dtype=dtype))
    assert torch.equal(run_lowrank(*data, splits=4, down_columns=32), run_lowrank(*data, splits=4, down_columns=32))


def test_the_middle_is_rounded_to_16_bits_as_the_reference_does():
    torch.manual_seed(7)
    x, right, left = (fine(*size, dtype=torch.float16) for size in [(5, 80), (12, 80), (30, 12)])
    h, order = x.double() @ right.double().T, torch.randperm(42).int()
    rounded, unrounded = h.half().double() @ left.double().T, h @ left.double().T
    y = run_lowrank(x, [left], [right], None)
    # float32 may round a sum to the other neighbour if it is almost in the middle of two 16-bit numbers
    assert error(y, rounded) < 0.2 * error(y, unrounded) and error(y, unrounded) > 1e-5
    pifa_y = run_pifa(x, [right], [left], [order], None)
    assert error(pifa_y, torch.cat((h.half().double(), rounded), dim=1)[:, order.long()]) < 0.2 * error(y, unrounded)


@dtypes
def test_the_kernels_agree_with_the_reference_functions(dtype):
    """On ordinary numbers: the intermediate result and the output are rounded to 16 bits (bfloat16 is truncated here)."""
    torch.manual_seed(8)
    x, bias, order = fine(4, 60, dtype=dtype), fine(50, dtype=dtype), torch.randperm(50).int()
    left, right, rest, link = (fine(*size, dtype=dtype) for size in [(50, 14), (14, 60), (36, 14), (14, 14)])
    close = 4 * torch.finfo(dtype).eps
    y = torch.full((4, 50), NAN, dtype=dtype)
    lowrank_chain.lowrank_matmul(x, left, right, bias, y, [14], [50])
    assert error(y, lowrank_matmul(x, left, right, bias).double()) < close
    lowrank_chain.pifa_matmul(x, right, rest, order, bias, y.fill_(NAN), [14], [50])
    assert error(y, pifa_matmul(x, right, rest, order, bias).double()) < close
    lowrank_chain.cur_matmul(x, left, link, right, bias, y.fill_(NAN))
    assert error(y, cur_matmul(x, left, link, right, bias).double()) < close


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_pivot_row_is_copied_even_if_another_pivot_is_infinite():
    pivots = torch.tensor([[1.0, 0.0], [0.0, torch.inf]]).half()
    y = torch.full((1, 3), NAN)
    lowrank_chain.pifa_matmul(
        torch.tensor([[3.0, 2.0]]).half(), pivots, torch.tensor([[1.0, 1.0]]).half(),
        torch.tensor([2, 1, 0]).int(), None, y, [2], [3],
    )  # fmt: skip
    assert y[0, 1] == torch.inf


def test_orders_are_relative_to_their_member():
    """Two members whose orders are alike and whose pivots are not."""
    x = torch.eye(2).half()
    pivots = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).half()  # rank 1 each
    coefficients = torch.tensor([10.0, 100.0]).half()  # one other row each
    y = torch.full((2, 4), NAN)
    lowrank_chain.pifa_matmul(x, pivots, coefficients, torch.tensor([1, 0, 1, 0]).int(), None, y, [1, 1], [2, 2])
    assert y.tolist() == [[10.0, 1.0, 300.0, 3.0], [20.0, 2.0, 400.0, 4.0]]


@pytest.mark.parametrize(
    ("capability", "hip", "interpreted", "wanted"),
    [((9, 0), None, False, True), ((10, 0), None, False, True), ((8, 9), None, False, False),
     ((9, 4), "6.4", False, False), ((9, 0), None, True, False)],
)  # fmt: skip
def test_only_new_nvidia_devices_start_the_second_kernel_early(monkeypatch, capability, hip, interpreted, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert primitives.has_dependent_launch(torch.device("cuda", 0), interpreted) is wanted
    assert primitives.has_dependent_launch(torch.device("cpu"), interpreted) is False


def test_every_row_belongs_to_one_member():
    """Members smaller and larger than a tile: each row of y shows which member and row it was computed from."""
    outs = [1, 32, 33, 64, 2]
    lefts = [torch.arange(out).view(-1, 1).half() for out in outs]
    rights = [torch.tensor([[1000.0 * (i + 1)]]).half() / 1000 for i in range(len(outs))]
    y = run_lowrank(torch.ones(1, 1).half(), lefts, rights, None)
    starts = [0, *accumulate(outs)]
    wanted = [(i + 1) * row for i, out in enumerate(outs) for row in range(out)]
    assert y[0].tolist() == wanted and len(wanted) == starts[-1]
