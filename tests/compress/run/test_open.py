"""Texts of a run: one rule for the BOS of calibration and scoring, and a tokenizer that is the model's."""

import json

import pytest
from typer.testing import CliRunner

from paredown.commands.app import app
from paredown.compress.errors import PareError
from paredown.compress.run.evaluate import evaluate
from paredown.compress.run.open import open_source, resolve_recipe
from paredown.compress.run.texts import read_texts

SMALL = ["calibration.sequences=3", "calibration.length=16", "evaluate.length=16", "evaluate.windows=4"]


@pytest.fixture
def with_bos(tiny_model):
    """The tiny model, whose tokenizer now puts its special token before each text."""
    path = tiny_model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [256], "tokens": ["<eos>"]}},
    }
    path.write_text(json.dumps(content))
    return tiny_model


def texts_of(model, text_file, *overrides):
    from paredown.compress.checkpoint.hub import load_tokenizer

    recipe = resolve_recipe("wanda-50", [*SMALL, *overrides], calibration=str(text_file), eval_text=[str(text_file)])
    source = open_source(str(model))
    windows, evaluations, _ = read_texts(recipe, source, load_tokenizer(source.folder))
    return [windows, *evaluations]


def test_one_key_of_the_recipe_rules_calibration_and_scoring(with_bos, text_file):
    for windows in texts_of(with_bos, text_file):
        assert windows.ids[:, 0].tolist() == [256] * len(windows.ids) and windows.bos == "every window"
    calibration, scored = texts_of(with_bos, text_file, "bos=none")
    assert (scored.ids == 256).nonzero().tolist() == [[0, 0]] and scored.bos == "first window only"
    assert calibration.bos == "none" and not (calibration.ids == 256).any()
    with pytest.raises(PareError, match="bos: Input should be 'auto' or 'none'"):
        texts_of(with_bos, text_file, "bos=all")


def test_the_model_and_its_dense_original_are_scored_behind_the_same_bos(with_bos, text_file):
    options = {"eval_text": [str(text_file)], "length": 16, "windows": 4}
    (entry,) = evaluate(with_bos, with_bos, **options)["evaluation"]
    assert entry["bos"] == "every window" and entry["paired_delta"]["log_ratio"] == 0
    (papers,) = evaluate(with_bos, **options, bos="none")["evaluation"]
    assert papers["bos"] == "first window only" and papers["after"] != entry["after"]


def test_the_command_line_has_both_rules(with_bos, text_file):
    typed = ["eval", str(with_bos), "--eval-text", str(text_file), "--length", "16", "--windows", "2"]
    told = CliRunner().invoke(app, typed).stdout
    assert "BOS token: every window" in " ".join(told.split())
    told = CliRunner().invoke(app, [*typed, "--bos", "none", "--json"]).stdout
    assert json.loads(told)["evaluation"][0]["bos"] == "first window only"


def test_a_tokenizer_larger_than_the_embedding_is_told_before_any_work(tmp_path, save_model, tiny_config, text_file):
    tiny_config.vocab_size, tiny_config.eos_token_id = 100, 1
    tiny_config.bos_token_id = tiny_config.pad_token_id = 1
    save_model(tmp_path / "small", tiny_config)
    said = r"gives token \d+ for words.txt, and the model's embedding has 100 rows"
    with pytest.raises(PareError, match=said):
        texts_of(tmp_path / "small", text_file)
    with pytest.raises(PareError, match=said):
        evaluate(tmp_path / "small", eval_text=[str(text_file)], length=16, windows=4)
