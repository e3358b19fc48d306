"""`recover` from a compressed folder to a new one: form, lineage, scores, and what may go wrong on the way."""

import json
import math
import re
import shutil

import datasets
import pytest
import recovering
import torch
import yaml
from recovering import Stopped, weights

from paredown.compress import compress, evaluate, recover
from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.stream import BATCH_TOKENS
from paredown.compress.progress import Progress
from paredown.compress.recipe import Recipe
from paredown.compress.recovery.distill import Distillation
from paredown.compress.run import generated_text, once
from paredown.compress.run import recover_once as recover_once_module
from paredown.compress.run.once import How
from paredown.compress.run.recover_once import recover_once
from paredown.compress.run.recover_text import recovery_texts
from paredown.compress.run.score_cache import ScoreCache
from paredown.compress.run.verify import verify
from paredown.evaluation.recovery_words import recovery_lines

DISTILL = {"tokens": 10 * 64, "length": 32, "batch": 2, "lr": 0.01, "heldout": 4, "evaluations": 3, "top_k": 16}


@pytest.fixture(scope="session")
def dense(lively):
    return lively()


@pytest.fixture(scope="session")
def compressed(lively):
    """`compressed(form)`: that model, compressed."""
    return lambda form="2:4": lively(form)


def recipe_of(text, steps=(), **distill):
    return recovering.recipe_of(text, list(steps) or [{"distill": {**DISTILL, **distill}}])


@pytest.fixture(scope="module")
def recovered(dense, compressed, text_file, tmp_path_factory):
    """`recovered(form)`: the folder of a whole recovery but for the process that verifies, its report and its notes.

    All of them share a cache of scores.
    """
    known, cache = {}, ScoreCache(tmp_path_factory.mktemp("cache"), 1 << 30)

    def make(form="2:4"):
        if form not in known:
            out, notes = tmp_path_factory.mktemp("recovered") / "out", []
            how = How(progress=Progress(note=notes.append), command="paredown recover", cache=cache)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(once, "_verify", lambda folder, note: None)
                known[form] = out, recover_once(compressed(form), dense, recipe_of(text_file), out, how), notes
        return known[form]

    return make


@pytest.fixture
def train(trained):
    """`train(checkpoint, ...)`: `trained` by steps, or by one of distillation."""
    how = ("notes", "save_every", "then", "doing")

    def run(checkpoint, steps=(), **options):
        told = {key: options.pop(key) for key in how if key in options}
        return trained(checkpoint, list(steps) or [{"distill": {**DISTILL, **options}}], **told)

    return run


def check_form(before, after, form):
    """After training only numbers differ, and of those no zero of a pruned weight, no embedding and no index."""
    assert before.keys() == after.keys()
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert {name for name in before if "embed" in name or not before[name].is_floating_point()}.isdisjoint(changed)
    assert any("down_proj" in name for name in changed)
    assert all(t.dtype == after[name].dtype and t.shape == after[name].shape for name, t in before.items())
    if form == "dense":
        pruned = [name for name, t in before.items() if "proj" in name and float((t == 0).float().mean()) > 0.4]
        assert pruned and all(torch.equal(before[name] == 0, after[name] == 0) for name in pruned)
    return changed


def check_told(step):
    assert step["after"] < step["before"] and step["tokens"] == 640 and step["stopped"] == "all its tokens were seen"
    assert [seen for seen, _ in step["curve"]] == [0, 256, 512, 640] and step["trained"] > 0


@pytest.mark.parametrize("form", ["2:4", "lowrank"])
def test_a_recovered_checkpoint_is_as_it_was_but_for_its_numbers(form, recovered, compressed):
    out, report, _ = recovered(form)
    assert verify(out) == []
    assert "model.norm.weight" in check_form(weights(compressed(form)), weights(out), form)
    check_told(report["recovery"][0])


