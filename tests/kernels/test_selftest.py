"""The self-test for GPUs, run in the interpreter: it passes what is right, and names what is not."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from paredown.kernels import selftest

CPU = torch.device("cpu")
TOKENS = (1, 9)


@pytest.fixture(autouse=True)
def hopper(monkeypatch, mma_sp_emulated):
    """Every device is one with `mma.sp`."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize("shape", [(33, 100), (1, 4)])
def test_every_subject_passes(shape):
    assert {s.name for s in selftest.subjects(33, 100, torch.float16, CPU)} == {
        "sparse24 mma.sp", "sparse24 + low rank mma.sp", "sparse24 expand", "sparse24 + low rank expand",
        "sparse24 dense", "bitmap", "bitmap dense", "low rank", "pifa", "cur",
        "sparse24 as the table says", "low rank as the table says",
    }  # fmt: skip
    check = partial(selftest.check_shape, tokens=TOKENS)
    # not in bfloat16, to which the interpreter truncates
    assert list(selftest.check_shapes([shape], CPU, 1, [torch.float16], check)) == [[]]


def test_shapes_in_processes_of_their_own_come_back_in_order_and_a_crash_is_a_fault():
    check = "{0} x {1}, {2}".format  # a function that can be pickled
    faults = selftest.check_shapes([(7, 2), (3, 1)], CPU, 2, [torch.float16], check)
    assert list(faults) == ["7 x 2, torch.float16", "3 x 1, torch.float16"]
    assert "IndexError" in next(selftest.check_shapes([(7, 2)], CPU, 2, [torch.float16], "{9}".format))[0]


def wrong(run, x, bias, y):
    run(x, bias, y)[0, 3] += 1
    return y


def unwritten(run, x, bias, y):
    run(x, bias, y.clone())
    return y


def unsteady(run, x, bias, y):
    return run(x, bias, y) + 1e-4 * torch.rand_like(y)


def failing(run, x, bias, y):
    raise RuntimeError("no such tile\nand more")


def test_a_wrong_result_an_unwritten_one_and_an_unsteady_one_are_named():
    for broken, words in (
        (wrong, "relative error"), (unwritten, "not finite"), (unsteady, "other bits"), (failing, "Error: no such tile"),
    ):  # fmt: skip
        faults = []
        for subject in selftest.subjects(16, 64, torch.float16, CPU):
            if "expand" in subject.name:
                subject = replace(subject, run=partial(broken, subject.run))
            faults += selftest.check_subject(subject, torch.float16, TOKENS)
        assert faults and all("sparse24" in fault and "expand" in fault and words in fault for fault in faults)
