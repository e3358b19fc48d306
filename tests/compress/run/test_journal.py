"""A run that is stopped and started again writes what one that was not stopped does, byte for byte."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import FLUSH_BYTES, STATE, CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.progress import Progress
from paredown.compress.recipe import Recipe
from paredown.compress.run.journal import Journal, key_of
from paredown.compress.run.pipeline import Run
from paredown.compress.run.record import write_record

RECIPES = {
    "masks": {"method": "sparsegpt", "options": {"sparsity": "2:4"}},
    "ours, tuned": {"method": "paredown_lowrank", "options": {"kept": 0.6}, "reconstruct": {"steps": 2}},
    "sensitivity": {"method": "asvd", "options": {"kept": 0.7}, "allocation": {"strategy": "sensitivity"}},
    "columns and rows": {"method": "cur", "options": {"kept": 0.8, "blocks": None}},
}


class Stopped(BaseException):
    """As a signal is."""


@pytest.fixture
def run(tiny_model, windows):
    """`run(out, recipe)`: the pipeline with a journal that saves at each block, or `every` so many seconds.

    It is stopped after block `stop`, or before it commits. `at_end` is called once all blocks are done.
    """

    def go(
        out, raw, stop=None, commits=True, note=lambda text: None, text=windows, flush=FLUSH_BYTES, every=0.0,
        at_end=lambda: None,
    ):  # fmt: skip
        def progress(done):
            if done.index == stop:
                raise Stopped

        job = resolve_job(ModelSource(tiny_model, "tiny"), Recipe.parse(raw))
        with CheckpointWriter(out, resumable=True, flush_bytes=flush) as writer:
            journal = Journal(writer, key_of(job, [text, windows], {}), note, every)
            result = Run(job, text, [windows], writer, Progress(progress, note), journal).run()
            at_end()
            write_record(writer, job, result, text)
            if not commits:
                raise Stopped
            writer.commit()
        return result

    return go


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def told(result):
    layers = [{key: value for key, value in layer.items() if key != "seconds"} for layer in result.layers]
    return layers, result.fallbacks, result.evaluation, result.targeted, result.numbers, result.probe, result.specs


@pytest.mark.parametrize("flush", [1, FLUSH_BYTES], ids=["shards", "one file"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_stopped_run_goes_on_to_the_same_bytes(recipe, flush, run, tmp_path):
    whole = run(tmp_path / "whole", recipe, flush=flush)
    notes = []
    with pytest.raises(Stopped) as first:
        run(tmp_path / "out", recipe, stop=0, flush=flush)
    assert "the command that began it goes on" in first.value.__notes__[0]
    with pytest.raises(Stopped):
        run(tmp_path / "out", recipe, stop=1, note=notes.append, flush=flush)
    assert "going on after 0 blocks" in notes and not any("survey" in said for said in notes)
    result = run(tmp_path / "out", recipe, note=notes.append, flush=flush)
    assert "going on after 1 blocks" in notes
    assert files(tmp_path / "out") == files(tmp_path / "whole") and told(result) == told(whole)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("flush", [1, FLUSH_BYTES], ids=["shards", "one file"])
def test_a_run_that_fails_after_its_last_block_does_not_walk_again(flush, run, tmp_path):
    run(tmp_path / "whole", RECIPES["masks"], flush=flush)
    with pytest.raises(Stopped):
        run(tmp_path / "out", RECIPES["masks"], commits=False, flush=flush)
    run(tmp_path / "out", RECIPES["masks"], stop=1, flush=flush)  # no block is done again, so it does not stop
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_another_run_does_not_take_the_state_and_leaves_it(run, windows, tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path / "out", RECIPES["masks"], stop=1)
    before = files_below(tmp_path / "out.partial")
    other = replace(windows, ids=windows.ids.flip(0))
    for changed, text in ((RECIPES["sensitivity"], windows), (RECIPES["masks"], other)):
        with pytest.raises(PareError, match=r"out\.partial holds what another command"):
            run(tmp_path / "out", changed, text=text)
        assert files_below(tmp_path / "out.partial") == before


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_key_knows_the_model_the_text_and_the_format(tiny_model, windows):
    source, recipe = ModelSource(tiny_model, "tiny"), Recipe.parse(RECIPES["masks"])
    packed, dense = (resolve_job(source, recipe, format) for format in ("packed", "dense"))
    keys = [key_of(job, [windows], {}) for job in (packed, packed, dense)]
    file = tiny_model / "config.json"
    stamp = file.stat()
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    keys += [key_of(packed, [windows], {}), key_of(packed, [windows, windows], {})]
    keys += [key_of(packed, [windows], {"torch": "3"})]
    assert keys[0] == keys[1] and len(set(keys)) == 5


def test_a_damaged_state_starts_over(run, tmp_path):
    run(tmp_path / "whole", RECIPES["masks"])
    with pytest.raises(Stopped):
        run(tmp_path / "out", RECIPES["masks"], stop=1)
    state = tmp_path / "out.partial" / STATE
    state.write_bytes(state.read_bytes()[:100])
    notes = []
    run(tmp_path / "out", RECIPES["masks"], note=notes.append)
    assert files(tmp_path / "out") == files(tmp_path / "whole") and not any("going on" in said for said in notes)


def disk_full(*arguments, **named):
    raise OSError(28, "No space left on device")


def test_a_state_that_cannot_be_saved_is_told_and_the_run_goes_on(run, tmp_path, monkeypatch):
    run(tmp_path / "whole", RECIPES["masks"])
    monkeypatch.setattr(os, "fsync", disk_full)
    notes = []
    run(tmp_path / "out", RECIPES["masks"], note=notes.append, at_end=monkeypatch.undo)
    assert any("could not be saved" in said and "do it again" in said for said in notes)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("failing", [(Path, "write_text"), (os, "fsync")], ids=["finish", "commit"])
def test_a_full_disk_says_what_is_kept_and_loses_no_state(failing, run, tmp_path, monkeypatch):
    with pytest.raises(PareError, match="is full") as fault:
        run(tmp_path / "out", RECIPES["masks"], at_end=lambda: monkeypatch.setattr(*failing, disk_full))
    assert "out.partial is kept" in fault.value.__notes__[0] and (tmp_path / "out.partial" / STATE).exists()
    monkeypatch.undo()
    notes = []
    run(tmp_path / "out", RECIPES["masks"], note=notes.append)
    assert any(said.startswith("going on after 2 blocks") for said in notes)


def test_a_short_run_leaves_nothing_to_go_on_from(run, tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path / "out", RECIPES["masks"], stop=1, every=3600.0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


COMPRESS = """
import sys
from paredown.commands.app import exit_codes
from paredown.compress import compress
model, text, out = sys.argv[1:]
changes = ["calibration.sequences=200", "calibration.length=2", "evaluate.length=2", "evaluate.windows=1500"]
with exit_codes():
    compress(
        model, "sparsegpt-2of4", out, calibration=text, eval_text=[text], overrides=changes, save_every=0.0,
        note=lambda sentence: print(sentence, file=sys.stderr),
    )
"""


def test_an_interrupted_run_says_how_to_go_on(tiny_model, text_file, tmp_path):
    command = [sys.executable, "-c", COMPRESS, str(tiny_model), str(text_file), str(tmp_path / "out")]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.partial" / STATE).exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 130 and f"{tmp_path}/out.partial is kept" in said and "nothing was written" not in said
    second = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert second.returncode == 0 and "going on after" in second.stderr
    assert (tmp_path / "out" / "report.json").exists() and not (tmp_path / "out.partial").exists()
