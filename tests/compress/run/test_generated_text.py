"""Text that the model writes to calibrate itself: seeded, written once, and refused where the model does not fit."""

import json

import datasets
import pytest
import transformers

from paredown.compress.errors import PareError
from paredown.compress.recipe import Recipe
from paredown.compress.run import generated_text as module
from paredown.compress.run.generated_text import with_own_text
from paredown.compress.run.once import How
from paredown.compress.run.stages import finished
from paredown.compress.text.corpora import load_corpus


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def recipe_of(**calibration):
    spec = {"source": "self", "sequences": 4, "length": 32, **calibration}
    spec = {key: value for key, value in spec.items() if value is not None}
    return Recipe.parse({"method": "wanda", "options": {"sparsity": 0.5}, "calibration": spec})


def text_of(recipe):
    return load_corpus(recipe.calibration.texts[0].source, "calibration")


def test_the_model_writes_enough_text_once_for_all_that_it_depends_on(tiny_model, monkeypatch):
    written = []
    whole = module._written
    monkeypatch.setattr(module, "_written", lambda *args: written.append(1) or whole(*args))
    one = with_own_text(tiny_model, recipe_of(), How())
    assert with_own_text(tiny_model, recipe_of(), How()) == one and len(written) == 1
    corpus = text_of(one)
    assert (corpus.name, corpus.split) == ("self", "written by the model") and len(corpus.documents) >= 4
    assert one.calibration.source.startswith("self:") and one.bos == "auto"
    others = [{"seed": 1}, {"generate": {"temperature": 0.5}}]
    texts = [text_of(with_own_text(tiny_model, recipe_of(**change), How())).sha256 for change in others]
    assert len({corpus.sha256, *texts}) == 3 == len(written)
    (tiny_model.parent / "cache").rename(tiny_model.parent / "gone")
    assert text_of(with_own_text(tiny_model, recipe_of(), How())).sha256 == corpus.sha256
    plain = recipe_of(source="a.txt")
    assert with_own_text(tiny_model, plain, How()) is plain


def test_one_of_several_texts_may_be_the_models_own_and_it_may_go_on_from_another(tiny_model, text_file):
    sources = [{"source": str(text_file)}, "self"]
    mixed = with_own_text(tiny_model, recipe_of(source=None, sources=sources), How())
    first, own = mixed.calibration.texts
    assert first.source == str(text_file) and own.source.startswith("self:")
    going_on = with_own_text(tiny_model, recipe_of(generate={"prefixes": str(text_file)}), How())
    begun = [document[: module.PREFIX] for document in text_of(going_on).documents]
    assert all(start in text_file.read_text() for start in begun)


def test_sampling_is_as_asked_and_of_the_whole_vocabulary(tiny_model, monkeypatch):
    asked = []
    generate = transformers.LlamaForCausalLM.generate
    monkeypatch.setattr(
        transformers.LlamaForCausalLM,
        "generate",
        lambda self, *args, **k: asked.append(k) or generate(self, *args, **k),
    )
    with_own_text(tiny_model, recipe_of(generate={"temperature": 0.7, "top_p": 0.8}), How())
    config = asked[0]["generation_config"]
    assert (config.do_sample, config.temperature, config.top_p, config.top_k, config.max_new_tokens) == (
        True,
        0.7,
        0.8,
        0,
        32,
    )


def test_a_model_that_does_not_fit_and_one_that_ends_at_once_are_told(tiny_model, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: 1000)
    with pytest.raises(PareError, match=r"must fit into memory: .*--calibration own.jsonl"):
        with_own_text(tiny_model, recipe_of(), How())
    monkeypatch.undo()
    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", lambda self, ids, **options: ids)
    with pytest.raises(PareError, match=r"wrote 0 tokens in 64 texts, where 134 are wanted.*prefixes"):
        with_own_text(tiny_model, recipe_of(), How())


def test_self_is_refused_where_no_model_writes(tmp_path):
    with pytest.raises(PareError, match="text that the model writes, which only compress reads"):
        load_corpus("self", "evaluation")
    with pytest.raises(PareError, match=r"is not in .* any more: name it self"):
        load_corpus("self:abc", "calibration")


def test_a_finished_run_is_known_by_what_was_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("paredown.compress.run.stages.check_report", lambda report: None)
    asked = recipe_of()
    ran = asked.to_dict()
    ran["calibration"]["source"] = "self:0123abcd"
    (tmp_path / "report.json").write_text(json.dumps({"recipe": ran, "model": {"id": "m"}}))
    assert finished(tmp_path, "m", asked) is not None
    with pytest.raises(PareError, match="of another command"):
        finished(tmp_path, "m", recipe_of(seed=1))
