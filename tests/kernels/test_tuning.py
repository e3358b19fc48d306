"""Every path and tile that tuning may try is right (in the interpreter), and the fastest of them is chosen."""

from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from paredown.kernels import benchmark, paths, tuning
from paredown.kernels.dispatch import Choice
from paredown.kernels.timing import Timing
from paredown.kernels.tuning import Product

CPU = torch.device("cpu")
PRODUCTS = [
    Product("sparse24", 40, 128), Product("sparse24_lowrank", 40, 128, 6), Product("bitmap", 40, 128),
    Product("lowrank", 40, 128, 6), Product("pifa", 40, 128, 6), Product("cur", 40, 128, 6),
]  # fmt: skip


HOPPER = 90


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.op)
def test_every_candidate_multiplies_right(product, tokens, mma_sp_emulated):
    tensors, dense = tuning.random_product(product, CPU, torch.float16)
    x = torch.randn(tokens, product.columns).half()
    exact = x.double() @ dense.double().T
    tried = list(tuning.candidates(product.op, tokens, HOPPER))
    assert {path for path, _ in tried} >= {"portable"} and len({str(candidate) for candidate in tried}) == len(tried)
    for path, tile in tried[:: 1 if len(tried) < 8 else 3]:
        choice = Choice(product.op, product.rows, product.columns, tokens, path, tile)
        y = paths.PATHS[product.op](choice, x, tensors, None, torch.full((tokens, product.rows), torch.nan).half())
        assert float((y.double() - exact).norm() / exact.norm()) < 5e-3, choice


def test_a_kernel_whose_registers_lie_otherwise_is_not_believed(monkeypatch, mma_sp_emulated):
    text = "#b = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [%s], warpsPerCTA = [4, 1], order = [1, 0]}>\ntt.elementwise_inline_asm -> tensor<128x4xf32, #b>"
    sound = type("Kernel", (), {"hash": "sound", "asm": {"ttgir": text % "32, 1"}})
    other = type("Kernel", (), {"hash": "other", "asm": {"ttgir": text % "16, 2"}})
    assert paths.mma_layout_is_right(sound)
    with pytest.warns(UserWarning, match="the portable 2:4 kernel runs instead"):
        assert not paths.mma_layout_is_right(other)
    tensors, dense = tuning.random_product(PRODUCTS[0], CPU, torch.float16)
    x, y = torch.randn(1, 128).half(), torch.full((1, 40), torch.nan).half()

    launch = GridExecutor.__call__

    def launch_with_wrong_layout(self, *args, **options):
        if self.fn.__name__ != "sparse24_mma":
            return launch(self, *args, **options)
        y.fill_(7)
        return other

    monkeypatch.setattr(GridExecutor, "__call__", launch_with_wrong_layout)
    with pytest.warns(UserWarning):
        result = paths.sparse24(Choice("sparse24", 40, 128, 1, "mma"), x, tensors, None, y)
    wanted = x.double() @ dense.double().T
    assert float((result.double() - wanted).norm() / wanted.norm()) < 5e-3


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.op)
def test_bytes_are_those_of_the_tensors(product):
    product = Product(product.op, 256, 512, product.rank, 0.5)
    tensors, _ = tuning.random_product(product, CPU, torch.float16)
    stored = sum(
        t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor) and t.dtype != torch.int32
    )
    assert abs(benchmark.packed_bytes(product, torch.float16) / stored - 1) < 0.02


def test_the_fastest_of_the_finalists_is_chosen_with_its_ratio():
    speeds = {"mma": 2e-6, "portable": 4e-6, "dense": 9e-6, "cusparselt": 9e-6}
    choices = [Choice("sparse24", 32, 64, 1, *candidate) for candidate in tuning.candidates("sparse24", 1, HOPPER)]
    trials = [(choice, lambda choice=choice: choice) for choice in choices]

    def seconds(choice):
        return speeds[choice.path] * (0.5 if choice.tile.get("warps") == 16 else 1)

    def timer(calls, repeats):
        return {name: Timing(5e-6 if name == "dense" else seconds(call()), 0.0, 1.0) for name, call in calls.items()}

    result = tuning.fastest(trials, lambda: None, products=2, repeats=20, timer=timer)
    assert result.choice.path == "mma" and result.choice.tile["warps"] == 16 and result.choice.ratio == 5.0
    assert result.time.median == 0.5e-6 and result.dense.median == 2.5e-6  # of one product, not of all copies


def test_the_best_path_of_a_product_is_measured_beside_the_dense_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    result = tuning.best(Product("lowrank", 24, 40, 6), 128, CPU, torch.float16, repeats=2)
    assert replace(result.choice, ratio=None) == Choice("lowrank", 24, 40, 128, "torch")  # the only one for 128 tokens
    assert result.choice.ratio == round(result.dense.median / result.time.median, 3) > 0


def test_a_missed_bar_is_said():
    fast, slow = Timing(1e-6, 1e-6, 2e-6), Timing(1.4e-6, 1e-6, 2e-6)
    choice = Choice("sparse24", 14336, 4096, 1, "mma", {"warps": 8})
    line = benchmark.line_of(
        Product("sparse24", 14336, 4096), 1, 1.5, tuning.Measurement(choice, fast, slow), torch.bfloat16
    )
    assert "1.40x, bar 1.50x MISSED" in line and line.count("|") == 9


def test_a_candidate_that_fails_or_is_wrong_is_left_out_and_one_that_does_not_fit_silently():
    from triton.runtime.errors import OutOfResources, PTXASError

    def raising(fault):
        def call():
            raise fault

        return call

    choice, exact = Choice("sparse24", 8, 64, 1, "cusparselt"), torch.randn(2, 8)
    assert tuning.is_right(choice, lambda: exact.bfloat16(), exact)
    assert not tuning.is_right(choice, raising(OutOfResources(300000, 232448, "shared memory")), exact)
    for fault in (RuntimeError("no such size"), PTXASError("no such size")):
        with pytest.warns(UserWarning, match="cusparselt.*no such size"):
            assert not tuning.is_right(choice, raising(fault), exact)
    for wrong in (exact * 1.1, exact * torch.nan):
        with pytest.warns(UserWarning, match="wrong by"):
            assert not tuning.is_right(choice, lambda wrong=wrong: wrong, exact)


def test_what_the_cpu_must_plan_anew_is_tried_only_for_many_tokens(monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    tried = {tokens: {path for path, _ in tuning.candidates("sparse24", tokens, HOPPER)} for tokens in (1, 64, 1024)}
    assert "cusparselt" not in tried[1] | tried[64] and tried[1024] == {"portable", "dense", "cusparselt"}


def test_the_parts_of_a_list_of_candidates_are_all_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    product, x = Product("lowrank", 24, 40, 6), torch.randn(2, 40).half()
    tensors, dense = tuning.random_product(product, CPU, torch.float16)

    def tried(*part):
        exact = x.float() @ dense.float().T
        return [str(choice) for choice, _ in tuning._trials(product, x, [tensors], exact, *part)]

    parts = [name for part in range(3) for name in tried(part, 3)]
    assert len(parts) > 3 and sorted(parts) == sorted(tried())