@pytest.mark.parametrize("form", ["0.5", "dense", "blocks"])
def test_the_steps_leave_every_form_as_it_was_but_for_its_numbers(form, train, compressed, tmp_path):
    (step,) = train(compressed(form))
    assert "model.norm.weight" in check_form(weights(compressed(form)), weights(tmp_path / "out"), form)
    check_told(step)


def test_three_models_are_scored_and_the_way_is_recorded(recovered, dense, text_file):
    out, report, _ = recovered()
    text = report["evaluation"][0]
    lost, left = (
        math.log(text[k]["token_perplexity"] / text["before"]["token_perplexity"]) for k in ("compressed", "after")
    )
    assert text["paired_delta"]["log_ratio"] == pytest.approx(left, abs=1e-6)
    assert text["recovered_delta"]["log_ratio"] == pytest.approx(left - lost, abs=1e-6)
    assert json.loads((out / "report.json").read_text()) == report
    record = json.loads((out / "paredown.json").read_text())
    assert record["recipe"]["method"] == "wanda" and record["layers"]
    assert record["recovery"][0]["tokens"] == 640 and record["recovery"][0]["teacher"]["id"] == str(dense)
    assert record["recovery"][0]["recipe"]["recover"][0]["distill"]["lr"] == 0.01
    anew = evaluate(out, dense, eval_text=[str(text_file)], length=32, windows=4, cache=False)["evaluation"][0]
    assert text["divergence"] == anew["divergence"] and text["before"] == anew["before"]


def test_the_dense_model_is_scored_once_for_all_recoveries(recovered):
    runs = [recovered("2:4"), recovered("lowrank")]
    assert any("dense scores of" in note for _, _, notes in runs for note in notes)
    first, second = (report["evaluation"][0] for _, report, _ in runs)
    assert first["before"] == second["before"] and first["after"] != second["after"]


@pytest.mark.slow
def test_tasks_and_samples_are_of_the_dense_and_the_recovered_model(
    dense, compressed, text_file, tasks, tmp_path, verified_here
):
    recipe, asked = recipe_of(text_file, tokens=128), dict(tasks=["one"], task_folder=tasks, cache=False)
    with pytest.raises(PareError, match="elsewhere"):
        recover(compressed(), dense, recipe, tmp_path / "out", **{**asked, "tasks": ["elsewhere"]})
    report = recover(compressed(), dense, recipe, tmp_path / "out", samples=True, **asked)
    alone = evaluate(tmp_path / "out", against=dense, eval_text=[str(text_file)], length=32, windows=4, **asked)
    assert report["tasks"] == alone["tasks"] and report["tasks"]["one"]["acc"]["paired_stderr"] is not None
    assert len(report["samples"]) == 5 and {"before", "after"} <= report["samples"][0].keys()


WAYS = {
    "hidden": {"weight": 0.5, "every": 1}, "taid": True, "loss": "mixed",
    "data": {"choose": "disagreement", "budget": 0.5, "clusters": 3},
}  # fmt: skip


def test_every_way_of_distilling_goes_on_to_the_same_bytes_and_is_told(train, compressed, tmp_path, monkeypatch):
    notes, step, taken = [], Distillation._step, []
    (whole,) = train(compressed(), notes=notes, **WAYS)
    numbers = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    def dies(self):
        taken.append(self.course.share)
        if len(taken) == 6:
            raise Stopped
        step(self)

    monkeypatch.setattr(Distillation, "_step", dies)
    with pytest.raises(Stopped):
        train(compressed(), save_every=0.0, **WAYS)
    monkeypatch.setattr(Distillation, "survey", None)  # the windows are not chosen anew
    (told,) = train(compressed(), save_every=0.0, **WAYS)
    assert told["curve"] == whole["curve"] and told["choice"] == whole["choice"] and taken[5] == taken[6] > taken[0]
    assert all(torch.equal(t, numbers[name]) for name, t in weights(tmp_path / "out").items())
    choice = told["choice"]
    assert (choice["candidates"], choice["rows"]) == (40, 20) and told["text"]["sequences"] == 40
    assert choice["chosen_divergence"] > choice["divergence"] and told["passes"] == 1.0
    assert sum(cluster["windows"] for cluster in choice["clusters"]) == 40
    assert any(note.startswith("training on 20 of 40 windows: their divergence is") for note in notes)
    report = {"recovery": [{"recipe": {}, **told}], "evaluation": []}
    (line,) = recovery_lines(report)
    assert "on 640 tokens of words.txt (20 of 40 windows, where the divergence was" in line
    assert "towards dense with hidden states at weight 0.5, an interpolated teacher; divergence" in line


