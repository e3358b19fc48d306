"""A run that is stopped and started again writes what one that was not stopped does, byte for byte."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from paredown.compress.checkpoint import writer as writers
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import STATE, CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.recipe import Recipe
from paredown.compress.run import journal
from paredown.compress.run.compress import _write_checkpoint
from paredown.compress.run.journal import Journal, key_of
from paredown.compress.run.pipeline import Run

RECIPES = {
    "masks": {"method": "sparsegpt", "options": {"sparsity": "2:4"}},
    "ours, tuned": {"method": "paredown_lowrank", "options": {"kept": 0.6}, "reconstruct": {"steps": 2}},
    "sensitivity": {"method": "asvd", "options": {"kept": 0.7}, "allocation": {"strategy": "sensitivity"}},
    "columns and rows": {"method": "cur", "options": {"kept": 0.8, "blocks": None}},
}


class Stopped(BaseException):
    """As a signal is."""


@pytest.fixture(autouse=True)
def at_each_block(monkeypatch):
    monkeypatch.setattr(journal, "EVERY", 0.0)


@pytest.fixture
def run(tiny_model, windows):
    """`run(out, recipe)`: the pipeline with a journal, stopped once it has told of block `stop`, or before it commits."""

    def go(out, raw, stop=None, commits=True, note=lambda text: None, text=windows):
        def progress(done):
            if done.index == stop:
                raise Stopped

        recipe, source = Recipe.parse(raw), ModelSource(tiny_model, "tiny")
        with CheckpointWriter(out, resumable=True) as writer:
            journal = Journal(writer, key_of(source, recipe, [text, windows], "packed", {}), note)
            result = Run(
                source, recipe, recipe.build(), text, [windows], writer, progress=progress, note=note, journal=journal
            ).run()
            _write_checkpoint(writer, source, recipe, result, "packed", text)
            if not commits:
                raise Stopped
            writer.commit()
        return result

    return go


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def told(result):
    layers = [{key: value for key, value in layer.items() if key != "seconds"} for layer in result.layers]
    return layers, result.fallbacks, result.evaluation, result.targeted, result.kept, result.probe, result.modules


@pytest.mark.parametrize("flush", [1, writers.FLUSH_BYTES], ids=["shards", "one file"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_stopped_run_goes_on_to_the_same_bytes(recipe, flush, run, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "FLUSH_BYTES", flush)
    whole = run(tmp_path / "whole", recipe)
    notes = []
    with pytest.raises(Stopped) as first:
        run(tmp_path / "out", recipe, stop=0)
    assert "the command that began it goes on" in first.value.__notes__[0]
    with pytest.raises(Stopped):
        run(tmp_path / "out", recipe, stop=1, note=notes.append)
    assert "going on after 0 blocks" in notes and not any("survey" in said for said in notes)
    result = run(tmp_path / "out", recipe, note=notes.append)
    assert "going on after 1 blocks" in notes
    assert files(tmp_path / "out") == files(tmp_path / "whole") and told(result) == told(whole)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("flush", [1, writers.FLUSH_BYTES], ids=["shards", "one file"])
def test_a_run_that_fails_after_its_last_block_does_not_walk_again(flush, run, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "FLUSH_BYTES", flush)
    run(tmp_path / "whole", RECIPES["masks"])
    with pytest.raises(Stopped):
        run(tmp_path / "out", RECIPES["masks"], commits=False)
    run(tmp_path / "out", RECIPES["masks"], stop=1)  # no block is told of, so it does not stop
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
    keys = [key_of(source, recipe, [windows], format, {}) for format in ("packed", "packed", "dense")]
    file = tiny_model / "config.json"
    stamp = file.stat()
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    keys += [key_of(source, recipe, [windows], "packed", {}), key_of(source, recipe, [windows, windows], "packed", {})]
    keys += [key_of(source, recipe, [windows], "packed", {"torch": "3"})]
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


def test_a_state_that_cannot_be_saved_is_told_and_the_run_goes_on(run, tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    run(tmp_path / "whole", RECIPES["masks"])
    monkeypatch.setattr(journal, "save_file", full)
    notes = []
    run(tmp_path / "out", RECIPES["masks"], note=notes.append)
    assert any("could not be saved" in said and "do it again" in said for said in notes)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("failing", [(CheckpointWriter, "write_json"), (writers, "sync")], ids=["finish", "commit"])
def test_a_full_disk_says_what_is_kept_and_loses_no_state(failing, run, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*failing, full)
    with pytest.raises(PareError, match="is full") as fault:
        run(tmp_path / "out", RECIPES["masks"])
    assert "out.partial is kept" in fault.value.__notes__[0] and (tmp_path / "out.partial" / STATE).exists()
    monkeypatch.undo()
    notes = []
    run(tmp_path / "out", RECIPES["masks"], note=notes.append)
    assert any(said.startswith("going on after 2 blocks") for said in notes)


def test_a_short_run_leaves_nothing_to_go_on_from(run, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "EVERY", 3600.0)
    with pytest.raises(Stopped):
        run(tmp_path / "out", RECIPES["masks"], stop=1)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_the_command_says_how_to_go_on(tiny_model, text_file, tmp_path):
    code = "from paredown.compress.run import journal; journal.EVERY = 0.0; from paredown.commands.app import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "compress",
        str(tiny_model),
        "-r",
        "sparsegpt-2of4",
        "-o",
        str(tmp_path / "out"),
    ]
    command += ["--calibration", str(text_file), "--eval-text", str(text_file)]
    for change in ("calibration.sequences=200", "calibration.length=2", "evaluate.length=2", "evaluate.windows=1500"):
        command += ["--set", change]
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
