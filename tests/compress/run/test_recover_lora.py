"""`lora` as a step of a recovery: form, resumption to the same bytes, what is reported, and only the last blocks."""

import json

import pytest
import torch
from recovering import Stopped, recipe_of, weights

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.recipe import DistillSpec, LoraSpec
from paredown.compress.recovery.distill import Distillation
from paredown.compress.run.once import How
from paredown.compress.run.recover_once import recover_once
from paredown.compress.run.recover_room import numbers_of
from paredown.compress.run.verify import verify

LORA = {"rank": 4, "tokens": 8 * 64, "length": 32, "batch": 2, "lr": 0.02, "heldout": 4, "evaluations": 2, "top_k": 16}


@pytest.fixture
def train(trained):
    """`trained`, by pairs unless other steps are named."""
    return lambda checkpoint, steps=({"lora": LORA},), **how: trained(checkpoint, steps, **how)


@pytest.mark.parametrize("form", ["2:4", "lowrank"])
def test_pairs_are_trained_and_end_in_the_form_that_the_checkpoint_has(form, train, lively, tmp_path):
    (step,) = train(lively(form))
    before, after = weights(lively(form)), weights(tmp_path / "out")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert changed and {name.rpartition(".")[2] for name in changed} <= {"values", "left", "right"}
    assert step["step"] == "lora" and step["after"] < step["before"] and step["tokens"] == 512
    source = ModelSource(lively(form), "compressed")
    assert step["trained"] == numbers_of(source, LoraSpec(**LORA)) < numbers_of(source, DistillSpec()) / 2


def test_a_whole_recovery_by_pairs_is_sound_and_told(lively, text_file, tmp_path, verified_here):
    steps = [{"lora": LORA}, {"distill": {**{k: v for k, v in LORA.items() if k != "rank"}, "tokens": 128}}]
    report = recover_once(
        lively("2:4"), lively(), recipe_of(text_file, steps), tmp_path / "out", How(command="paredown recover")
    )
    assert [step["step"] for step in report["recovery"]] == ["lora", "distill"] and verify(tmp_path / "out") == []
    assert report["recovery"][0]["settings"]["rank"] == 4
    assert "Recovery: lora" in (tmp_path / "out" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / "paredown.json").read_text())
    assert record["recovery"][0]["recipe"]["recover"][0]["lora"]["alpha"] == 32.0


def test_a_step_that_is_killed_goes_on_to_the_same_bytes(train, lively, tmp_path, monkeypatch):
    (whole,) = train(lively("2:4"), name="whole")
    step, taken = Distillation._step, []

    def dies(self):
        taken.append(self.course.step)
        if len(taken) == 5:
            raise Stopped
        step(self)

    monkeypatch.setattr(Distillation, "_step", dies)
    with pytest.raises(Stopped):
        train(lively("2:4"), save_every=0.0)
    notes = []
    (again,) = train(lively("2:4"), save_every=0.0, notes=notes)
    assert "going on after 4 of 8 steps" in notes and taken == [*range(5), *range(4, 8)]
    assert again["curve"] == whole["curve"]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_distillation_of_the_last_block_leaves_the_first_as_it_was(train, lively, tmp_path):
    own = {key: value for key, value in LORA.items() if key != "rank"}
    (step,) = train(lively("2:4"), [{"distill": {**own, "last": 1}}])
    assert step["trained"] == numbers_of(ModelSource(lively("2:4"), "compressed"), DistillSpec(last=1))
    before, after = weights(lively("2:4")), weights(tmp_path / "out")
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert changed and not any(name.startswith("model.layers.0.") for name in changed)
    assert "model.norm.weight" in changed and any(name.startswith("model.layers.1.") for name in changed)
