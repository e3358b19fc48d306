"""The programme for a GPU: its schedule with parts that take no time, its parsers, and all of it in miniature on a CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from paredown.evaluation.benchmarks.gpu import __main__ as command
from paredown.evaluation.benchmarks.gpu import figures, rehearsal
from paredown.evaluation.benchmarks.gpu.figures import Figures
from paredown.evaluation.benchmarks.gpu.programme import Part, Step, run
from paredown.kernels.dispatch import DispatchTable


def part(name, *codes, **options):
    """A part that runs Python; its figure is the last line of the form `figure: ...`."""

    def read(log):
        found = [line.partition(": ")[2] for line in log.splitlines() if line.startswith("figure: ")]
        missed = [line for line in log.splitlines() if line.startswith("MISSED")]
        return Figures(found[-1] if found else "", found, missed=tuple(missed))

    return Part(name, f"The part {name}", tuple(Step((sys.executable, "-c", code)) for code in codes), read, **options)


@pytest.fixture
def outcomes(tmp_path):
    """`outcomes(parts, seconds)`: by name, with what was kept after each part in `outcomes.kept`."""

    def go(*parts, seconds=60):
        go.kept = []
        done = run(parts, tmp_path, seconds, {}, lambda found: go.kept.append([one.name for one in found]))
        return {one.name: one for one in done}

    return go


QUICK, SLOW = "print('figure: 7')", "import time; print('figure: 3', flush=True); time.sleep(60)"


def test_what_a_part_does_not_use_goes_to_the_later_ones_and_each_is_kept_at_once(outcomes, tmp_path):
    done = outcomes(part("a", QUICK, share=1), part("b", QUICK, share=3), part("c", QUICK, share=1))
    assert [one.state for one in done.values()] == ["done"] * 3
    assert done["a"].budget == pytest.approx(60 / 5, abs=0.5)
    assert done["b"].budget == pytest.approx((60 - done["a"].seconds) * 3 / 4, abs=0.5)
    assert done["c"].budget == pytest.approx(60 - done["a"].seconds - done["b"].seconds, abs=0.5)
    assert outcomes.kept == [["a"], ["a", "b"], ["a", "b", "c"]]
    assert done["c"].figures.headline == "7" and "figure: 7" in (tmp_path / "c.log").read_text()


def test_a_part_that_does_not_fit_or_cannot_run_is_skipped_and_takes_no_time_from_others(outcomes):
    done = outcomes(
        part("long", QUICK, least=100),
        part("missing", QUICK, share=9, absent="there is no such tool"),
        part("last", QUICK),
    )
    assert [one.state for one in done.values()] == ["skipped", "skipped", "done"]
    assert done["long"].reason == "60 s are left, and it needs at least 100 s"
    assert done["missing"].reason == "there is no such tool"
    assert done["last"].budget == pytest.approx(60, abs=0.5) and not any(one.failed for one in done.values())


def test_a_failure_stops_neither_the_steps_nor_the_parts_after_it(outcomes):
    done = outcomes(part("broken", "raise ValueError('no such tile')", QUICK), part("next", QUICK))
    assert done["broken"].state == "failed" and done["broken"].failed
    assert done["broken"].reason == "ValueError: no such tile" and done["broken"].figures.headline == "7"
    assert done["next"].state == "done"


def test_a_part_out_of_time_is_ended_with_its_children_and_keeps_what_it_printed(outcomes, tmp_path):
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLOW!r}])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    mute = "import time; time.sleep(60)"
    began = time.monotonic()
    done = outcomes(part("slow", parent, share=4), part("mute", mute), part("next", QUICK, share=4), seconds=9)
    assert time.monotonic() - began < 30
    assert [one.state for one in done.values()] == ["out of time", "out of time", "done"]
    assert done["slow"].figures.headline == "3" and not done["slow"].failed
    assert done["mute"].failed  # no figure
    assert done["slow"].reason == "1 of 1 commands did not end in their time"
    assert not alive(int((tmp_path / "child").read_text()))


def alive(pid):
    """Whether a process still runs: one that has ended may wait for its parent to notice."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_missed_bar_is_no_failure_but_an_error_is(outcomes):
    missed = "import sys; print('figure: 1'); print('MISSED by far'); sys.exit(1)"
    done = outcomes(
        part("missed", missed), part("error", missed.replace("sys.exit(1)", "sys.exit('error: no memory')")),
        part("unexplained", missed.replace("MISSED", "met")),
    )  # fmt: skip
    assert [one.state for one in done.values()] == ["done", "failed", "failed"]
    assert done["missed"].figures.missed == ("MISSED by far",)
    assert done["error"].reason == "error: no memory"


