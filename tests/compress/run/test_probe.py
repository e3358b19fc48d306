"""How long a run takes, by its first block: what is counted and multiplied. No test reads a clock."""

from dataclasses import replace

import pytest
import torch

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import blocks
from paredown.compress.model.stream import start
from paredown.compress.recipe import Recipe
from paredown.compress.run.duration import stage_seconds
from paredown.compress.run.first_block import first_blocks
from paredown.compress.run.probe import STEPS, _Measured, _Probe, depth_counts, walk_seconds
from paredown.compress.shape_job import resolve
from paredown.compress.survey.depth import SHORTLIST
from paredown.compress.text.windows import Windows


def text(windows, length=32):
    return Windows(torch.zeros(windows, length, dtype=torch.int64), "text", "all", "0")


def job_of(folder, **recipe):
    return resolve(ModelSource(folder, "m"), Recipe.parse(recipe))


def test_the_first_block_by_itself_gives_what_it_gives_in_the_model(tiny_model, tmp_path):
    whole = ModelSource(tiny_model, "m")
    one = first_blocks(whole, 1, tmp_path / "one")
    ids, hidden = torch.arange(40)[None], []
    assert len(blocks(whole)) == 2 and len(blocks(one)) == 1
    for source in (whole, one):
        stream = start(source, ids)
        with source.loaded(block := blocks(source)[0]):
            stream.advance(block)
        hidden.append(stream.hidden[0])
    assert torch.equal(*hidden)


def test_what_was_measured_is_multiplied_by_blocks_windows_and_steps(tiny_model, tmp_path):
    reconstruct = {"steps": 10 * STEPS, "batch": 2}
    job = job_of(tiny_model, method="wanda", options={"sparsity": 0.5}, reconstruct=reconstruct)
    probe = _Probe.of(job, tmp_path / "probe", text(40), [text(30), text(10)])
    parts = {
        "read": 1.0,
        "write": 2.0,
        "calibration": 3.0,
        "compress": 4.0,
        "reconstruct": 5.0,
        "evaluation": 6.0,
        "score": 7.0,
        "start": 8.0,
    }
    first = _Measured(2, 2 * 32, {**parts, "compress": 3.5})
    second = _Measured(4, 4 * 32, parts)
    told = probe.multiplied(first, None, known=())
    assert told["calibration"] == 2 * 3.0 * 40 / 2 and told["compress"] == 2 * 3.5
    assert told["reconstruct"] == 2 * 5.0 * 10 and (told["read"], told["write"]) == (2.0, 4.0)
    assert told["evaluation"] == 2 * 6.0 * 40 / 2 + 7.0 * 40 / 2 + 8.0
    told = probe.multiplied(first, second, known={0})  # of the first text the dense model's half is known
    assert told["compress"] == 2 * (4.0 + 0.25 * (40 - 4))  # a quarter of a second more for each window
    assert told["evaluation"] == 2 * 6.0 * (30 / 2 + 10) / 4 + 7.0 * 40 / 4 + 8.0


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "sparsegpt", "options": {"sparsity": "2:4"}},
        {"method": "paredown_lowrank", "options": {"kept": 0.8}, "allocation": {"strategy": "global"}},
        {"method": "paredown_width", "options": {"kept": 0.9, "multiple": 4}},
        {"method": "paredown_width", "options": {"kept": 0.9, "multiple": 4, "widths": "direct"}},
        {"method": "paredown_depth", "options": {"blocks": 1}},
        {"method": "shortgpt", "options": {"kept": 0.5}},
    ],
)
def test_every_kind_of_job_is_done_on_the_first_block_and_all_its_steps_are_told(recipe, tiny_model):
    job = job_of(tiny_model, **recipe)
    seconds, untold = stage_seconds(job, [job.recipe], text(6), [text(3)], cache=False)
    surveyed = {"survey"} if job.recipe.method not in ("sparsegpt",) else set()
    assert (
        not untold
        and seconds.keys() >= {"calibration", "compress", "evaluation", "read", "write"} - {"compress"} | surveyed
    )


def test_what_one_block_cannot_tell_is_said_and_not_guessed(tiny_model):
    job = job_of(tiny_model, method="laco", options={"blocks": 1})
    with pytest.raises(PareError, match="cannot be told from one block"):
        walk_seconds(job, text(2), [])
    assert stage_seconds(job, [job.recipe], text(2), [], cache=False) == (
        {},
        "no time: how long laco tries this and that cannot be told from one block",
    )


def test_stages_are_added_and_tasks_are_said_to_be_left_out(tiny_model):
    job = job_of(tiny_model, method="magnitude", options={"sparsity": 0.5}, evaluate={"tasks": ["stdlib_lines"]})
    stage = job.recipe
    once, _ = stage_seconds(job, [stage], text(2), [], cache=False)
    twice, said = stage_seconds(job, [stage, stage], text(2), [], cache=False)
    assert twice.keys() == once.keys() and said == "the time is without that of the tasks"


@pytest.mark.parametrize(("count", "drop"), [(4, 1), (30, 6), (40, 20)])
def test_passes_of_a_choice_of_blocks_are_those_of_its_rounds(count, drop):
    passes, heads, left, tried = 0.0, 0, count, count
    for _ in range(drop):
        for n in range(tried):  # evenly among the blocks that are left: a trial runs from its block to the last
            passes += (left - 1) - (n + 0.5) * left / tried + 0.5 + 0.5
        passes += left
        heads, left = heads + tried, left - 1
        tried = min(tried - 1, SHORTLIST)
        tried = tried if tried >= SHORTLIST // 2 else left
    found = depth_counts(count, drop, "divergence")
    assert found[1] == heads and found[0] == pytest.approx(passes, rel=0.05)
    assert depth_counts(count, drop, "nothing") == (0, 0) and depth_counts(count, drop, "states") == (count, 0)


def test_a_block_of_another_size_counts_by_its_size(tiny_model, tmp_path):
    job = job_of(tiny_model, method="magnitude", options={"sparsity": 0.5})
    probe = _Probe.of(job, tmp_path / "probe", text(2), [])
    thrice = replace(probe, whole=replace(job, blocks=[*job.blocks, job.blocks[0]]))
    assert thrice._counts().all == pytest.approx(1.5 * probe._counts().all)
