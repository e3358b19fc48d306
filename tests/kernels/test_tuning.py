"""Every path and tile that tuning may try is right (in the interpreter); the fastest is what a table gets."""

import pytest
import torch

from paredown.kernels import benchmark, paths, tuning
from paredown.kernels.dispatch import Choice
from paredown.kernels.timing import Timing
from paredown.kernels.tuning import Product

CPU = torch.device("cpu")
PRODUCTS = [
    Product("sparse24", 40, 128), Product("sparse24_lowrank", 40, 128, 6), Product("bitmap", 40, 128),
    Product("lowrank", 40, 128, 6), Product("pifa", 40, 128, 6), Product("cur", 40, 128, 6),
]  # fmt: skip


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(tuning, "arch_of", lambda device: 90)
    monkeypatch.setattr(paths, "_mma_is_sound", lambda kernel: True)  # the interpreter compiles nothing to look at
    torch.manual_seed(0)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("wanted", PRODUCTS, ids=lambda one: one.op)
def test_every_candidate_multiplies_right(wanted, tokens, mma_sp_emulated):
    tensors, dense = tuning.random_product(wanted, CPU, torch.float16)
    x = torch.randn(tokens, wanted.columns).half()
    exact = x.double() @ dense.double().T
    tried = list(tuning.candidates(wanted.op, tokens, CPU))
    assert {path for path, _ in tried} >= {"portable"} and len({str(one) for one in tried}) == len(tried)
    for path, tile in tried[:: 1 if len(tried) < 8 else 3]:
        choice = Choice(wanted.op, wanted.rows, wanted.columns, tokens, path, tile)
        y = paths.PATHS[wanted.op](choice, x, tensors, None, torch.full((tokens, wanted.rows), torch.nan).half())
        assert float((y.double() - exact).norm() / exact.norm()) < 5e-3, choice


def test_a_kernel_whose_registers_lie_otherwise_is_not_believed(monkeypatch, mma_sp_emulated):
    monkeypatch.undo()
    text = "#b = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [%s], warpsPerCTA = [4, 1], order = [1, 0]}>\ntt.elementwise_inline_asm -> tensor<128x4xf32, #b>"
    sound = type("Kernel", (), {"hash": "sound", "asm": {"ttgir": text % "32, 1"}})
    other = type("Kernel", (), {"hash": "other", "asm": {"ttgir": text % "16, 2"}})
    assert paths._mma_is_sound(sound)
    with pytest.warns(UserWarning, match="the portable 2:4 kernel runs instead"):
        assert not paths._mma_is_sound(other)
    tensors, dense = tuning.random_product(PRODUCTS[0], CPU, torch.float16)
    x, y = torch.randn(1, 128).half(), torch.full((1, 40), torch.nan).half()

    def spoilt(x, values, indices, bias, y, lowrank=None, **tile):
        y.fill_(7)
        return other

    monkeypatch.setattr("paredown.kernels.sparse24_mma.matmul", spoilt)
    with pytest.warns(UserWarning):
        found = paths.sparse24(Choice("sparse24", 40, 128, 1, "mma"), x, tensors, None, y)
    wanted = x.double() @ dense.double().T
    assert float((found.double() - wanted).norm() / wanted.norm()) < 5e-3


@pytest.mark.parametrize("wanted", PRODUCTS, ids=lambda one: one.op)
def test_bytes_are_those_of_the_tensors(wanted):
    torch.manual_seed(0)
    wanted = Product(wanted.op, 256, 512, wanted.rank, 0.5)
    tensors, _ = tuning.random_product(wanted, CPU, torch.float16)
    stored = sum(
        t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor) and t.dtype != torch.int32
    )
    assert abs(benchmark.packed_bytes(wanted, torch.float16) / stored - 1) < 0.02


def test_the_fastest_of_the_finalists_is_chosen_and_its_ratio_told(monkeypatch):
    speeds = {"mma": 2e-6, "portable": 4e-6, "dense": 9e-6, "cusparselt": 9e-6}
    weights = tuning.random_product(Product("sparse24", 32, 64), CPU, torch.float16)
    monkeypatch.setattr(tuning, "_weights", lambda *_: [weights, weights])
    monkeypatch.setattr(tuning, "_is_right", lambda choice, call, exact: True)
    monkeypatch.setattr(tuning, "_calls", lambda choice, x, weights: choice)

    def interleaved(calls, device, repeats):
        seconds = {name: 5e-6 if callable(call) else speeds[call.path] for name, call in calls.items()}
        odd = {name for name, call in calls.items() if not callable(call) and call.tile.get("warps") == 16}
        return {name: Timing(s * (0.5 if name in odd else 1), 0.0, 1.0) for name, s in seconds.items()}

    monkeypatch.setattr(tuning, "interleaved", interleaved)
    found = tuning.best(Product("sparse24", 32, 64), 1, CPU, torch.float16)
    assert found.choice.path == "mma" and found.choice.tile["warps"] == 16 and found.choice.ratio == 5.0
    assert found.time.median == 0.5e-6 and found.dense.median == 2.5e-6  # of one product, not of all copies


def test_a_missed_bar_is_said():
    fast, slow = Timing(1e-6, 1e-6, 2e-6), Timing(1.4e-6, 1e-6, 2e-6)
    choice = Choice("sparse24", 14336, 4096, 1, "mma", {"warps": 8})
    line = benchmark.line_of(
        Product("sparse24", 14336, 4096), 1, 1.5, tuning.Measured(choice, fast, slow), torch.bfloat16
    )
    assert "1.40x, bar 1.50x MISSED" in line and line.count("|") == 9


def test_a_candidate_that_fails_or_is_wrong_is_left_out_and_one_that_does_not_fit_silently():
    from triton.runtime.errors import OutOfResources, PTXASError

    def raising(fault):
        def call():
            raise fault

        return call

    choice, exact = Choice("sparse24", 8, 64, 1, "cusparselt"), torch.randn(2, 8)
    assert tuning._is_right(choice, lambda: exact.bfloat16(), exact)
    assert not tuning._is_right(choice, raising(OutOfResources(300000, 232448, "shared memory")), exact)
    for fault in (RuntimeError("no such size"), PTXASError("no such size")):
        with pytest.warns(UserWarning, match="cusparselt.*no such size"):
            assert not tuning._is_right(choice, raising(fault), exact)
    for wrong in (exact * 1.1, exact * torch.nan):
        with pytest.warns(UserWarning, match="wrong by"):
            assert not tuning._is_right(choice, lambda wrong=wrong: wrong, exact)