@pytest.fixture
def told(monkeypatch, tmp_path, capsys):
    """`told(arguments, parts)`: the command with other parts; its status, gpu.json and what it printed."""

    def go(*arguments, parts=("a", "b", "c"), **codes):
        made = {name: (lambda run, name=name: part(name, codes.get(name, QUICK))) for name in parts}
        monkeypatch.setattr(command, "PROGRAMME", made)
        monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--out", str(tmp_path), *arguments])
        status = command.main()
        return status, json.loads((tmp_path / "gpu.json").read_text()), capsys.readouterr().out

    return go


def test_parts_are_chosen_and_a_second_run_adds_to_the_first(told, tmp_path):
    status, found, printed = told("--only", "b", "c", "--skip", "c")
    assert status == 0 and [one["name"] for one in found["parts"]] == ["b"]
    assert found["rehearsal"] and found["device"]["type"] == "cpu" and found["versions"]["torch"]
    assert "a " not in printed and "b     done" in " ".join(printed.split("\n"))
    _, found, _ = told("--only", "a", "b", b="print('figure: 8')")
    assert [(one["name"], one["figures"]["headline"]) for one in found["parts"]] == [("a", "7"), ("b", "8")]
    page = (tmp_path / "gpu.md").read_text()
    assert (
        found["date"] in page
        and found["versions"]["torch"] in page
        and "## The part a" in page
        and "| b | done |" in page
    )
    assert "A rehearsal" in page


def test_the_exit_status_is_1_if_a_part_failed(told):
    status, found, printed = told(b="raise ValueError('no such tile')")
    assert status == 1 and [one["state"] for one in found["parts"]] == ["done", "failed", "done"]
    assert "ValueError: no such tile" in printed


