"""Without the packages of the extra `eval`: the job is done with plain text, and what needs them says so before it begins."""

import pytest

from paredown.compress import PareError, compress, evaluate
from paredown.compress.text.corpora import load_corpus


@pytest.fixture(autouse=True)
def without(monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks", "datasets", "pyarrow", "pandas"):
        monkeypatch.setitem(__import__("sys").modules, name, None)


def test_a_model_is_compressed_and_scored(tiny_model, text_file, tmp_path):
    report = compress(
        tiny_model, "wanda-50", tmp_path / "out", calibration=str(text_file), eval_text=[str(text_file)],
        overrides=["calibration.sequences=4", "calibration.length=32", "evaluate.length=32", "evaluate.windows=4"],
        allow_scored_calibration=True,
    )  # fmt: skip
    assert report["evaluation"][0]["paired_delta"]["log_ratio"] != 0


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "org/name", "wikitext2"])
def test_texts_of_other_forms_say_what_to_install(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(PareError, match="pip install 'datasets"):
        load_corpus(name, "calibration")


def test_tasks_and_words_say_what_to_install_before_the_work(tiny_model, text_file, tmp_path):
    with pytest.raises(PareError, match="pip install 'lm-eval"):
        compress(tiny_model, "wanda-50", tmp_path / "out", calibration=str(text_file), tasks=["stdlib_lines"])
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(PareError, match="pip install 'lm-eval"):
        evaluate(tiny_model, eval_text=[str(text_file)], words=True)
