"""What a run leaves beside the weights for people to read: report.json, report.html and the card."""

import json

import pytest
import yaml

from paredown.compress.run import record
from paredown.compress.run.compress import compress
from paredown.evaluation.html.page import report_page

TINY = ["calibration.sequences=4", "calibration.length=32", "evaluate.length=32", "evaluate.windows=2"]


@pytest.fixture
def run(tiny_model, text_file, tmp_path, monkeypatch, verified_here):
    """`run(recipe)`: compress a tiny model, its calibration text named by a relative path."""

    def go(recipe="wanda-50", notes=None, overrides=()):
        monkeypatch.chdir(text_file.parent)
        return compress(
            tiny_model, recipe, tmp_path / "out", overrides=[*TINY, *overrides], calibration=f"./{text_file.name}",
            eval_text=["stdlib"], note=(notes if notes is not None else []).append,
        )  # fmt: skip

    return go


def test_a_run_leaves_a_page_a_card_with_the_sources_licence_and_a_report_of_where_its_text_lies(
    run, tiny_model, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(record, "report_page", report_page)
    (tiny_model / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    report = run()
    card = (tmp_path / "out/README.md").read_text()
    data = yaml.safe_load(card.split("---\n")[1])
    assert (data["license"], data["language"]) == ("mit", "en")
    assert "smaller" in (tmp_path / "out/report.html").read_text()
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    assert report["calibration"]["source"] == str(text_file.resolve())
    assert report["dtype"] == "bfloat16" and report["device"]["type"] == "cpu" and report["date"].startswith("20")
    for key in ("before", "after"):
        assert sum(part[key] for part in report["parts"]) == report["bytes"][key]
    assert {"self_attn.q_proj", "mlp.down_proj"} <= {part["part"] for part in report["parts"]}


def test_blocks_that_were_tuned_are_in_the_report(run):
    report = run("paredown-prune-tuned-50", overrides=["reconstruct.steps=2", "reconstruct.batch=2"])
    assert [entry["block"] for entry in report["reconstruction"]] == ["model.layers.0", "model.layers.1"]
    assert all(0 <= entry["after"] <= entry["before"] for entry in report["reconstruction"])


def test_a_page_that_cannot_be_drawn_costs_no_run_and_a_damaged_card_of_the_source_is_a_warning(
    run, tiny_model, tmp_path, monkeypatch
):
    def fail(report):
        raise RuntimeError("a font is missing")

    monkeypatch.setattr(record, "report_page", fail)
    (tiny_model / "README.md").write_text("---\nlicense: [\n---\n")
    notes = []
    assert any("licence is not in the new card" in warning for warning in run(notes=notes)["warnings"])
    assert (tmp_path / "out/report.json").exists() and not (tmp_path / "out/report.html").exists()
    assert any("report.html was not written (RuntimeError: a font is missing)" in note for note in notes)
