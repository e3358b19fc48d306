"""The commands as a person types them."""

import inspect
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from paredown.commands.app import exit_codes
from paredown.commands.compress import compress as compress_command
from paredown.commands.plan import plan
from paredown.compress import compress
from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.run.verify import verify
from paredown.evaluation.schema import check_report

SMALL = ["calibration.sequences=4", "calibration.length=32", "evaluate.length=32", "evaluate.windows=8"]


@pytest.fixture
def scored_text(text_file, tmp_path):
    """Other text than the one that calibrates: of one for both only a part would be scored."""
    path = tmp_path / "scored.txt"
    path.write_text(" ".join(reversed(text_file.read_text().split())))
    return path


@pytest.fixture
def arguments(text_file, scored_text):
    settings = [part for setting in SMALL for part in ("--set", setting)]
    return [*settings, "--calibration", text_file, "--eval-text", scored_text]


def test_compress_eval_export_and_verify_one_model(paredown, arguments, tiny_model, scored_text, tmp_path):
    out = tmp_path / "out"
    code, told, progress = paredown("compress", tiny_model, "-r", "sparsegpt-2of4", "-o", out, *arguments, "--json")
    report = json.loads(told)
    check_report(report)
    assert code == 0 and report == json.loads((out / "report.json").read_text())
    assert "model.layers.1" in progress and "peak" in progress
    assert report["parameters"]["kept"] * 2 == report["parameters"]["targeted"]
    assert report["bytes"]["after"] < report["bytes"]["before"]
    assert "import paredown.compress" in (out / "README.md").read_text()
    assert not out.with_name("out.partial").exists()

    code, told, _ = paredown(
        "eval", out, "--against", tiny_model, "--eval-text", scored_text, "--length", 32, "--windows", 8, "--json"
    )
    entry, before = json.loads(told)["evaluation"][0], report["evaluation"][0]
    for side in ("before", "after"):
        assert entry[side]["token_perplexity"] == pytest.approx(before[side]["token_perplexity"], rel=2e-3)

    dense, again = tmp_path / "dense", tmp_path / "again"
    assert f"{dense}: dense, " in paredown("export", out, "-o", dense, "--format", "dense")[1].replace("\n", "")
    assert f"{again}: packed, " in paredown("export", dense, "-o", again, "--format", "packed")[1].replace("\n", "")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        first, *others = (transformers_plugin.load(folder).eval()(ids).logits for folder in (out, dense, again))
    assert all(torch.equal(first, other) for other in others)
    for folder in (out, dense, again):
        assert paredown("verify", folder)[:2] == (0, f"{folder}: sound\n")
    assert paredown("compress", out, "-r", "wanda-2of4", "-o", tmp_path / "twice", *arguments)[0] == 1


def test_export_without_a_format_turns_packed_into_dense_and_all_else_into_packed(
    paredown, arguments, tiny_model, tmp_path, verified_here
):
    assert paredown("compress", tiny_model, "-r", "wanda-2of4", "-o", tmp_path / "a", *arguments)[0] == 0
    told = [
        json.loads(paredown("export", tmp_path / old, "-o", tmp_path / new, "--json")[1])
        for old, new in [("a", "b"), ("b", "c"), ("c", "d")]
    ]
    assert [one["format"] for one in told] == ["dense", "packed", "dense"]
    packed, dense, again = (load_file(tmp_path / name / "model.safetensors") for name in ("c", "b", "d"))
    assert any(name.endswith(".indices") for name in packed)
    assert dense.keys() == again.keys() and all(torch.equal(dense[name], again[name]) for name in dense)


def test_python_does_the_same(arguments, tiny_model, text_file, tmp_path, verified_here):
    report = compress(
        tiny_model, "wanda-50", tmp_path / "out", overrides=SMALL, calibration=str(text_file),
        eval_text=[str(text_file)], format="dense", seed=3,
    )  # fmt: skip
    assert report["calibration"]["seed"] == 3 and report["format"] == "dense"
    zeros = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"] == 0
    assert int(zeros.sum()) == zeros.numel() // 2


def test_plan_says_what_compress_then_does(paredown, arguments, tiny_model, text_file, tmp_path, verified_here):
    for recipe in ("sparsegpt-2of4", "wanda-50", "wanda-4of8"):
        out = tmp_path / recipe
        plan = json.loads(paredown("plan", tiny_model, "-r", recipe, "-o", out, *arguments, "--json")[1])
        report = json.loads(paredown("compress", tiny_model, "-r", recipe, "-o", out, *arguments, "--json")[1])
        assert plan["kept_parameters"] == report["parameters"]["kept"]
        assert plan["targeted_parameters"] == report["parameters"]["targeted"]
        assert (plan["bytes_before"], plan["bytes_after"]) == (report["bytes"]["before"], report["bytes"]["after"])
        assert plan["seconds"].keys() >= {"start and check", "calibration", "compress", "evaluation"}
        assert plan["total_seconds"] == sum(plan["seconds"].values()) and plan["disk_free"] > 0
    code, told, _ = paredown("plan", tiny_model, "-r", "wanda-2of4", *arguments)
    assert code == 0 and "memory needed" in told and "about 0:0" in told


