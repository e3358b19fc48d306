"""What the kernels compile to for GPUs that are not here: no spills, sparse tensor cores, few instructions."""

import os
import re
import subprocess
import sys

import pytest

from paredown.kernels import aot


@pytest.fixture(scope="module")
def printed():
    """The output of the command, in a process that compiles instead of interpreting."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "paredown.kernels.aot"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.stdout.startswith("skipped"):
        pytest.skip(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_every_kernel_keeps_to_its_budget_on_both_architectures(printed):
    rows = printed.splitlines()[1:]
    assert len(rows) == 2 * len(aot.cases()) and "FAULT" not in printed
    assert all(re.match(r".{40}\s+(80|90)\s+\d+\s+0\s", row) for row in rows)


@pytest.mark.slow
def test_the_sparse_kernel_uses_sparse_tensor_cores_and_about_one_instruction_per_weight(printed):
    rows = [row.split() for row in printed.splitlines() if row.startswith("sparse24 mma.sp, 1 token")]
    assert rows and all(int(row[-3]) > 0 and 0 < float(row[-1]) <= 1.25 for row in rows)


def test_under_the_interpreter_it_skips_with_a_reason(capsys):
    assert aot.main([]) == 0
    assert "TRITON_INTERPRET" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"spills": 3}, "3 spills"), ({"sparse_mma": 0}, "no HMMA.SP"), ({"per_weight": 1.5}, "1.50 instructions")],
)
def test_a_row_over_its_budget_is_a_fault(change, reason):
    case = aot.Case("x", lambda: None, budget=1.0, mma_sp=True)
    sound = {
        "name": "x",
        "arch": 90,
        "registers": 60,
        "spills": 0,
        "shared": 0,
        "sparse_mma": 8,
        "mma": 0,
        "per_weight": 0.9,
    }
    text = (
        "#b = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [32, 1], warpsPerCTA = [4, 1], order = [1, 0]}>\n"
        "tt.elementwise_inline_asm -> tensor<128x4xf32, #b>"
    )
    assert aot.fault_of(case, aot.Row(**sound, fault=None), text) is None
    assert reason in aot.fault_of(case, aot.Row(**{**sound, **change}, fault=None), text)


def test_a_loop_is_what_stands_between_a_label_and_the_jump_back():
    lines = [".L_x_0", "A", ".L_x_1", "B", "@P0 BRA `(.L_x_1)", "C", "BRA `(.L_x_2)", ".L_x_2", "D"]
    assert aot.loops(lines) == [["B", "@P0 BRA `(.L_x_1)"]]
