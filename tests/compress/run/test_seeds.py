"""Several seeds in one command: the first one's checkpoint, the figures of all, and nothing done twice."""

import json

import pytest

from paredown.compress.errors import PareError
from paredown.compress.run import compress as module
from paredown.compress.run.compress import compress
from paredown.compress.run.seeds import seeds_of
from paredown.evaluation.seeds import seed_rows

SMALL = ["calibration.sequences=3", "calibration.length=16", "evaluate.length=16", "evaluate.windows=4"]


def test_seeds_are_a_number_or_a_list():
    assert seeds_of("3", 5) == (5, 6, 7) and seeds_of("4, 1,9", 0) == (4, 1, 9)
    assert seeds_of(2, 0) == (0, 1) == seeds_of([0, 1], 7)
    for wrong, told in (("a", "neither a number"), ("1", "at least two"), ("0,0", "different"), ("-1", "neither")):
        with pytest.raises(PareError, match=told):
            seeds_of(wrong, 0)


def test_each_seed_is_run_once_and_reported_and_the_first_is_kept(
    tiny_model, text_file, tmp_path, verified_here, monkeypatch
):
    options = {"overrides": SMALL, "calibration": str(text_file), "eval_text": [str(text_file)]}
    alone = compress(tiny_model, "wanda-50", tmp_path / "alone", seed=1, **options)
    began, one = [], module.compress_once

    def stopping(model, recipe, out, how, tokenizer=None):
        began.append(recipe.calibration.seed)
        if len(began) == 2:
            raise KeyboardInterrupt
        return one(model, recipe, out, how, tokenizer)

    monkeypatch.setattr(module, "compress_once", stopping)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_model, "wanda-50", tmp_path / "out", seeds="2", **options)
    assert began == [1, 0] and not list((tmp_path / "out.seeds/1").glob("*.safetensors"))
    report = compress(tiny_model, "wanda-50", tmp_path / "out", seeds="2", **options)
    assert began == [1, 0, 0] and not (tmp_path / "out.seeds").exists()
    assert report["recipe"]["calibration"]["seed"] == 0
    assert report["seeds"] == json.loads((tmp_path / "out/report.json").read_text())["seeds"]
    found = [(seed["seed"], seed["evaluation"][0]["log_ratio"]) for seed in report["seeds"]]
    assert found == [(n, of["evaluation"][0]["paired_delta"]["log_ratio"]) for n, of in enumerate((report, alone))]
    assert found[0] != found[1]
    with pytest.raises(PareError, match=r"exists and is not empty"):
        compress(tiny_model, "wanda-50", tmp_path / "out", seeds="2", **options)


def test_what_another_command_left_is_not_taken_for_ones_own(tiny_model, text_file, tmp_path):
    (tmp_path / "out.seeds/1").mkdir(parents=True)
    (tmp_path / "out.seeds/1/report.json").write_text(json.dumps({"recipe": {}, "model": {"id": "other"}}))
    with pytest.raises(PareError, match=r"out.seeds holds .*of another command"):
        compress(tiny_model, "wanda-50", tmp_path / "out", seeds=2, calibration=str(text_file))


def test_the_table_has_each_seed_their_mean_and_spread():
    def seed(number, ratio):
        text = {"corpus": "words", "split": "all", "token_perplexity": 9.0, "log_ratio": ratio, "stderr": 0.1}
        return {"seed": number, "evaluation": [text], "tasks": {"t": {"acc": 0.5}}}

    rows = seed_rows([seed(3, 0.1), seed(4, 0.3), seed(5, 0.2)])
    assert rows.headers == ("", "seed 3", "seed 4", "seed 5", "mean ± spread")
    assert rows.rows[0] == ("words (all), log ratio", "+0.1000", "+0.3000", "+0.2000", "+0.2000 ± 0.1000")
    assert rows.rows[1][0] == "t, acc" and "of seed 3" in rows.notes[0]
    assert seed_rows([]) is None
