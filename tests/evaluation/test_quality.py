"""The quality table: rows by name, runs that are kept, and figures against their formulas."""

import json
import sys

import pytest
import torch

from paredown.compress.errors import PareError
from paredown.compress.methods import METHODS
from paredown.evaluation.benchmarks import measure, quality
from paredown.evaluation.benchmarks.quality_table import figure, ratio
from paredown.evaluation.benchmarks.rows import PRUNERS, rows_named


@pytest.fixture
def table(tiny_model, text_file, tmp_path, monkeypatch, capsys, verified_here):
    """`table(*arguments)`: the command on a tiny model with a tiny text; returns what it prints."""

    def run(*arguments, rows=("wanda@2:4", "sparsegpt@2:4")):
        sizes = ["--sequences", "4", "--length", "32", "--eval-length", "32", "--windows", "3"]
        texts = ["--calibration", str(text_file), "--text", f"words={text_file}"]
        kept = ["--json", str(tmp_path / "kept.json"), "--device", "cpu"]
        command = ["quality", "--model", str(tiny_model), *sizes, *texts, *kept, "--rows", *rows, *arguments]
        monkeypatch.setattr(sys, "argv", command)
        quality.main()
        return capsys.readouterr()

    run.kept = tmp_path / "kept.json"
    return run


def counted(monkeypatch):
    """The names of the methods that are run from here on."""
    seen, own = [], measure.compress
    monkeypatch.setattr(
        measure, "compress", lambda model, recipe, *a, **k: seen.append(recipe.method) or own(model, recipe, *a, **k)
    )
    return seen


def test_a_second_call_goes_on_where_the_first_ended(table, monkeypatch):
    seen = counted(monkeypatch)
    first = table(rows=("wanda@2:4",))
    assert seen == ["wanda"]
    second = table(rows=("renamed=wanda@2:4", "sparsegpt@2:4"))
    assert seen == ["wanda", "sparsegpt"]
    assert "1/1 sparsegpt 2:4" in second.err and "words" in first.out
    table("--again", rows=("wanda@2:4",))
    assert seen == ["wanda", "sparsegpt", "wanda"]


def test_the_table_gives_rise_error_ratio_and_bytes_of_every_row(table):
    printed = table("--markdown", "--seeds", "0,1")
    rows = {cells[1].strip(): cells[2:] for line in printed.out.splitlines() if len(cells := line.split("|")) > 7}
    assert {"wanda 2:4", "sparsegpt 2:4"} <= rows.keys()
    rise, shown_ratio, kept = rows["wanda 2:4"][:3]
    assert "±" in rise and " to " in rise and "±" in shown_ratio and float(kept) == 0.5
    assert rows["sparsegpt 2:4"][1].split()[0] == "1.000"
    entries = json.loads(table.kept.read_text())["runs"].values()
    assert len(entries) == 4 and all(len(losses) == 3 for entry in entries for losses in entry["losses"].values())


def test_what_is_scored_equals_the_runs_own_evaluation(table, tiny_model, text_file, tmp_path):
    from paredown.compress import compress

    table(rows=("wanda@2:4",))
    kept = json.loads(table.kept.read_text())
    (entry,), (dense,) = kept["runs"].values(), kept["dense"].values()
    (after,) = entry["losses"].values()
    sizes = ["sequences=4", "length=32", f"source={text_file}"]
    overrides = [f"calibration.{size}" for size in sizes] + ["evaluate.length=32", "evaluate.windows=3"]
    report = compress(
        tiny_model, "wanda-2of4", tmp_path / "out", overrides=overrides, eval_text=[str(text_file)],
        allow_scored_calibration=True,
    )  # fmt: skip
    wanted = report["evaluation"][0]["paired_delta"]["log_ratio"]
    assert sum(after) / 3 - sum(dense) / 3 == pytest.approx(wanted, abs=1e-3)


def test_a_row_that_fails_does_not_cost_the_others(table):
    with pytest.raises(SystemExit, match="x, seed 0: "):
        table(rows=("x=wanda@2:5", "sparsegpt@2:4"))
    assert [entry["label"] for entry in json.loads(table.kept.read_text())["runs"].values()] == ["sparsegpt 2:4"]


def test_results_of_something_else_are_not_overwritten(table):
    table.kept.write_text("[1]")
    with pytest.raises(SystemExit, match="holds no results of this command"):
        table()
    assert table.kept.read_text() == "[1]"


def test_a_ratio_is_of_means_and_its_windows_are_drawn_together():
    rises = torch.rand(3, 20, dtype=torch.float64) + 0.5  # (seeds, windows)
    half = ratio(rises / 2, rises)
    assert (half.mean, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5)) and half.stderr < 1e-12
    of_seeds = rises.mean(1)
    found = figure(rises)
    assert (found.mean, found.low, found.high) == pytest.approx(
        (float(rises.mean()), float(of_seeds.min()), float(of_seeds.max()))
    )
    assert found.stderr == pytest.approx(float(rises.mean(0).std()) / 20**0.5, rel=0.15)
    assert figure(rises[:, :1]).stderr is None


def test_a_set_holds_every_pruner_that_this_version_has():
    rows, missing = rows_named(["2:4,60"])
    there = {label for label, raw in PRUNERS.items() if raw["method"] in METHODS.classes()}
    assert {row.label.rpartition(" ")[0] for row in rows if row.group == "60%"} == there
    assert {item.partition("@")[0] for item in missing} == set(PRUNERS) - there


def test_a_row_takes_settings_and_a_label():
    rows, _ = rows_named(["one=alps@2:4,damping=0.1,targets.skip=[lm_head, o_proj]", "wanda-50"], ["bos=none"])
    assert [row.label for row in rows] == ["one", "wanda-50"]
    assert rows[0].recipe.options == {"sparsity": "2:4", "damping": 0.1}
    assert rows[0].recipe.targets.skip == ("lm_head", "o_proj") and rows[1].recipe.bos == "none"


@pytest.mark.parametrize("item", ["wander@2:4", "pruned", "sparsegpt-2of5"])
def test_an_unknown_row_is_refused_with_those_that_exist(item):
    with pytest.raises(
        PareError, match=r"no row is called .* Did you mean .*Sets: 2:4.*sparsegpt.*Recipes: .*wanda-50"
    ):
        rows_named([item])


@pytest.mark.parametrize("items", [["wanda@x"], ["wanda@2:4", "wanda@2:4"], ["a=wanda@2:4,evaluate.windows=3"]])
def test_rows_that_cannot_be_compared_are_refused(items):
    with pytest.raises(PareError):
        rows_named(items)
