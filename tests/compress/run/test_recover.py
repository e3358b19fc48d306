"""`recover` from a compressed folder to a new one: form, lineage, scores, and what may go wrong on the way."""

import json
import math

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from paredown.compress import compress
from paredown.compress.errors import PareError
from paredown.compress.progress import Progress
from paredown.compress.recipe import Recipe
from paredown.compress.recovery.distill import Distillation
from paredown.compress.run.once import How
from paredown.compress.run.recover import recover
from paredown.compress.run.verify import verify

DISTILL = {"tokens": 10 * 64, "length": 32, "batch": 2, "lr": 0.01, "heldout": 4, "evaluations": 3, "top_k": 16}


class Stopped(BaseException):
    pass


@pytest.fixture(scope="module")
def dense(tmp_path_factory, save_model):
    """A tiny model whose next tokens are not all alike."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    save_model(folder, config)
    return folder


@pytest.fixture(scope="module")
def compressed(dense, tmp_path_factory, prune):
    """`compressed(form)`: that model, compressed."""
    forms = {
        "2:4": {}, "0.5": {"sparsity": 0.5}, "dense": {"format": "dense"},
        "lowrank": {"method": "svd", "sparsity": None, "options": {"kept": 0.7}},
        "blocks": {"method": "tail", "sparsity": None, "options": {"kept": 0.6}, "format": "dense"},
    }  # fmt: skip
    known = {}

    def make(form="2:4"):
        if form not in known:
            known[form] = tmp_path_factory.mktemp("compressed") / "out"
            prune(dense, known[form], **forms[form])
        return known[form]

    return make


@pytest.fixture
def go(dense, text_file, tmp_path, verified_here):
    """`go(checkpoint, ...)`: a recovery into tmp_path/out on little text; its report."""

    def run(checkpoint, out="out", teacher=dense, notes=None, save_every=300.0, doing=lambda text: None, **distill):
        recipe = Recipe.parse(
            {
                "calibration": {"source": str(text_file), "allow_scored": True},
                "evaluate": {"perplexity": [str(text_file)], "length": 32, "windows": 4},
                "recover": [{"distill": {**DISTILL, **distill}}],
            }
        )
        progress = Progress(note=(notes if notes is not None else []).append, doing=doing)
        how = How(progress=progress, save_every=save_every, command="paredown recover")
        return recover(checkpoint, recipe, tmp_path / out, teacher, how)

    return run


def weights(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("form", ["2:4", "0.5", "dense", "lowrank", "blocks"])
def test_a_recovered_checkpoint_is_as_it_was_but_for_its_numbers(form, go, compressed, tmp_path):
    report = go(compressed(form))
    assert verify(tmp_path / "out") == []
    before, after = weights(compressed(form)), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert {name for name in before if "embed" in name or not before[name].is_floating_point()}.isdisjoint(changed)
    assert "model.norm.weight" in changed and any("down_proj" in name for name in changed)
    assert all(t.dtype == after[name].dtype and t.shape == after[name].shape for name, t in before.items())
    if form == "dense":
        pruned = [name for name, t in before.items() if "proj" in name and float((t == 0).float().mean()) > 0.4]
        assert pruned and all(torch.equal(before[name] == 0, after[name] == 0) for name in pruned)
    step = report["recovery"][0]
    assert step["after"] < step["before"] and step["tokens"] == 640 and step["stopped"] == "all its tokens were seen"
    assert [seen for seen, _ in step["curve"]] == [0, 256, 512, 640] and step["trained"] > 0


def test_three_models_are_scored_and_the_way_is_recorded(go, compressed, tmp_path, dense):
    report = go(compressed())
    text = report["evaluation"][0]
    lost, left = (
        math.log(text[k]["token_perplexity"] / text["before"]["token_perplexity"]) for k in ("compressed", "after")
    )
    assert text["paired_delta"]["log_ratio"] == pytest.approx(left, abs=1e-6)
    assert text["recovered_delta"]["log_ratio"] == pytest.approx(left - lost, abs=1e-6)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    record = json.loads((tmp_path / "out" / "paredown.json").read_text())
    assert record["recipe"]["method"] == "wanda" and record["layers"]
    assert record["recovery"][0]["tokens"] == 640 and record["recovery"][0]["teacher"]["id"] == str(dense)
    assert record["recovery"][0]["recipe"]["recover"][0]["distill"]["lr"] == 0.01


def test_a_recovery_that_is_killed_goes_on_to_the_same_bytes(go, compressed, tmp_path, monkeypatch):
    whole = go(compressed(), "whole")
    step, taken = Distillation._step, []

    def dies(self):
        taken.append(self.course.step)
        if len(taken) == 6:
            raise Stopped
        step(self)

    monkeypatch.setattr(Distillation, "_step", dies)
    with pytest.raises(Stopped):
        go(compressed(), save_every=0.0)
    notes = []
    report = go(compressed(), save_every=0.0, notes=notes)
    assert "going on after 5 of 10 steps" in notes and taken == [*range(6), *range(5, 10)]
    assert report["recovery"][0]["curve"] == whole["recovery"][0]["curve"]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    assert not (tmp_path / "out.partial").exists() and not list((tmp_path / "out").glob("targets*"))


def test_a_recovery_that_is_killed_after_training_does_not_train_again(go, compressed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("paredown.compress.run.recover.write_recovered", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            go(compressed(), save_every=0.0)
    monkeypatch.setattr(Distillation, "_step", None)
    assert go(compressed(), save_every=0.0)["recovery"][0]["steps"] == 10


def nan_at(steps, monkeypatch):
    """From now on the losses of these training steps, counted as they are taken, are NaN."""
    loss, taken = Distillation._loss, []

    def broken(self, ids, rows, windows):
        found = loss(self, ids, rows, windows)
        if torch.is_grad_enabled():
            taken.append(None)
        return found * math.nan if torch.is_grad_enabled() and len(taken) in steps else found

    monkeypatch.setattr(Distillation, "_loss", broken)


@pytest.mark.parametrize("save_every", [0.0, 300.0], ids=["saved", "not yet saved"])
def test_a_loss_that_is_not_finite_goes_back_and_on_at_half_the_rate(save_every, go, compressed, monkeypatch):
    nan_at([4], monkeypatch)
    notes = []
    report = go(compressed(), notes=notes, save_every=save_every)
    assert any("back to the last good state, with half the learning rate" in note for note in notes)
    assert "half the learning rate" in report["recovery"][0]["remarks"][0] and report["recovery"][0]["steps"] == 10
    assert report["recovery"][0]["remarks"][0] in report["fallbacks"]


def test_a_loss_that_is_not_finite_again_is_an_error(go, compressed, monkeypatch, tmp_path):
    nan_at([4, 6], monkeypatch)
    with pytest.raises(PareError, match=r"diverged twice .*Lower recover: distill.lr"):
        go(compressed())
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_reads_other_tokens_is_refused(
    go, compressed, dense, save_model, tiny_config, tmp_path, tokenizer
):
    tiny_config.vocab_size = 384
    save_model(tmp_path / "wider", tiny_config)
    with pytest.raises(PareError, match=r"knows 384 tokens and .* 320"):
        go(compressed(), teacher=tmp_path / "wider")
    other = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = other["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    tiny_config.vocab_size = 320
    save_model(tmp_path / "other", tiny_config)
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(PareError, match="has another tokenizer than"):
        go(compressed(), teacher=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_fitted_too_closely_ends_the_training_and_the_report_says_so(go, compressed):
    report = go(compressed(), tokens=64 * 4000, lr=0.3, evaluations=1000, patience=2)
    step = report["recovery"][0]
    assert "has not fallen for 2 evaluations" in step["stopped"] and step["tokens"] < 64 * 4000
    assert step["after"] == min(value for _, value in step["curve"])


def test_a_recipe_compresses_and_recovers(dense, text_file, tmp_path, verified_here):
    raw = {
        "method": "magnitude",
        "options": {"sparsity": "2:4"},
        "calibration": {"source": str(text_file), "sequences": 4, "length": 32, "allow_scored": True},
        "evaluate": {"perplexity": [str(text_file)], "length": 32, "windows": 4},
        "recover": [{"distill": DISTILL}, {"distill": {**DISTILL, "loss": "mixed", "tokens": 128}}],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    report = compress(dense, str(tmp_path / "r.yaml"), tmp_path / "out")
    assert [step["settings"]["loss"] for step in report["recovery"]] == ["forward", "mixed"]
    assert report["model"]["id"] == str(dense) and report["recipe"]["recover"] and report["layers"]
    assert report["evaluation"][0]["compressed"] and verify(tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_a_recipe_that_only_recovers_does_not_compress(dense, tmp_path):
    recipe = Recipe.parse({"recover": [{"distill": {}}]})
    assert Recipe.parse(recipe.to_dict()) == recipe
    with pytest.raises(PareError, match="paredown recover OUT --teacher"):
        compress(dense, recipe, tmp_path / "out")
    with pytest.raises(PareError, match="no recover: steps"):
        recover(
            dense, Recipe.parse({"method": "magnitude", "options": {"sparsity": 0.5}}), tmp_path / "o", dense, How()
        )
    with pytest.raises(PareError, match=r"recover.0.distill.tokenz: there is no such key. Did you mean 'tokens'"):
        Recipe.parse({"recover": [{"distill": {"tokenz": 3}}]})
