"""A run that is stopped and started again writes what one that was not stopped does, byte for byte."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from safetensors import SafetensorError

from paredown.compress.checkpoint.out_folder import MARK, SCRATCH, STATE
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import FLUSH_BYTES, CheckpointWriter
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
    "by outliers": {"method": "owl_wanda"},
    "dense beside 2:4": {
        "method": "sparsegpt",
        "options": {"sparsity": "2:4", "kept": 0.7},
        "allocation": {"strategy": "database"},
    },
    "in turn": {"method": "wanda", "order": "true_sequential"},
    "apart, tuned": {"method": "wanda", "order": "independent", "reconstruct": {"steps": 2}},
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


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, save_model, windows):
    """Of a run with shards, pending tensors and gradients that was stopped after a block: `out`, and what opens it."""
    folder = tmp_path_factory.mktemp("stopped")
    save_model(folder / "model", transformers.LlamaConfig(**SMALL))
    job = resolve_job(ModelSource(folder / "model", "tiny"), Recipe.parse(RECIPES["ours, tuned"]))
    key = key_of(job, [windows], {})

    with CheckpointWriter(folder / "out", resumable=True, flush_bytes=1) as writer:
        journal = Journal(writer, key, every=0.0)
        run = Run(job, windows, [windows], writer, Progress(), journal)
        save = journal.save

        def save_and_stop(facts, *arguments):
            save(facts, *arguments)
            if facts["blocks"] == 1:
                raise Stopped

        journal.save = save_and_stop
        with suppress(Stopped):
            writer.add("pending", windows.ids)
            run.run()

    def opens(out):
        """Whether a run of the same key goes on from there, and what it is told if not."""
        notes = []
        with CheckpointWriter(out, resumable=True) as writer:
            journal = Journal(writer, key, notes.append)
            assert journal.state or [path.name for path in writer.folder.iterdir()] == [MARK]
            return journal.state is not None, "".join(notes)

    return folder / "out", opens


SMALL = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
KEPT = [STATE, "shard-00001.safetensors", f"{SCRATCH}/gradients-0.safetensors", f"{SCRATCH}/gradients-1.safetensors"]


@pytest.mark.parametrize("name", KEPT)
def test_a_run_does_not_go_on_from_a_file_in_which_a_bit_is_flipped(name, stopped, tmp_path):
    left, opens = stopped
    partial = left.with_name("out.partial")
    size = (partial / name).stat().st_size
    header = int.from_bytes((partial / name).read_bytes()[:8], "little") + 8
    places = [
        *range(0, 12),
        *range(12, header, max(1, header // 25)),
        *range(header, size, max(1, size // 15)),
        size - 1,
    ]
    for place in places:
        out = tmp_path / f"{place}"
        shutil.copytree(partial, f"{out}.partial")
        with Path(f"{out}.partial", name).open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << place % 8]))
        goes_on, told = opens(out)
        assert not goes_on and "is damaged (" in told and told.endswith("starting from the beginning"), (place, told)
    shutil.copytree(partial, tmp_path / "same.partial")
    assert opens(tmp_path / "same") == (True, "")


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("change", ["cut", "missing", "link"])
def test_a_run_does_not_go_on_without_a_file_that_it_had(name, change, stopped, tmp_path):
    left, opens = stopped
    shutil.copytree(left.with_name("out.partial"), tmp_path / "out.partial")
    file = tmp_path / "out.partial" / name
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.rename(tmp_path / "theirs")
        if change == "link":
            file.symlink_to(tmp_path / "theirs")
    goes_on, told = opens(tmp_path / "out")
    assert not goes_on and ("is damaged" in told or name == STATE)
    assert change == "cut" or (tmp_path / "theirs").exists()


def test_a_state_that_may_not_be_read_is_told_and_kept(stopped, tmp_path, monkeypatch):
    def denied(*arguments):
        raise SafetensorError("Error while opening: I/O error: Permission denied (os error 13)")

    left, opens = stopped
    shutil.copytree(left.with_name("out.partial"), tmp_path / "out.partial")
    monkeypatch.setattr("paredown.compress.run.journal.safe_open", denied)
    with pytest.raises(PareError, match=r"cannot be written \(.*resume\.safetensors: Permission denied\)"):
        opens(tmp_path / "out")
    monkeypatch.undo()
    assert opens(tmp_path / "out") == (True, "")


def test_a_damaged_shard_is_made_again(run, tmp_path):
    run(tmp_path / "whole", RECIPES["masks"], flush=1)
    with pytest.raises(Stopped):
        run(tmp_path / "out", RECIPES["masks"], stop=1, flush=1)
    shard = tmp_path / "out.partial" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    notes = []
    run(tmp_path / "out", RECIPES["masks"], note=notes.append, flush=1)
    assert any("shard-00001.safetensors has changed" in said for said in notes)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_same_command_puts_a_finished_checkpoint_in_its_place(tiny_model, text_file, tmp_path, monkeypatch):
    module = importlib.import_module("paredown.compress.run.once")
    monkeypatch.setattr(module, "_verify", lambda *arguments: (tmp_path / "out").write_text("in the way"))
    notes, changes = [], ["calibration.sequences=2", "calibration.length=16", "evaluate.perplexity=[]"]

    def again(**named):
        return importlib.import_module("paredown.compress.run.compress").compress(
            tiny_model, "magnitude-50", tmp_path / "out", overrides=changes, calibration=str(text_file), note=notes.append, **named
        )  # fmt: skip

    with pytest.raises(PareError, match="The finished checkpoint is kept"):
        again()
    (tmp_path / "out").unlink()
    monkeypatch.setattr(module, "Run", None)  # nothing is done again
    report = again()
    assert "was finished before" in notes[-1] and report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out" / MARK).exists()


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


@pytest.mark.slow
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
