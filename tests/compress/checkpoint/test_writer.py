"""A checkpoint appears whole or not at all."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from paredown.compress.checkpoint.out_folder import MARK, STATE
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
    (left / MARK).touch()
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
    (tmp_path / "out.partial" / MARK).touch()
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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_inside_a_shard_is_told_and_the_state_is_kept(number, tmp_path, monkeypatch):
    def save_file(*arguments, **named):  # as safetensors tells it
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    with (
        pytest.raises(PareError, match=r"the disk of .* is full\. Free space") as fault,
        CheckpointWriter(tmp_path / "out", resumable=True) as writer,
    ):
        (writer.folder / STATE).touch()
        writer.add("a", T)
        writer.finish({})
    assert "out.partial is kept" in fault.value.__notes__[0] and (tmp_path / "out.partial" / STATE).exists()


def test_a_file_that_the_system_refuses_to_let_grow_is_told_in_one_sentence(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(PareError, match=r"out cannot be written \(.*shard-00001.safetensors: File too large\)"),
            CheckpointWriter(tmp_path / "out") as writer,
        ):
            writer.add("a", torch.zeros(50_000))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            writer.finish({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["paredown.json", "config.json"])
def test_a_text_that_does_not_fit_is_told_with_its_name(name, tmp_path, monkeypatch):
    def fails(path, *arguments, **named):
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error")
        return plain(path, *arguments, **named)

    plain = Path.write_text
    monkeypatch.setattr(Path, "write_text", fails)
    with (
        pytest.raises(PareError, match=rf"out cannot be written \(.*{name}: Input/output error\)"),
        CheckpointWriter(tmp_path / "out") as writer,
    ):
        writer.add("a", T)
        writer.write_json("config.json", {})
        writer.finish({})


def test_a_full_disk_elsewhere_names_that_disk_and_other_faults_elsewhere_are_not_ours(tmp_path):
    with pytest.raises(PareError, match="the disk of /cache is full"), CheckpointWriter(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/file")
    with pytest.raises(FileNotFoundError, match="/model/file"), CheckpointWriter(tmp_path / "out"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/model/file")


def test_what_a_stopped_run_has_written_counts_as_room_for_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", resumable=True, flush_bytes=1) as writer:
        assert writer.left == 0
        writer.add("a", T)
        writer.end_block()
        writer.progress()
        (writer.folder / STATE).write_bytes(b"state")
        raise KeyboardInterrupt
    with CheckpointWriter(tmp_path / "out", resumable=True) as writer:
        assert writer.left == (writer.folder / "shard-00001.safetensors").stat().st_size


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_mount_that_cannot_flush_is_written(number, tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", T)
        writer.finish({})
        writer.commit()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], T)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077])
def test_files_get_the_mode_of_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        with CheckpointWriter(tmp_path / "out", flush_bytes=1) as writer:
            for name in ("a", "b"):
                writer.add(name, T)
                writer.end_block()
            (writer.folder / "templates").mkdir()
            (writer.folder / "templates" / "mine.jinja").touch(0o600)
            writer.finish({})
            writer.commit()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes.pop("templates") == 0o777 & ~mask
    assert len(modes) == 5 and set(modes.values()) == {0o666 & ~mask}


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_many_shards_and_one_file_are_the_same_model(format, tiny_model, tmp_path, prune, logits_of):
    prune(tiny_model, tmp_path / "one", format=format)
    one = TensorFiles(tmp_path / "one")
    with CheckpointWriter(tmp_path / "many", flush_bytes=20_000) as writer:
        for name, tensor in one.read(one.entries).items():
            writer.add(name, tensor)
            writer.end_block()
        for path in (tmp_path / "one").iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, writer.folder)
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