def test_hidden_states_of_another_size_or_number_are_refused(
    compressed, dense, text_file, save_model, tiny_config, tmp_path
):
    recipe = recipe_of(text_file, hidden={"every": 1})
    with pytest.raises(PareError, match=r"every compares block by block, and .* has 1 blocks, .* 2\. Leave every out"):
        recover_once(compressed("blocks"), dense, recipe, tmp_path / "out", How())
    tiny_config.vocab_size, tiny_config.hidden_size = 320, 64
    save_model(tmp_path / "wide", tiny_config)
    with pytest.raises(PareError, match=r"have 32 numbers, of .*wide 64\. Leave hidden out"):
        recover_once(compressed(), tmp_path / "wide", recipe, tmp_path / "out", How())


def test_a_recovery_trains_on_what_the_teacher_writes(compressed, dense, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    recipe = Recipe.parse(
        {**recipe_of(text_file).to_dict(), "calibration": {"source": "self", "length": 32, "sequences": 2}}
    )
    texts = []

    def stop(recipe, source, tokenizer, note):
        texts.append(recovery_texts(recipe, source, tokenizer, note))
        raise Stopped

    monkeypatch.setattr(recover_once_module, "recovery_texts", stop)
    writers = []
    whole = generated_text._written
    monkeypatch.setattr(
        generated_text, "_written", lambda source, *rest: writers.append(source.id) or whole(source, *rest)
    )
    with pytest.raises(Stopped):
        recover_once(compressed(), dense, recipe, tmp_path / "out", How())
    ((text, heldout),) = texts[0].steps
    assert writers == [str(dense)] and text.corpus == "self"
    assert text.ids.shape == (20, 32) and heldout.ids.shape == (4, 32)  # as much as the recovery takes


def test_a_long_text_is_trained_on_all_over_and_its_end_is_held_out(dense, tmp_path):
    lines, text = 4000, tmp_path / "long.txt"
    text.write_text("".join(f"line {i} of many\n" for i in range(lines)))
    tokenizer = load_tokenizer(dense)
    steps = recovery_texts(recipe_of(text), ModelSource(dense, "dense"), tokenizer, lambda note: None).steps
    drawn, heldout = (
        [int(i) for row in windows.ids for i in re.findall(r"line (\d+) of", tokenizer.decode(row))]
        for windows in steps[0]
    )
    assert min(drawn) < lines / 4 and lines / 2 < max(drawn) < 0.9 * lines <= min(heldout)
    assert [len(windows.ids) for windows in steps[0]] == [20, 4]


def test_a_recovery_that_is_killed_goes_on_to_the_same_bytes(recovered, train, compressed, tmp_path, monkeypatch):
    whole, report, _ = recovered()
    step, taken = Distillation._step, []

    def dies(self):
        taken.append(self.course.step)
        if len(taken) == 6:
            raise Stopped
        step(self)

    monkeypatch.setattr(Distillation, "_step", dies)
    with pytest.raises(Stopped):
        train(compressed(), save_every=0.0)
    notes = []
    (told,) = train(compressed(), save_every=0.0, notes=notes)
    assert "going on after 5 of 10 steps" in notes and taken == [*range(6), *range(5, 10)]
    assert told["curve"] == report["recovery"][0]["curve"]
    first, second = weights(whole), weights(tmp_path / "out")
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    assert not (tmp_path / "out.partial").exists() and not list((tmp_path / "out").glob("targets*"))


def test_a_recovery_that_is_killed_after_training_does_not_train_again(train, compressed, monkeypatch):
    def dies():
        raise Stopped

    with pytest.raises(Stopped):
        train(compressed(), save_every=0.0, then=dies)
    monkeypatch.setattr(Distillation, "_step", None)
    assert train(compressed(), save_every=0.0)[0]["steps"] == 10


@pytest.mark.parametrize("form", ["2:4", "dense", "lowrank"])
def test_blocks_of_a_checkpoint_are_tuned_towards_the_dense_ones(form, train, compressed, dense, text_file, tmp_path):
    steps = [{"reconstruct": {"steps": 12, "batch": 4}}]
    (step,) = train(compressed(form), steps=steps)
    assert "model.norm.weight" not in check_form(weights(compressed(form)), weights(tmp_path / "out"), form)
    assert [entry["block"] for entry in step["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert (
        all(0 < entry["after"] < 0.97 * entry["before"] for entry in step["blocks"]) and step["tokens"] == 12 * 4 * 32
    )
    source = ModelSource(dense, "dense")
    text, _ = recovery_texts(recipe_of(text_file, steps), source, load_tokenizer(dense), lambda note: None).steps[0]

    def outputs(folder):
        """Of the last block, by transformers' own forward pass."""
        model, found = transformers_plugin.load(folder), []
        model.model.layers[1].register_forward_hook(lambda module, args, output: found.append(output.double()))
        with torch.no_grad():
            model(text.ids, use_cache=False)
        return found[0]

    wanted, found = outputs(dense), outputs(tmp_path / "out")
    error = float((found - wanted).square().mean() / wanted.var(correction=0))
    assert step["blocks"][1]["after"] == pytest.approx(error, rel=1e-2)


def test_tuning_that_is_killed_goes_on_with_the_next_block_to_the_same_bytes(train, compressed, tmp_path, monkeypatch):
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 64)  # two windows: the last batch is held out
    steps, seen = [{"reconstruct": {"steps": 4, "batch": 4, "heldout": 2}}], []
    whole = train(compressed(), steps=steps)
    assert whole[0]["heldout"]["sequences"] == 2 and whole[0]["text"]["sequences"] == 8
    numbers = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    def dies(text):
        if text == "tuning model.layers.1, step 2 of 4":
            raise Stopped

    with pytest.raises(Stopped):
        train(compressed(), save_every=0.0, steps=steps, doing=dies)
    again = train(compressed(), save_every=0.0, steps=steps, doing=seen.append)
    assert seen[0] == "tuning model.layers.1, step 1 of 4" and again[0]["blocks"] == whole[0]["blocks"]
    assert all(torch.equal(t, numbers[name]) for name, t in weights(tmp_path / "out").items())


def test_blocks_that_stand_for_none_of_the_teacher_s_are_not_tuned(compressed, dense, text_file, tmp_path):
    recipe = recipe_of(text_file, [{"reconstruct": {}}])
    with pytest.raises(PareError, match=r"has 1 blocks of width 32, .* 2 of width 32\. .*take distill alone"):
        recover_once(compressed("blocks"), dense, recipe, tmp_path / "out", How())


def nan_at(steps, monkeypatch):
    """From now on the losses of these training steps, counted as they are taken, are NaN."""
    loss, taken = Distillation._loss, []

    def broken(self, windows):
        taken.append(None)
        return loss(self, windows) * (math.nan if len(taken) in steps else 1)

    monkeypatch.setattr(Distillation, "_loss", broken)


@pytest.mark.parametrize("save_every", [0.0, 300.0], ids=["saved", "not yet saved"])
def test_a_loss_that_is_not_finite_goes_back_and_on_at_half_the_rate(save_every, train, compressed, monkeypatch):
    nan_at([4], monkeypatch)
    notes = []
    (step,) = train(compressed(), notes=notes, save_every=save_every)
    assert any("back to the last good state, with half the learning rate" in note for note in notes)
    assert "half the learning rate" in step["remarks"][0] and step["steps"] == 10


def test_steps_that_are_too_long_are_halved_from_the_beginning_on(train, compressed):
    notes = []
    (step,) = train(compressed(), notes=notes, lr=0.9, warmup=0.0, tokens=512, evaluations=4)
    assert any("higher than before training: back to the beginning, with half the learning rate" in n for n in notes)
    assert "half the learning rate" in step["remarks"][0] and step["curve"][0][0] == 0 and step["curve"][1][0] == 128


def test_a_loss_that_is_not_finite_again_is_an_error(train, compressed, monkeypatch, tmp_path):
    nan_at([4, 6], monkeypatch)
    with pytest.raises(PareError, match=r"diverged twice .*Lower recover: distill.lr"):
        train(compressed())
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_reads_other_tokens_is_refused(
    compressed, dense, text_file, save_model, tiny_config, tmp_path, tokenizer
):
    def go(teacher):
        recover(compressed(), teacher, recipe_of(text_file), tmp_path / "out")

    tiny_config.vocab_size = 384
    save_model(tmp_path / "wider", tiny_config)
    with pytest.raises(PareError, match=r"knows 384 tokens and .* 320"):
        go(tmp_path / "wider")
    other = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = other["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    tiny_config.vocab_size = 320
    save_model(tmp_path / "other", tiny_config)
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(PareError, match="has another tokenizer than"):
        go(tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_fitted_too_closely_ends_the_training_and_the_report_says_so(train, compressed):
    (step,) = train(compressed(), tokens=64 * 90, lr=0.5, evaluations=90, patience=2)
    assert "has not fallen for 2 evaluations" in step["stopped"] and step["tokens"] < 64 * 90
    assert step["after"] == min(value for _, value in step["curve"])


def test_a_recipe_compresses_and_recovers(dense, text_file, tmp_path, verified_here):
    raw = {
        "method": "magnitude",
        "options": {"sparsity": "2:4"},
        "calibration": {"source": str(text_file), "sequences": 4, "length": 32, "allow_scored": True},
        "evaluate": {"perplexity": [str(text_file)], "length": 32, "windows": 4},
        "recover": [{"reconstruct": {"steps": 4}}, {"distill": {**DISTILL, "loss": "mixed", "tokens": 128}}],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    report = compress(dense, str(tmp_path / "r.yaml"), tmp_path / "out")
    assert [step["step"] for step in report["recovery"]] == ["reconstruct", "distill"]
    assert report["recovery"][1]["settings"]["loss"] == "mixed" and report["evaluation"][0]["divergence"]
    assert "mean error of the blocks" in (tmp_path / "out" / "README.md").read_text()
    assert report["model"]["id"] == str(dense) and report["recipe"]["recover"] and report["layers"]
    assert report["evaluation"][0]["compressed"] and verify(tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_a_recipe_that_only_recovers_does_not_compress(dense, tmp_path):
    recipe = Recipe.parse({"recover": [{"distill": {}}]})
    assert Recipe.parse(recipe.to_dict()) == recipe
    with pytest.raises(PareError, match="paredown recover OUT --teacher"):
        compress(dense, recipe, tmp_path / "out")
    with pytest.raises(PareError, match="no recover: steps"):
        recover(dense, dense, Recipe.parse({"method": "magnitude", "options": {"sparsity": 0.5}}), tmp_path / "o")
    with pytest.raises(PareError, match=r"recover.0.distill.tokenz: there is no such key. Did you mean 'tokens'"):
        Recipe.parse({"recover": [{"distill": {"tokenz": 3}}]})
    with pytest.raises(PareError, match="each step is either reconstruct, distill or lora"):
        Recipe.parse({"recover": [{"distill": {}, "reconstruct": {}}]})
    with pytest.raises(PareError, match="reconstruct comes before distill"):
        Recipe.parse({"recover": [{"distill": {}}, {"reconstruct": {}}]})
