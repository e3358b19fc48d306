"""`lora` as a step of a recovery: form, resumption to the same bytes, what is reported, and only the last blocks."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.progress import Progress
from paredown.compress.recipe import DistillSpec, LoraSpec, Recipe
from paredown.compress.recovery.distill import Distillation
from paredown.compress.run.journal import Journal
from paredown.compress.run.once import How
from paredown.compress.run.recover_once import recover_once
from paredown.compress.run.recover_room import numbers_of
from paredown.compress.run.recover_steps import Steps
from paredown.compress.run.recover_text import recovery_texts
from paredown.compress.run.recover_write import write_recovered
from paredown.compress.run.verify import verify

LORA = {"rank": 4, "tokens": 8 * 64, "length": 32, "batch": 2, "lr": 0.02, "heldout": 4, "evaluations": 2, "top_k": 16}


class Stopped(BaseException):
    pass


@pytest.fixture(scope="module")
def dense(tmp_path_factory, save_model):
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
    forms, known = {"2:4": {}, "lowrank": {"method": "svd", "options": {"kept": 0.7}}}, {}

    def make(form="2:4"):
        if form not in known:
            known[form] = tmp_path_factory.mktemp("compressed") / "out"
            prune(dense, known[form], **forms[form])
        return known[form]

    return make


def recipe_of(text, steps):
    return Recipe.parse(
        {
            "calibration": {"source": str(text), "sequences": 8, "length": 32, "allow_scored": True},
            "evaluate": {"perplexity": [str(text)], "length": 32, "windows": 4},
            "recover": list(steps),
        }
    )


@pytest.fixture
def train(dense, text_file, tmp_path):
    """`train(checkpoint, steps)`: the steps into tmp_path/NAME, without scores and report; what they tell."""

    def run(checkpoint, steps=({"lora": LORA},), name="out", save_every=300.0, notes=None):
        recipe, tokenizer = recipe_of(text_file, steps), load_tokenizer(dense)
        source, teacher = ModelSource(checkpoint, "compressed"), ModelSource(dense, "dense")
        progress = Progress(note=(notes if notes is not None else []).append)
        texts = recovery_texts(recipe, source, tokenizer, progress.note).steps
        with CheckpointWriter(tmp_path / name, resumable=True) as writer:
            journal = Journal(writer, "key", progress.note, save_every)
            with writer.scratch() as scratch:
                work = Steps(source, teacher, recipe, texts, journal, scratch, progress)
                write_recovered(writer, source, work.run(), {"model": source.provenance()})
            writer.commit()
        return work.done

    return run


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("form", ["2:4", "lowrank"])
def test_pairs_are_trained_and_end_in_the_form_that_the_checkpoint_has(form, train, compressed, tmp_path):
    (step,) = train(compressed(form))
    before, after = weights(compressed(form)), weights(tmp_path / "out")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert changed and {name.rpartition(".")[2] for name in changed} <= {"values", "left", "right"}
    assert step["step"] == "lora" and step["after"] < step["before"] and step["tokens"] == 512
    source = ModelSource(compressed(form), "compressed")
    assert step["trained"] == numbers_of(source, LoraSpec(**LORA)) < numbers_of(source, DistillSpec()) / 2


def test_a_whole_recovery_by_pairs_is_sound_and_told(compressed, dense, text_file, tmp_path, verified_here):
    steps = [{"lora": LORA}, {"distill": {**{k: v for k, v in LORA.items() if k != "rank"}, "tokens": 128}}]
    report = recover_once(
        compressed(), dense, recipe_of(text_file, steps), tmp_path / "out", How(command="paredown recover")
    )
    assert [step["step"] for step in report["recovery"]] == ["lora", "distill"] and verify(tmp_path / "out") == []
    assert report["recovery"][0]["settings"]["rank"] == 4
    assert "Recovery: lora" in (tmp_path / "out" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / "paredown.json").read_text())
    assert record["recovery"][0]["recipe"]["recover"][0]["lora"]["alpha"] == 32.0


def test_a_step_that_is_killed_goes_on_to_the_same_bytes(train, compressed, tmp_path, monkeypatch):
    (whole,) = train(compressed(), name="whole")
    step, taken = Distillation._step, []

    def dies(self):
        taken.append(self.course.step)
        if len(taken) == 5:
            raise Stopped
        step(self)

    monkeypatch.setattr(Distillation, "_step", dies)
    with pytest.raises(Stopped):
        train(compressed(), save_every=0.0)
    notes = []
    (again,) = train(compressed(), save_every=0.0, notes=notes)
    assert "going on after 4 of 8 steps" in notes and taken == [*range(5), *range(4, 8)]
    assert again["curve"] == whole["curve"]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_distillation_of_the_last_block_leaves_the_first_as_it_was(train, compressed, tmp_path):
    own = {key: value for key, value in LORA.items() if key != "rank"}
    train(compressed(), [{"distill": {**own, "last": 1}}])
    before, after = weights(compressed()), weights(tmp_path / "out")
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert changed and not any(name.startswith("model.layers.0.") for name in changed)
    assert "model.norm.weight" in changed and any(name.startswith("model.layers.1.") for name in changed)