def test_plan_takes_every_option_of_compress():
    planned, done = (inspect.signature(command).parameters for command in (plan, compress_command))
    assert {name for name in done if name not in planned} == set()
    same = [name for name in done if name not in ("out", "format")]  # to which each has its own words
    assert all(planned[name].annotation == done[name].annotation for name in same)


def test_without_a_probe_plan_reads_neither_weights_nor_text(paredown, tiny_model, monkeypatch):
    monkeypatch.setattr(ModelSource, "read", lambda *_: pytest.fail("a weight was read"))
    given = ("plan", tiny_model, "-r", "wanda-2of4", "--calibration", "nowhere.txt", "--no-probe", "--json")
    told = json.loads(paredown(*given)[1])
    assert told["seconds"] == {} and told["total_seconds"] is None and told["disk_free"] is None


def test_plan_with_curve_shows_what_several_shares_would_lose(paredown, tiny_model, text_file):
    little = [f"calibration.source={text_file}", "calibration.sequences=2", "calibration.length=32", "multiple=4"]
    changed = [word for key in little for word in ("--set", key)]
    given = ("plan", tiny_model, "-r", "paredown-width-80", "--curve", *changed)
    code, told, said = paredown(*given)
    assert code == 0 and "by cost" in told and "survey, backward: block 1 of 2" in said
    rows = json.loads(paredown(*given, "--json")[1])["curve"]["rows"]
    assert [row["kept"] for row in rows[:2]] == [0.95, 0.9] and 0 < rows[0]["equal"] < rows[1]["equal"]


def test_recipes_are_listed_and_shown_with_their_citation(paredown):
    assert "sparsegpt-2of4" in paredown("recipes")[1]
    assert "arXiv 2306.11695" in paredown("recipes", "wanda-2of4")[1]
    code, _, said = paredown("recipes", "wanda")
    assert code == 1 and said.startswith("error: no recipe is called 'wanda'")


def test_wrong_usage_exits_with_2(paredown):
    assert paredown("compress")[0] == 2
    assert paredown("compres")[0] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing(number, arguments, tiny_model, tmp_path):
    out = tmp_path / "out"
    # many windows, so that the run is still under way when the signal comes
    slow = ["--set", "evaluate.windows=5000", "--set", "evaluate.length=2", "--set", "calibration.sequences=600"]
    command = [sys.executable, "-m", "paredown.commands.app", "compress", str(tiny_model), "-r", "sparsegpt-2of4"]
    command += ["-o", str(out), *map(str, arguments), *slow]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out.partial").exists() and run.poll() is None:
        time.sleep(0.005)
    assert (tmp_path / "out.partial").exists()
    run.send_signal(number)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and "nothing was written" in said
    assert not out.exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no terminals that hang up")
def test_a_terminal_that_hangs_up_interrupts_and_nohup_protects_from_it(capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as stop, exit_codes():
            signal.raise_signal(signal.SIGHUP)
        assert stop.value.code == 130 and capsys.readouterr().err == "interrupted: nothing was written\n"
        assert signal.signal(signal.SIGHUP, signal.SIG_IGN) is signal.SIG_DFL
        with exit_codes():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def written(tiny_model, text_file, tmp_path, verified_here):
    compress(
        tiny_model, "sparsegpt-2of4", tmp_path / "out", overrides=SMALL, calibration=str(text_file),
        eval_text=[str(text_file)],
    )  # fmt: skip
    return tmp_path / "out"


def test_verify_finds_a_flipped_byte(written):
    assert verify(written) == []
    path = written / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert any("has changed since it was written" in fault for fault in verify(written))


def test_verify_finds_missing_and_reshaped_tensors(written):
    path = written / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, path)
    faults = "\n".join(verify(written))
    assert "'model.norm.weight' is missing" in faults and "'lm_head.weight' is bfloat16 [319, 64]" in faults


@pytest.mark.parametrize("changed", ["nll", "kept"])
def test_verify_finds_what_the_hashes_do_not_tell(changed, written):
    record = json.loads((written / "paredown.json").read_text())
    if changed == "nll":
        record["probe"]["nll"] = [value + 1 for value in record["probe"]["nll"]]
    else:
        record["layers"]["model.layers.0.mlp.up_proj"]["kept"] = 0.25
    (written / "paredown.json").write_text(json.dumps(record))
    said = {"nll": "loss differs by 1.0000", "kept": "model.layers.0.mlp.up_proj stores 3072 numbers"}[changed]
    assert said in "".join(verify(written))
