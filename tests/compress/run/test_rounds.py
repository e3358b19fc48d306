"""What is measured before units and blocks go is kept: greedy choices one by one, and gradients at readers of units."""

import pytest
import torch
from transformers import LlamaConfig

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.recipe import Recipe
from paredown.compress.run import curve, smaller
from paredown.compress.run.score_cache import ScoreCache
from paredown.compress.run.smaller import SmallerRun
from paredown.compress.shape_job import resolve
from paredown.compress.survey.rounds import Rounds

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
METHODS = {"greedy_depth": "blocks", "mamba_shedder": "blocks", "block_pruner": "drop"}


class Stopped(Exception):
    """In the place of the signal that ends a process."""


@pytest.fixture
def measured(monkeypatch):
    """The numbers of the rounds that were measured; the one that `measured.stop` names is not finished."""

    class Numbers(list):
        stop = None

    found, values = Numbers(), Rounds.values

    def counting(rounds, number, measure):
        def own():
            found.append(number)
            if number == found.stop:
                raise Stopped
            return measure()

        return values(rounds, number, own)

    monkeypatch.setattr(Rounds, "values", counting)
    return found


@pytest.fixture
def choose(tmp_path, save_model, windows):
    """`choose(method, gone, cached)`: what stays where so many blocks or sublayers go."""
    save_model(tmp_path / "model", LlamaConfig(**SIZES), torch.float32)

    def go(method, gone, cached=True, **options):
        count = {"blocks": 5 - gone} if METHODS[method] == "blocks" else {"drop": gone}
        recipe = Recipe.parse({"method": method, "options": {**count, **options}})
        job = resolve(ModelSource(tmp_path / "model", "m"), recipe)
        cache = ScoreCache(tmp_path / "scores", 10**9) if cached else None
        with CheckpointWriter(tmp_path / f"out-{len(list(tmp_path.iterdir()))}") as writer, writer.scratch() as scratch:
            return SmallerRun(job, windows, [], writer, cache=cache)._survey(scratch)[1].state()

    return go


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_choice_goes_on_after_its_last_round_and_ends_as_in_one_go(method, choose, measured):
    measured.stop = 1
    with pytest.raises(Stopped):
        choose(method, 3)
    assert measured == [0, 1]
    measured.stop = None
    after = choose(method, 3)
    assert measured == [0, 1, 1, 2]
    assert after == choose(method, 3, cached=False) and measured[4:] == [0, 1, 2]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_removes_more_or_fewer_takes_the_rounds_that_are_there(method, choose, measured):
    choose(method, 2)
    assert choose(method, 1) == choose(method, 1, cached=False) and measured == [0, 1, 0]
    choose(method, 3)
    assert measured == [0, 1, 0, 2]


def test_what_a_choice_depends_on_makes_another(choose, measured):
    choose("greedy_depth", 1)
    choose("greedy_depth", 1, windows=3)
    choose("mamba_shedder", 1)
    choose("block_pruner", 1)
    choose("block_pruner", 1, which="mlp")
    choose("block_pruner", 1, per_parameter=True)
    assert measured == [0] * 6


def test_a_damaged_file_is_as_good_as_none(choose, measured, tmp_path):
    wanted = choose("greedy_depth", 2)
    (path,) = (tmp_path / "surveys").glob("*.rounds.json")
    path.write_text(path.read_text()[:-9])
    assert choose("greedy_depth", 2) == wanted and measured == [0, 1, 0, 1]


def test_the_curve_of_a_plan_shares_them(choose, measured, tmp_path, windows, monkeypatch):
    choose("greedy_depth", 2)
    recipe = Recipe.parse({"method": "greedy_depth", "options": {"blocks": 3}})
    job = resolve(ModelSource(tmp_path / "model", "m"), recipe)
    found = curve._by_depth(job, job.method, windows.ids, ScoreCache(tmp_path / "scores", 10**9), print, print)
    assert len(found.rows) == 2 and measured == [0, 1]


def test_runs_that_keep_other_widths_share_gradients_to_the_same_bytes(tmp_path, save_model, windows, monkeypatch):
    save_model(tmp_path / "model", LlamaConfig(**SIZES), torch.float32)
    passes, whole = [], smaller.backward
    monkeypatch.setattr(smaller, "backward", lambda *args: passes.append(args) or whole(*args))

    def weights(units, out, cached=True, **options):
        recipe = {"method": "paredown_width", "options": {"units": units, "gradient_windows": 4, **options}}
        job = resolve(ModelSource(tmp_path / "model", "m"), Recipe.parse(recipe))
        cache = ScoreCache(tmp_path / "scores", 10**9) if cached else None
        with CheckpointWriter(tmp_path / out) as writer:
            SmallerRun(job, windows, [], writer, cache=cache).run()
            return {path.name: path.read_bytes() for path in writer.folder.glob("*.safetensors")}

    weights(32, "first")
    shared = weights(24, "second")
    assert len(passes) == 1 and shared == weights(24, "third", cached=False)
    weights(24, "fourth", gradient_windows=3)
    assert len(passes) == 3