def test_without_a_gpu_the_command_names_the_rehearsal(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--device", "cuda:7"])
    with pytest.raises(SystemExit, match=r"^error: --device cuda:7: no such GPU here. --rehearse"):
        command.main()


STOPPED = """
import sys
sys.path.insert(0, {tests!r})
import test_gpu_programme as here
from paredown.evaluation.benchmarks.gpu import __main__ as command

slow = "import os; open({pid!r}, 'w').write(str(os.getpid())); " + here.SLOW
command.PROGRAMME = {{"a": lambda run: here.part("a", here.QUICK), "b": lambda run: here.part("b", slow)}}
sys.argv = ["gpu", "--rehearse", "--out", {out!r}]
command.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_measured_is_there_if_the_programme_is_stopped(tmp_path, number):
    pid = tmp_path / "pid"
    code = STOPPED.format(tests=str(Path(__file__).parent), pid=str(pid), out=str(tmp_path))
    programme = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    until(lambda: pid.exists() and pid.read_text())
    programme.send_signal(number)
    programme.wait(30)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [(one["name"], one["figures"]["headline"]) for one in found["parts"]] == [("a", "7")]
    if number == signal.SIGTERM:
        assert not alive(int(pid.read_text()))
    else:
        os.kill(int(pid.read_text()), signal.SIGKILL)


def until(condition, seconds=60):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


SELFTEST = """\
$ python -m paredown.kernels.selftest
NVIDIA H100 80GB HBM3, torch 2.11.0
tile               16 x 64     bfloat16   ok
Llama-3-8B       6144 x 4096   float16    2 FAULTS
    sparse24 mma.sp, 1 tokens: relative error 1.00e+00, more than 5.20e-04
    pifa, 8 tokens: a second launch gives other bits
SparseGPT sweep: ok
operators: sparse24: a CUDA graph gives other bits
"""


def test_the_self_test_names_what_is_wrong():
    found = figures.selftest(SELFTEST)
    assert found.headline == "1 of 2 cases right, SparseGPT sweep ok, operators WRONG"
    assert found.faults == (
        "Llama-3-8B 6144 x 4096 float16: 2 FAULTS", "operators: sparse24: a CUDA graph gives other bits",
    )  # fmt: skip
    assert len(found.notes) == 2 and found.notes[0].startswith("sparse24 mma.sp, 1 tokens")
    right = figures.selftest(SELFTEST.replace("2 FAULTS", "ok").partition("operators")[0])
    assert right.faults == () and right.headline.startswith("2 of 2 cases right")


def test_the_sanitizer_must_be_clean():
    clean = SELFTEST.replace("2 FAULTS", "ok").partition("operators")[0]
    assert figures.sanitizer(clean + "compute-sanitizer: clean\n").faults == ()
    found = figures.sanitizer(clean + "========= Invalid __global__ read of size 2\ncompute-sanitizer: exit status 9\n")
    assert found.faults == ("compute-sanitizer: exit status 9",) and found.notes == (
        "Invalid __global__ read of size 2",
    )
    assert figures.sanitizer(clean).headline == ""  # broken off


KERNELS = """\
NVIDIA H100 80GB HBM3, torch 2.11.0, triton 3.6.0, 2026-11-26, bfloat16

| what | weight | tokens | path | us, median (range) | dense us | GB/s | dense / ours |
| --- | --- | --- | --- | --- | --- | --- | --- |
| sparse24 | 14336x4096 | 1 | mma warps=8 | 23.0 (22.9 to 23.4) | 37.0 (36.8 to 37.5) | 2871 | 1.61x, bar 1.50x met |
| sparse24 | 6144x4096 | 1 | mma warps=8 | 13.0 (12.9 to 13.4) | 17.0 (16.8 to 17.5) | 2171 | 1.31x, bar 1.40x MISSED |
UserWarning: left out, because its result is wrong by 12.0%: Choice(op='sparse24')
UserWarning: left out, because its result is wrong by 12.0%: Choice(op='sparse24')
| pifa rank 1792 | 4096x14336 | 1 | portable splits=4 | 30.0 (29.9 to 30.4) | 37.0 (36.8 to 37.5) | 2000 | 1.23x |
| linears of Llama-3-8B, 2:4 | all | 1 | as above | 3000.0 (2990.0 to 3010.0) | 4500.0 (4490.0 to 4510.0) | | 1.50x, bar 1.45x met |
"""


def test_missed_bars_of_the_kernels_are_named():
    found = figures.kernels(KERNELS)
    assert found.headline == "2 of 3 bars met; linears of Llama-3-8B, 2:4: 1.50x, bar 1.45x met"
    assert found.missed == ("sparse24 6144x4096, 1 tokens: 1.31x, bar 1.40x MISSED",)
    assert len(found.tables[0].rows) == 4 and len(found.tables[0].headers) == 8 and len(found.notes) == 1
    assert figures.kernels("No GPU\n").headline == ""


FOOTPRINT = """\
$ python -m paredown.evaluation.benchmarks.footprint --make --shape llama-3-8b
# exit status 0
$ python -m paredown.evaluation.benchmarks.footprint --recipe sparsegpt-2of4 --shape llama-3-8b
reading text: stdlib, stdlib
[  1/32] model.layers.0  kept 0.500  error 6.85e-02  2.0 s  peak 2.54 GB
[ 32/32] model.layers.31  kept 0.500  error 4.79e-02  4.0 s  peak 2.54 GB
parameters           8,030,261,248
weights on disk      16061 MB -> 9200 MB
libraries, resident  1508 MB
peak above them      4000 MB (planned 9000 MB, planned / measured 2.25)
peak on cuda         6000 MB
total                130.5 s, of which forward passes 20.0 s
total / forward      6.50
seconds              survey 0.0, calibration 10.0, total 130.5
# exit status 0
$ python -m paredown.evaluation.benchmarks.footprint --recipe paredown-lowrank-80 --shape llama-3-8b
survey, forward: block 1 of 32
[  1/32] model.layers.0  kept 0.913  error 8.19e-03  20.0 s  peak 1.57 GB
[  2/32] model.layers.1  kept 0.689  error 5.93e-02  30.0 s  peak 1.58 GB
# ended after 90 s: its time was over
"""


def test_a_run_that_did_not_end_is_reported_by_its_blocks():
    found = figures.footprints(FOOTPRINT)
    whole, part_of = found.numbers
    assert whole["seconds"] == 130.5 and whole["host_megabytes"] == 4000 and whole["device_megabytes"] == 6000
    assert whole["planned_megabytes"] == 9000 and "0.90" in found.tables[0].rows[0]
    assert part_of["seconds"] is None and part_of["blocks"] == 2 and part_of["seconds_per_block"] == 25
    assert found.headline == "sparsegpt-2of4 130 s, paredown-lowrank-80 (unfinished; 800 s for all blocks)"
    assert found.missed == ("paredown-lowrank-80: 800 s, bar 600 s",)
    assert figures.footprints(FOOTPRINT[:200]).headline == ""


def factoring(seconds, precision):
    lines = f"$ factorizers --shape llama-3-8b --precision {precision}\n  4096 x 4096, two-sided: 0.50 s\n"
    return lines + (f"one block, two-sided: {seconds} s (3.90 to 4.10) on cuda, {precision}\n" if seconds else "")


def test_a_slow_factoring_is_a_missed_bar_only_if_no_precision_is_fast():
    slow = figures.solvers(factoring("4.00", "float64") + factoring("3.50", "float32"))
    assert slow.missed == ("factoring a block, two-sided: 3.50 s, bar 3 s",)
    assert slow.headline == "factoring 3.50 s, two-sided, float32"
    assert figures.solvers(factoring("4.00", "float64") + factoring("1.50", "float32")).missed == ()
    stopped = figures.solvers(factoring(None, "float64"))
    assert stopped.tables[0].rows == (("two-sided", "float64", "4096 x 4096: 0.50", "unfinished"),)
    assert stopped.headline == "" and stopped.missed == ()


def test_a_profile_says_for_how_much_of_a_sweep_the_device_is_busy():
    row = {
        "out": 4096,
        "in": 4096,
        "count": 2,
        "factor_float32": 0.1,
        "factor_float64": 0.2,
        "loop": 0.3,
        "kernel": 0.05,
    }
    told = {
        "out": 4096,
        "in": 4096,
        "profile": "loop",
        "seconds": 0.3,
        "busy": 0.06,
        "launches": 20000,
        "longest": {"addr": 0.05},
    }
    found = figures.solvers(f"{json.dumps(row)}\n{json.dumps(told)}\n")
    assert found.headline == "sweep of a block 0.60 s, by the kernel 0.10 s; its factors 0.40 s"
    assert "0.0600 (20%)" in found.tables[1].rows[0] and "20,000" in found.tables[1].rows[0]


def test_a_recipe_that_differs_is_a_fault():
    row = {
        "recipe": "wanda-2of4", "dense": 0.0, "loss": 0.5, "rise": 0.7, "masks": 0.99, "weights": 0.1, "seconds": 1.0,
        "against_seconds": 2.0, "wrong": ["the loss differs by +0.5000, more than 0.01 nats per token"],
    }  # fmt: skip
    found = figures.devices(json.dumps(row) + "\n")
    assert found.faults == ("wanda-2of4: the loss differs by +0.5000, more than 0.01 nats per token",)
    assert found.headline == "0 of 1 recipes equal the CPU's; largest difference of the loss 0.5000"


def test_decoding_is_read_with_its_energy_and_its_missed_bar():
    def speeds(rate, joules):
        return {"decode": {"tokens_per_second": {"median": rate}}, "joules_per_token": joules}

    row = {
        "batch": 1, "decode_mode": "cuda graph", "ratio": {"decode": 1.4, "prefill": 0.9},
        "against": speeds(100.0, 3.0), "model": speeds(140.0, 2.25),
    }  # fmt: skip
    log = json.dumps({"model": "llama-3-8b as sparse24", "end_to_end": [row], "notes": []})
    log += "\ndecoding, dense time / ours: 1.40x; bar 1.45x (llama-3-8b, sparse24, batch 1, on an H100): MISSED\n"
    found = figures.decoding(log)
    assert found.headline == "llama-3-8b as sparse24 batch 1: 1.40x" and found.tables[0].rows[0][-1] == "3, 2.25"
    assert len(found.missed) == 1 and found.notes == ()
    row["model"]["joules_per_token"] = None
    assert "no energy" in figures.decoding(json.dumps({"model": "m", "end_to_end": [row], "notes": []})).notes[0]


def test_ceilings_are_read_with_their_share_of_the_data_sheet():
    copy = {"ceiling": "copy on the device", "seconds": 1e-3, "rate": 3e12, "unit": "bytes", "of_sheet": 0.9}
    product = {"ceiling": "bfloat16 product", "seconds": 1e-3, "rate": 7e14, "unit": "operations", "of_sheet": None}
    found = figures.ceilings("\n".join(map(json.dumps, ({"facts": {"l2_cache": 1}}, copy, product))))
    assert found.headline == "copy on the device 3,000 GB/s (90% of the data sheet), bfloat16 product 700 TFLOP/s"


RECOVERY = """Recovery: distill, 2,953,472 numbers on 512 tokens towards model; divergence on held-out text 0.9236 -> 0.7637
stdlib: perplexity 28.24 dense, 97.33 compressed, 82.13 recovered; recovery changed its log by -0.1698 ± 0.0028
Fallbacks: 1
"""


def test_of_a_recovery_each_texts_three_perplexities_are_told():
    found = figures.recovery(RECOVERY)
    assert found.headline == "stdlib: perplexity 28.24 dense, 97.33 compressed, 82.13 recovered"
    assert found.numbers == RECOVERY.splitlines()[:2]
    assert figures.recovery("Traceback\n").headline == ""


def test_serving_is_read_as_packed_beside_dense():
    def speed(form, rate):
        return {"form": form, "batch": 8, "tokens_per_second": {"median": rate, "least": rate, "most": rate}}

    log = [{"form": "packed", "weight_bytes": 5e8}, speed("packed", 150.0), {"form": "dense", "weight_bytes": 1e9}]
    assert figures.serving("\n".join(map(json.dumps, log))).headline == ""
    log += [speed("dense", 100.0), {"largest_difference": 0.02, "mean_difference": 0.001, "agreed": 0.75}]
    found = figures.serving("\n".join(map(json.dumps, log)))
    assert found.headline == "batch 8: 1.50x" and found.tables[0].rows == (("8", "100", "150", "1.50x"),)
    assert found.notes[0] == "weights of packed: 500 MB" and "75%" in found.notes[-1]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder of a rehearsal of all parts, and what the command printed."""
    folder = tmp_path_factory.mktemp("rehearsal")
    arguments = ["--rehearse", "--minutes", "15", "--out", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "paredown.evaluation.benchmarks.gpu", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_every_part_runs_in_miniature(rehearsed):
    folder, _ = rehearsed
    found = json.loads((folder / "gpu.json").read_text())
    states = {one["name"]: one["state"] for one in found["parts"]}
    assert states.keys() == command.PROGRAMME.keys()
    assert states.pop("serve") == ("done" if find_spec("vllm") else "skipped")
    assert set(states.values()) == {"done"}
    assert all(one["figures"]["headline"] for one in found["parts"] if one["state"] == "done")
    page = (folder / "gpu.md").read_text()
    for said in (
        "A rehearsal",
        "**Ceilings**",
        "**Decode kernels**",
        "**Device beside CPU**",
        "**A whole model**",
        "clean",
    ):
        assert said in page
    for said in (
        "**SparseGPT, seconds**",
        "**Factoring one block**",
        "**Decoding, packed beside dense**",
        found["date"],
    ):
        assert said in page


@pytest.mark.slow
def test_the_kernels_leave_a_dispatch_table(rehearsed):
    (file,) = (rehearsed[0] / "kernels").glob("*.json")
    table = DispatchTable.read(file)
    assert table.basis == "measured" and {"sparse24", "lowrank", "pifa", "bitmap"} <= {
        choice.op for choice in table.choices
    }


@pytest.mark.slow
def test_no_part_needs_lm_eval_or_datasets(rehearsed, tmp_path):
    environment = {**os.environ, **rehearsal.environment(tmp_path, os.environ["PATH"])}
    for name in rehearsal.BLOCKED:
        blocked = subprocess.run(
            [sys.executable, "-c", f"import {name}"], env=environment, capture_output=True, text=True
        )
        assert "halted; None in sys.modules" in blocked.stderr
    logs = list(rehearsed[0].glob("*.log"))
    assert len(logs) >= 8 and not [log.name for log in logs if "halted; None in sys.modules" in log.read_text()]
