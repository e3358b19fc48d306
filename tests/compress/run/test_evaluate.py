"""`evaluate`: tasks kept one by one, the dense model's from the cache, samples, word perplexity, warnings; lm-eval's figures."""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.run import whole
from paredown.compress.run.evaluate import evaluate
from paredown.compress.run.remarks import only_stdlib
from paredown.evaluation.reference import model_path
from paredown.evaluation.report import render_eval
from paredown.evaluation.terminal import out_console


@pytest.fixture
def pages(tmp_path):
    path = tmp_path / "pages.jsonl"
    texts = [
        "the cat  sat on the mat",
        "a dog\nran under the big red house and then it sat very still " * 3,
        "it was old",
    ]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path, texts


@pytest.fixture
def runs(monkeypatch):
    """The tasks that were really run, in order."""
    names, real = [], whole.run_tasks

    def run(model, tokenizer, wanted, **options):
        names.extend(wanted)
        return real(model, tokenizer, wanted, **options)

    monkeypatch.setattr(whole, "run_tasks", run)
    return names


def scored(model, text_file, **more):
    return evaluate(model, **{"eval_text": [str(text_file)], "length": 32, "windows": 3, **more})


def test_a_stopped_evaluation_goes_on_with_the_tasks_that_are_missing(
    tiny_model, tasks, text_file, tmp_path, runs, monkeypatch
):
    asked = dict(tasks=("one", "two"), task_folder=tasks, out=tmp_path / "out")
    counted = whole.run_tasks

    def stops(model, tokenizer, wanted, **options):
        if wanted == ["two"]:
            raise KeyboardInterrupt
        return counted(model, tokenizer, wanted, **options)

    with monkeypatch.context() as patch:
        patch.setattr(whole, "run_tasks", stops)
        with pytest.raises(KeyboardInterrupt):
            scored(tiny_model, text_file, **asked)
    assert runs == ["one"]
    result = scored(tiny_model, text_file, **asked)
    assert runs == ["one", "two"] and set(result["tasks"]) == {"one", "two"}
    kept = tmp_path / "out" / "evaluation"
    assert json.loads((kept / "result.json").read_text()) == json.loads(json.dumps(result))
    lines = (kept / "after" / "one.jsonl").read_text().splitlines()
    assert len(lines) == 7 and json.loads(lines[0])["doc"]["q"] == "0 and"
    assert scored(tiny_model, text_file, **asked) == result and runs == ["one", "two"]
    (kept / "after" / "one.jsonl").write_text("\n".join(lines[:3]))
    assert scored(tiny_model, text_file, **asked) == result and runs == ["one", "two", "one"]
    other = tasks / "mc.jsonl"
    other.write_text(other.read_text().replace('"6 and"', '"7 and"'))
    scored(tiny_model, text_file, **asked)
    assert runs == ["one", "two", "one", "one", "two"]  # other questions


def test_the_dense_models_tasks_are_run_once_for_all_that_are_compared_with_it(
    tiny_model, tasks, text_file, tmp_path, runs, monkeypatch, prune
):
    monkeypatch.setenv("PAREDOWN_CACHE_GB", "1")
    monkeypatch.setenv("PAREDOWN_CACHE", str(tmp_path / "cache"))
    prune(tiny_model, tmp_path / "packed")
    notes = []
    asked = dict(against=tiny_model, tasks=("one",), task_folder=tasks, note=notes.append)
    first = scored(tmp_path / "packed", text_file, **asked)
    assert runs == ["one", "one"]
    assert (
        first["tasks"]["one"]["acc"]["correct_to_wrong"] is not None
        and first["evaluation"][0]["divergence"]["kl_mean"] > 0
    )
    assert scored(tmp_path / "packed", text_file, **asked) == first
    assert runs == ["one", "one", "one"]
    assert [note.split(" taken")[0] for note in notes if "taken" in note] == [
        "dense scores of words.txt",
        "dense scores of the task one",
    ]
    assert scored(tmp_path / "packed", text_file, cache=False, **asked) == first and len(runs) == 5


