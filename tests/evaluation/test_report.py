"""The report: what it must hold, and what the screen says."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from paredown.compress.errors import PareError
from paredown.evaluation.card import model_card
from paredown.evaluation.report import SCHEMA, check_report, render, render_eval
from paredown.evaluation.schema import report_json_schema
from paredown.evaluation.tables import base_name, bytes_text, layer_kind, plus_minus, seconds_text


def screen(renderable, width=200):
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def forget(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    del tree[path[-1]]


def put(tree, path, value):
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


# What a report must hold


def test_a_whole_report_passes_also_after_a_turn_through_json(report):
    check_report(report)
    check_report(json.loads(json.dumps(report)))
    check_report({**report, "calibration": None, "evaluation": [], "tasks": {}, "layers": []})


def test_the_report_names_the_bos_rule_of_calibration(report):
    report["calibration"]["bos"] = "every window"
    assert "128 sequences of 2,048 tokens, BOS token: every window, seed 7" in model_card(report)


@pytest.mark.parametrize(
    "path",
    [
        ("schema",),
        ("model", "revision"),
        ("recipe",),
        ("calibration", "sha256"),
        ("evaluation", 0, "tokens"),
        ("evaluation", 0, "before", "token_perplexity"),
        ("evaluation", 0, "paired_delta"),
        ("tasks", "boolq", "acc", "paired_stderr"),
        ("parameters", "targeted"),
        ("bytes", "after"),
        ("layers", 1, "relative_error"),
        ("seconds", "write"),
        ("peak_memory_bytes", "device"),
        ("fallbacks",),
        ("versions",),
    ],
)
def test_each_missing_key_is_named(report, path):
    forget(report, path)
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    with pytest.raises(PareError) as fault:
        check_report(report)
    assert f"report{place} is missing" in str(fault.value)


def test_all_faults_are_told_at_once_with_what_was_found(report):
    report["bytes"]["after"] = "1 GB"
    report["seconds"]["total"] = True
    report["layers"] = {}
    report["evaluation"][0]["after"]["token_perplexity"] = float("nan")
    with pytest.raises(PareError) as fault:
        check_report(report)
    told = str(fault.value)
    assert "report.bytes.after is '1 GB'; wanted a valid integer" in told
    assert "report.seconds.total is True; wanted a valid number" in told
    assert "report.layers is {}; wanted a valid list" in told
    assert "token_perplexity is nan; wanted a finite number" in told


def test_a_report_of_another_schema_is_refused(report):
    with pytest.raises(PareError, match="schema is 99"):
        check_report({**report, "schema": 99})


@pytest.mark.parametrize("nothing", [None, [], "report", {}])
def test_what_is_no_report_at_all_is_refused(nothing):
    with pytest.raises(PareError, match="no report of paredown"):
        check_report(nothing)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("schema",), True, "report.schema is True; wanted a valid integer"),
        (("layers", 3, "kept"), "0.5", "report.layers[3].kept is '0.5'; wanted a valid number"),
        (("layers", 3, "sparsity"), None, "report.layers[3].sparsity is None; wanted a valid number or a valid string"),
        (("tasks", "boolq", "acc", "wrong_to_correct"), 1.5, "report.tasks.boolq.acc.wrong_to_correct is 1.5; wanted"),
        (("evaluation", 0, "paired_delta", "low"), float("inf"), "paired_delta.low is inf; wanted a finite number"),
        (("format",), "zip", "report.format is 'zip'; wanted 'packed' or 'dense'"),
        (("warnings",), ["fine", 7], "report.warnings[1] is 7; wanted a valid string"),
    ],
)
def test_a_wrong_value_is_named_with_its_place_also_where_its_key_is_optional(report, path, value, problem):
    put(report, path, value)
    with pytest.raises(PareError) as error:
        check_report(report)
    assert str(error.value).splitlines()[1:] == [line for line in str(error.value).splitlines() if problem in line]


def test_further_keys_are_welcome_at_every_level(report):
    for path in ((), ("model",), ("layers", 0), ("evaluation", 0, "before"), ("tasks", "boolq", "acc")):
        put(report, (*path, "anything"), {"of": ["ours", None]})
    check_report(report)


def test_the_json_schema_describes_every_key_that_a_report_must_hold(report):
    done = subprocess.run(
        [sys.executable, "-m", "paredown.evaluation.schema"], capture_output=True, text=True, check=True
    )
    schema = json.loads(done.stdout)
    assert schema == report_json_schema()
    assert schema["properties"]["schema"]["const"] == SCHEMA
    assert set(schema["required"]) <= report.keys() <= schema["properties"].keys()
    parts = {**schema["$defs"], "Report": schema}
    assert parts["Layer"]["properties"]["kept"]["description"].startswith("Share of its numbers that is stored")
    assert parts["Perplexity"]["required"] == ["token_perplexity", "stderr"]
    vague = [
        f"{name}.{key}"
        for name, part in parts.items()
        for key, entry in part["properties"].items()
        if "description" not in entry and "$ref" not in entry
    ]
    assert vague == []


def test_every_key_of_what_the_pipeline_measures_is_typed(tiny_model, tmp_path, prune):
    result, _ = prune(tiny_model, tmp_path / "out")
    parts = report_json_schema()["$defs"]
    assert result.layers and result.evaluation
    for layer in result.layers:
        assert layer.keys() <= parts["Layer"]["properties"].keys()
    for entry in result.evaluation:
        assert entry.keys() <= parts["TextComparison"]["properties"].keys()
        assert entry["paired_delta"].keys() == parts["PairedDelta"]["properties"].keys()
    assert result.seconds.keys() <= parts["Seconds"]["properties"].keys()


# The screen


def test_the_screen_shows_both_figures_with_errors_protocol_and_seed(report):
    shown = screen(render(report))
    for words in ("9.761 ± 0.052", "14.520 ± 0.081", "+0.3971 ± 0.0021", "+0.3931 to +0.4012", "1.4876"):
        assert words in shown
    for words in ("wikitext2 (test)", "341,469 tokens", "windows of 2,048", "beefbeefbeef", "first windows only"):
        assert words in shown
    for words in ("0.6400 ± 0.0084", "0.6100 ± 0.0085", "-0.0300 ± 0.0031", "210", "111", "17.2500"):
        assert words in shown
    for words in ("2.40 GB", "1.61 GB", "67.2%", "450,000,000", "50.0%", "1 h 3 min", "3.10 GB", "seed 7"):
        assert words in shown


def test_hundreds_of_layers_become_a_row_for_each_kind(report):
    shown = screen(render(report), width=80)
    assert "Layers, by wanda" in shown and "worst: 0.4 model.layers.39.self_attn.q_proj\n" in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if "50.0%" in line}
    assert rows["self_attn.q_proj"] == ["40", "50.0%", "0.205", "0.4", "20.0"]
    assert rows["mlp.down_proj"] == rows["experts.down_proj"] == rows["self_attn.q_proj"]


def test_methods_have_a_column_where_there_are_several(report):
    report["layers"][0]["method"] = "sparsegpt"
    shown = screen(render(report), width=80)
    row = next(line for line in shown.splitlines() if line.strip().startswith("self_attn.q_proj"))
    assert "Layers, by" not in shown and "sparsegpt, wanda" in row


def factored(report):
    """The report with queries and down projections of factors, keys left dense by it."""
    plain = {
        "method": "fisher_svd",
        "kept": 0.6,
        "relative_error": 0.1,
        "damping": None,
        "seconds": 0.5,
        "kind": "pifa",
    }
    layers = [
        {
            **plain,
            "name": f"model.layers.{i}.{part}",
            "rank": rank + i,
            "predicted_loss": 0.02,
            "measured_loss": 0.03 + 0.01 * i,
        }
        for i in range(2)
        for part, rank in (("self_attn.q_proj", 16), ("mlp.down_proj", 40))
    ]
    layers[-1] |= {"rank": 40, "predicted_loss": None}  # as where ranks were not spread by it
    return {**report, "layers": layers}


def test_losses_stand_predicted_beside_measured_by_kind(report):
    told = screen(render(factored(report)), width=80)
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if " pifa " in line}
    assert rows == {
        "self_attn.q_proj": ["pifa", "16-17", "0.02", "0.035", "1.75"],
        "mlp.down_proj": ["pifa", "40", "0.02", "0.035", "1.50"],
    }
    assert "Ranks and losses" not in screen(render(report))


def test_long_lists_say_how_much_is_left_out(report):
    shown = screen(render(report))
    assert "Fallbacks: 15" in shown and "and 3 more in the JSON" in shown
    report["fallbacks"] = []
    assert "Fallbacks" not in screen(render(report))


def test_matrices_that_stayed_dense_are_counted_by_kind(report):
    report["left_dense"] = ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(40))]
    report["unsupported"] = ["model.layers.0.mixer.A_log"]
    for told in (screen(render(report)), model_card(report)):
        assert "Left dense: 41 (lm_head 1, mlp.gate 40)" in told and "Seen by no method: 1 (mixer.A_log 1)" in told


def test_brackets_in_names_are_text_and_not_markup(report):
    assert "[bold]window[/bold]" in screen(render(report))


def test_a_report_without_evaluation_calibration_or_layers_still_renders(report):
    bare = {**report, "evaluation": [], "tasks": {}, "layers": [], "calibration": None, "fallbacks": [], "warnings": []}
    shown = screen(render(bare))
    assert "needs no data" in shown and "2.40 GB" in shown and "perplexity" not in shown


def test_a_narrow_screen_loses_no_figure(report):
    assert "14.520" in screen(render(report), width=60).replace("\n", "")


def test_eval_of_one_model_shows_one_column(report):
    entry = {key: value for key, value in report["evaluation"][0].items() if key not in ("before", "paired_delta")}
    task = {"boolq": {"acc": {"value": 0.61, "stderr": 0.0085, "documents": 3270}}}
    shown = screen(render_eval({"model": "out/small", "evaluation": [entry], "tasks": task, "notes": ["one note"]}))
    assert "14.520 ± 0.081" in shown and "0.6100 ± 0.0085" in shown and "one note" in shown
    assert "before" not in shown and "ratio" not in shown


def test_eval_against_a_dense_model_names_both(report):
    result = {key: report[key] for key in ("evaluation", "tasks")}
    shown = screen(render_eval({"model": {"id": "/data/out/small"}, "against": "meta-llama/Llama-3.2-1B", **result}))
    assert "meta-llama/Llama-3.2-1B (dense)" in shown and "+0.3971 ± 0.0021" in shown and "/data" not in shown


# Words for numbers


@pytest.mark.parametrize(
    ("value", "stderr", "words"),
    [(9.7613, 0.0521, "9.761 ± 0.052"), (1234.5, 12.3, "1,234 ± 12"), (0.5, None, "0.5000"), (0.5, 0.0, "0.5000 ± 0")],
)
def test_a_value_is_rounded_to_two_digits_of_its_error(value, stderr, words):
    assert plus_minus(value, stderr) == words


def test_bytes_seconds_kinds_and_names_in_words(tmp_path, monkeypatch):
    assert [bytes_text(n) for n in (999, 1500, 13_480_000_000)] == ["999 bytes", "1.50 kB", "13.48 GB"]
    assert [seconds_text(s) for s in (8.24, 312, 11100)] == ["8.2 s", "5 min 12 s", "3 h 5 min"]
    assert layer_kind("model.layers.3.mlp.experts.7.down_proj") == "experts.down_proj"
    assert layer_kind("transformer.h.0.attn.c_attn") == "attn.c_attn"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "local").mkdir(parents=True)
    names = ("gpt2", "org/hub", "org/local", "/a/b/c/", "./x", r"C:\models\tiny")
    assert [base_name(name) for name in names] == ["gpt2", "org/hub", "local", "c", "x", "tiny"]
    assert base_name(".") == tmp_path.name
