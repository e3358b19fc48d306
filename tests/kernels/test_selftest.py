"""The GPU's self-test, run in the interpreter: it passes what is right, and names what is not."""

import pytest
import torch

from paredown.kernels import selftest, sparse24_expand

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch, mma_sp_emulated):
    monkeypatch.setattr(selftest, "ONCE", {torch.float16: 5.2e-4})  # the interpreter truncates to bfloat16
    monkeypatch.setattr(selftest, "TOKENS", (1, 9))
    monkeypatch.setattr(selftest, "_has_mma", lambda device: True)


@pytest.mark.parametrize("shape", [(33, 100), (1, 4)])
def test_every_subject_passes(shape):
    assert {s.name for s in selftest.subjects(33, 100, torch.float16, CPU)} == {
        "sparse24 mma.sp", "sparse24 + low rank mma.sp", "sparse24 expand", "sparse24 + low rank expand",
        "sparse24 dense", "bitmap", "bitmap dense", "low rank", "pifa", "cur",
        "sparse24 as the table says", "low rank as the table says",
    }  # fmt: skip
    assert list(selftest.check_shapes([shape], CPU, 1)) == [[]]


def test_shapes_in_processes_of_their_own_come_back_in_order_and_a_crash_is_a_fault(monkeypatch):
    monkeypatch.setattr(selftest, "check_shape", "{0} x {1}, {2}".format)  # a function that processes can hand over
    assert list(selftest.check_shapes([(7, 2), (3, 1)], CPU, 2)) == ["7 x 2, torch.float16", "3 x 1, torch.float16"]
    monkeypatch.setattr(selftest, "check_shape", "{9}".format)
    assert "IndexError" in next(selftest.check_shapes([(7, 2)], CPU, 2))[0]


def test_a_wrong_result_an_unwritten_one_and_an_unsteady_one_are_named(monkeypatch):
    right = sparse24_expand.matmul

    def wrong(x, values, indices, bias, y, lowrank=None):
        right(x, values, indices, bias, y, lowrank)
        y[0, 3] += 1

    def unwritten(x, values, indices, bias, y, lowrank=None):
        right(x, values, indices, bias, y[:, :].clone(), lowrank)

    def unsteady(x, values, indices, bias, y, lowrank=None):
        right(x, values, indices, bias, y, lowrank)
        y += 1e-4 * torch.rand_like(y)

    def failing(x, values, indices, bias, y, lowrank=None):
        raise RuntimeError("no such tile\nand more")

    for broken, words in (
        (wrong, "relative error"), (unwritten, "not finite"), (unsteady, "other bits"), (failing, "Error: no such tile"),
    ):  # fmt: skip
        monkeypatch.setattr(sparse24_expand, "matmul", broken)
        faults = selftest.check_shape(16, 64, torch.float16, CPU)
        assert faults and all("sparse24" in fault and "expand" in fault and words in fault for fault in faults)