def test_samples_are_the_likeliest_tokens_of_both_models_side_by_side(tiny_model, text_file, capsys):
    result = scored(tiny_model, text_file, against=tiny_model, samples=True, eval_text=[])
    assert [sample["prompt"] for sample in result["samples"]] == list(whole.PROMPTS)
    assert all(sample["before"] == sample["after"] for sample in result["samples"])
    model, tokenizer = transformers_plugin.load(tiny_model).eval(), load_tokenizer(tiny_model)
    ids = list(tokenizer(whole.PROMPTS[0])["input_ids"])
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < whole.NEW_TOKENS and (len(ids) == start or ids[-1] != 256):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert result["samples"][0]["after"] == tokenizer.decode(ids[start:], skip_special_tokens=True)
    out_console.print(render_eval(result))
    assert "The capital of France is" in capsys.readouterr().out


def test_a_chat_model_is_asked_through_its_template(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    model, seen = transformers_plugin.load(tiny_model).eval(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    whole.continued(model, tokenizer, "hello")
    assert tokenizer.decode(seen[0][0]) == "<user>hello<me>"


def test_word_perplexity_is_the_loss_of_whole_documents_by_their_words(tiny_model, pages, capsys):
    path, texts = pages
    result = scored(tiny_model, path, against=tiny_model, words=True, length=8, windows=30)
    found = result["evaluation"][0]["words"]
    model, tokenizer = transformers_plugin.load(tiny_model).eval(), load_tokenizer(tiny_model)
    loss, length = 0.0, 64
    for text in texts:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        for start in range(0, len(ids), length):
            predicted = ids[start : start + length]
            row = [256, *ids[: start + len(predicted)]][-(length + 1) :]
            with torch.no_grad():
                log_p = model(torch.tensor([row[:-1]])).logits[0].double().log_softmax(-1)
            loss -= sum(log_p[at - 1, row[at]].item() for at in range(len(row) - len(predicted), len(row)))
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    assert (found["words"], found["documents"]) == (words, 3)
    assert math.log(found["after"]["word_perplexity"]) == pytest.approx(loss / words, rel=1e-3)  # bfloat16
    assert found["before"] == found["after"] and found["log_ratio"] == 0.0
    out_console.print(render_eval(result))
    assert "Word perplexity" in capsys.readouterr().out


def test_a_text_of_one_document_has_no_word_perplexity(tiny_model, text_file):
    assert "words" not in scored(tiny_model, text_file, words=True)["evaluation"][0]


def test_a_general_model_on_the_standard_library_alone_is_warned_of(tiny_model):
    source = ModelSource(tiny_model, "tiny")
    (warning,) = only_stdlib(source, ["stdlib"], ["stdlib"])
    assert "calibrated and scored on stdlib alone" in warning and "--eval-text" in warning
    (warning,) = only_stdlib(source, ["wikitext2"], ["stdlib"])
    assert "the model is scored on stdlib" in warning and "--calibration" not in warning
    assert not list(only_stdlib(source, ["stdlib", "c4"], ["stdlib", "wikitext2"]))
    assert not list(only_stdlib(source, (), ()))
    assert not list(only_stdlib(ModelSource(model_path(), "bundled"), ["stdlib"], ["stdlib"]))


def test_the_bundled_task_scores_as_lm_eval_itself_to_the_last_digit():
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from paredown.evaluation.lm_tasks import run_tasks
    from paredown.evaluation.task_index import OURS

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path()), AutoTokenizer.from_pretrained(model_path())
    ours = run_tasks(model, tokenizer, ["stdlib_lines"], limit=8).scores["stdlib_lines"]
    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(model_path()), batch_size=8),
        tasks=["stdlib_lines"],
        task_manager=TaskManager(include_path=[OURS], include_defaults=False),
        limit=8,
    )["results"]["stdlib_lines"]
    for metric in ("acc", "acc_norm"):
        assert (ours[metric].value, ours[metric].stderr) == (theirs[f"{metric},none"], theirs[f"{metric}_stderr,none"])


def test_models_with_other_tokenizers_are_refused_before_they_are_run(tiny_model, text_file):
    with pytest.raises(PareError, match="different tokenizers"):
        scored(tiny_model, text_file, against=model_path())
