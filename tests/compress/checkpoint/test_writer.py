"""A checkpoint appears whole or not at all."""

import errno
import json
import subprocess
import sys

import filelock
import pytest
import torch
from safetensors.torch import load_file

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import INDEX, TensorFiles, sha256
from paredown.compress.checkpoint.writer import RECORD, CheckpointWriter
from paredown.compress.errors import PareError

T = torch.arange(12.0).view(3, 4)
# begins to write OUT, says so, and waits
WRITES = """
import sys, time
from pathlib import Path
from paredown.compress.checkpoint.writer import CheckpointWriter
with CheckpointWriter(Path(sys.argv[1])) as writer:
    writer.write_text("theirs", "")
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other_process(tmp_path):
    """Another process that writes OUT."""
    process = subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_commit_gives_the_name_and_leaves_nothing_else(tmp_path):
    out = tmp_path / "deep" / "out"
    with CheckpointWriter(out) as writer:
        writer.add("a", T.T, kind="dense")
        writer.finish({"recipe": "mine"})
        assert not out.exists()
        writer.commit()
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors", RECORD]
    assert torch.equal(load_file(out / "model.safetensors")["a"], T.T)
    record = json.loads((out / RECORD).read_text())
    assert record["recipe"] == "mine" and record["tensors"]["a"] == {
        "kind": "dense", "shape": [4, 3], "dtype": "float32", "bytes": 48, "sha256": sha256(T.T), "file": "model.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_leaving_by_a_fault_removes_what_was_written(fault, tmp_path):
    with pytest.raises(fault), CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", T)
        writer.finish({})
        raise fault
    assert not list(tmp_path.iterdir())


def test_leaving_without_commit_removes_what_was_written(tmp_path):
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", T)
        writer.finish({})
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    left = tmp_path / "out.partial"
    (left / "folder").mkdir(parents=True)
    (left / "shard-00007.safetensors").write_text("old")
    (tmp_path / "out.partial.lock").touch()
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", T)
        writer.finish({})
        writer.commit()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.safetensors", RECORD]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("resumable", [False, True])
def test_a_folder_that_another_process_writes_is_refused_and_left_alone(resumable, tmp_path, other_process):
    for _ in range(2):
        with (
            pytest.raises(PareError, match="another process is writing"),
            CheckpointWriter(tmp_path / "out", resumable),
        ):
            pass
        assert (tmp_path / "out.partial" / "theirs").exists() and (tmp_path / "out.partial.lock").exists()


def test_the_lock_of_a_killed_process_is_free(tmp_path, other_process):
    other_process.kill()
    other_process.wait()
    assert (tmp_path / "out.partial" / "theirs").exists()
    with CheckpointWriter(tmp_path / "out") as writer:
        assert not (tmp_path / "out.partial" / "theirs").exists()
        writer.add("a", T)
        writer.finish({})
        writer.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_writers_in_one_process_exclude_each_other_as_well(tmp_path):
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.write_text("mine", "")
        with pytest.raises(PareError, match="another process is writing"), CheckpointWriter(tmp_path / "out"):
            pass
        assert (tmp_path / "out.partial" / "mine").exists()
    with CheckpointWriter(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_signal_while_it_locks_leaves_nothing(tmp_path, monkeypatch):
    acquire = filelock.FileLock.acquire

    def stop(lock, *arguments, **options):
        monkeypatch.undo()
        acquire(lock, *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(filelock.FileLock, "acquire", stop)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_signal_while_it_clears_what_a_killed_run_left_leaves_nothing(tmp_path):
    class Stopped(CheckpointWriter):
        def clear(self, keep=()):
            raise KeyboardInterrupt

    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "shard-00001.safetensors").write_text("old")
    with pytest.raises(KeyboardInterrupt), Stopped(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    with CheckpointWriter(tmp_path / "empty") as writer:
        writer.add("a", T)
        writer.finish({})
        writer.commit()
    assert (tmp_path / "empty" / "model.safetensors").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PareError, match="exists and is not empty"), CheckpointWriter(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "file.partial").exists()


def test_a_full_disk_is_told_in_our_words(tmp_path):
    with pytest.raises(PareError, match="is full"), CheckpointWriter(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_many_shards_and_one_file_are_the_same_model(format, tiny_model, tmp_path, prune, logits_of):
    prune(tiny_model, tmp_path / "one", format=format)
    one = TensorFiles(tmp_path / "one")
    with CheckpointWriter(tmp_path / "many", flush_bytes=20_000) as writer:
        for name, tensor in one.read(one.entries).items():
            writer.add(name, tensor)
            writer.end_block()
        writer.copy([path for path in (tmp_path / "one").iterdir() if path.suffix != ".safetensors"])
        writer.finish({})
        writer.commit()
    many = TensorFiles(tmp_path / "many")
    shards = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(e.bytes for e in many.entries.values())
    assert set(index["weight_map"]) == set(one.entries)
    theirs = many.read(many.entries)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in one.read(one.entries).items())
    assert torch.equal(logits_of(tmp_path / "many"), logits_of(tmp_path / "one"))
    assert not ModelSource(tmp_path / "many", "many").verbatim


def test_a_shard_never_grows_past_its_limit(tmp_path):
    with CheckpointWriter(tmp_path / "out", max_shard_bytes=100) as writer:
        for i in range(5):
            writer.add(f"t{i}", T + i)
        writer.finish({})
        writer.commit()
    files = TensorFiles(tmp_path / "out")
    assert len({e.file for e in files.entries.values()}) == 3
    assert all(torch.equal(files.read([f"t{i}"])[f"t{i}"], T + i) for i in range(5))
