"""The texts of a run: a text for both purposes is divided, what is scored never calibrates unasked, mixes are exact."""

import json
import random

import pytest
import torch

from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.errors import PareError
from paredown.compress.recipe import EvaluateSpec, Recipe
from paredown.compress.run.open import open_source
from paredown.compress.run.texts import read_texts, scored_texts
from paredown.compress.storage.kinds import FORMAT_VERSION

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def text(seed, tokens=4000):
    draw = random.Random(seed)
    return "\n".join("".join(draw.choice(LETTERS) for _ in range(39)) for _ in range(tokens // 40))


@pytest.fixture
def read(tiny_model, tmp_path, monkeypatch):
    """`read(calibration, scored)`: windows, evaluations, warnings and notes; texts are files of the folder."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        (tmp_path / f"{name}.txt").write_text(text(seed))
    source, notes = open_source(str(tiny_model)), []

    def run(calibration, scored=("b.txt",), later=None):
        calibration = {"source": "a.txt", "sequences": 8, "length": 64, **calibration}
        calibration = {k: v for k, v in calibration.items() if k != "source" or "sources" not in calibration}
        recipe = Recipe.parse({
            "method": "wanda", "options": {"sparsity": 0.5}, "calibration": calibration,
            "evaluate": {"perplexity": list(scored), "length": 64},
        })  # fmt: skip
        notes.clear()
        found = read_texts(recipe, source, load_tokenizer(source.folder), later, notes.append)
        return (*found, list(notes))

    return run


def decoded(windows):
    return [
        "".join(chr(i) for i in torch.where(row == 220, 32, torch.where(row == 198, 10, row + 33))) for row in windows
    ]


def test_one_text_for_both_is_divided_and_said_so(read, tmp_path):
    windows, (scored,), warnings, notes = read({}, ["a.txt"])
    whole = text(0)
    cut = whole.index(decoded(scored.ids)[0])
    assert cut >= 0.87 * len(whole) and all(row in whole[:cut] for row in decoded(windows.ids))
    assert (windows.split, scored.split, warnings) == ("all but the last tenth", "last tenth", [])
    assert notes == ["a.txt both calibrates and scores: its last tenth is scored, and all else of it calibrates"]
    assert windows.provenance()["whole_sha256"] == scored.provenance()["whole_sha256"]
    (tmp_path / "copy.txt").write_text(whole)
    assert read({}, ["copy.txt"])[1][0].corpus == "copy.txt" and torch.equal(read({}, ["copy.txt"])[0].ids, windows.ids)
    assert read({"source": "b.txt"}, ["a.txt"])[0].provenance().get("whole_sha256") is None


def test_what_a_later_stage_scores_does_not_calibrate_an_earlier_one(read):
    last = read({}, ["a.txt"])[0]
    first, evaluations, *_ = read({}, [], EvaluateSpec(perplexity=("a.txt",), length=64))
    assert torch.equal(first.ids, last.ids) and not evaluations


def test_a_text_in_which_another_is_hidden_is_refused_without_the_recorded_override(read, tmp_path):
    (tmp_path / "more.txt").write_text(text(5, 400) + "\n" + text(0) + "\n" + text(6, 400))
    settings = {"source": "more.txt", "sequences": 64}
    with pytest.raises(
        PareError, match=r"% of what is scored of a.txt is in the calibration.*--allow-scored-calibration"
    ):
        read(settings, ["a.txt"])
    _, _, (warning,), _ = read({**settings, "allow_scored": True}, ["a.txt"])
    assert "the figure after compression is flattered" in warning


def test_the_override_leaves_a_text_whole_and_warns(read):
    windows, (scored,), warnings, notes = read({"allow_scored": True}, ["a.txt"])
    assert (windows.split, scored.split, notes) == ("all", "all", [])
    assert warnings == ["a.txt both calibrates and scores: the figure after compression is flattered."]


def test_a_mix_takes_windows_by_weight_and_records_each_text(read):
    mix = {"sources": [{"source": "a.txt", "weight": 3}, "b.txt"]}
    windows, *_ = read({**mix, "sequences": 10}, [])
    found = decoded(windows.ids)
    assert [sum(row in text(seed) for row in found) for seed in (0, 1)] == [8, 2]
    assert [part["sequences"] for part in windows.provenance()["sources"]] == [8, 2]
    (divided, other) = read(mix, ["a.txt"])[0].provenance()["sources"]
    assert divided["split"] == "all but the last tenth" and other["split"] == "all"


def test_too_few_windows_of_one_text_of_a_mix_are_told_with_what_to_type(read, tmp_path):
    (tmp_path / "short.txt").write_text("short text " * 9)
    mix = {"sources": [{"source": "a.txt"}, {"source": "short.txt", "weight": 3}], "sequences": 40}
    with pytest.raises(
        PareError, match=r"short.txt has 99 tokens, and 30 windows of 64 need 240.*lower its weight: 1 are"
    ):
        read(mix, [])
    mix = {"sources": [{"source": "a.txt", "weight": 100}, {"source": "b.txt"}]}
    with pytest.raises(PareError, match=r"of 8 calibration windows none is of b.txt, which has a weight of 1: raise"):
        read(mix, [])


def test_a_text_too_short_to_be_divided_is_told(read, tmp_path):
    (tmp_path / "one.txt").write_text("word")
    with pytest.raises(PareError, match=r"one.txt \(.*tenth\) has|too short to calibrate and to score"):
        read({"source": "one.txt"}, ["one.txt"])


def test_eval_scores_the_part_that_did_not_calibrate(read, tiny_model, tmp_path):
    notes, tokenizer = [], load_tokenizer(tiny_model)
    names, (windows, evaluations, *_) = ["a.txt", "b.txt"], read({}, ["a.txt"])
    record = {"format_version": FORMAT_VERSION, "tensors": {}, "calibration": windows.provenance()}
    (tiny_model / "paredown.json").write_text(json.dumps(record))
    held, other = scored_texts(names, tiny_model, tokenizer, notes.append)
    assert (held.sha256, other.split) == (evaluations[0].sha256, "all")
    assert notes == ["a.txt calibrated this model, all but its last tenth, which is scored"]
    record["calibration"] = read({"sources": ["a.txt", "b.txt"]}, [])[0].provenance()
    (tiny_model / "paredown.json").write_text(json.dumps(record))
    assert [c.split for c in scored_texts(names, tiny_model, tokenizer, notes.append)] == ["all", "all"]
    assert notes[-1] == "b.txt calibrated this model: its figure is flattered"
