"""Word perplexity in a compression's report: what `evaluate` finds of the same two models afterwards."""

import json

import pytest

from paredown.compress.errors import PareError
from paredown.compress.run.compress import compress
from paredown.compress.run.evaluate import evaluate
from paredown.evaluation.report import scores
from paredown.evaluation.tables import word_rows

TEXTS = ["the cat  sat on the mat", "a dog\nran under the big red house and it sat very still " * 3, "it was old"]


@pytest.fixture
def pages(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return str(path)


@pytest.fixture
def run(tiny_model, text_file, tmp_path, verified_here):
    def go(text, recipe="wanda-50", *overrides):
        small = ["calibration.sequences=3", "calibration.length=16", "evaluate.length=8", *overrides]
        out, calibration = tmp_path / "out", str(text_file)
        return compress(tiny_model, recipe, out, overrides=small, calibration=calibration, eval_text=[text], words=True)

    return go


def test_a_report_has_the_word_perplexity_of_both_models(run, pages, tiny_model, tmp_path):
    report = run(pages)
    found = report["evaluation"][0]["words"]
    assert found["documents"] == 3 and found["after"]["word_perplexity"] != found["before"]["word_perplexity"]
    assert (
        found
        == evaluate(tmp_path / "out", tiny_model, eval_text=[pages], words=True, length=8)["evaluation"][0]["words"]
    )
    assert word_rows(report["evaluation"]) in scores(report)


def test_a_text_without_documents_is_warned_of(run, text_file):
    report = run(str(text_file), "wanda-50", "calibration.allow_scored=true", "evaluate.windows=4")
    assert "words" not in report["evaluation"][0]
    assert any("no word perplexity" in warning for warning in report["warnings"])


def test_it_is_refused_where_a_model_is_recovered(run, pages, tmp_path):
    with pytest.raises(PareError, match=r"paredown eval .*out --against .*model --word-perplexity"):
        run(pages, "recover-distill", "method=wanda")
    assert not (tmp_path / "out").exists()
