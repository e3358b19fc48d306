"""A checkpoint appears whole or not at all."""

import errno
import fcntl
import json

import pytest
import torch
from safetensors.torch import load_file

from paredown.compress.checkpoint import writer as writers
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import INDEX, TensorFiles, sha256
from paredown.compress.checkpoint.writer import RECORD, CheckpointWriter
from paredown.compress.errors import PareError

T = torch.arange(12.0).view(3, 4)


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
    (left / ".lock").touch()
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", T)
        writer.finish({})
        writer.commit()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.safetensors", RECORD]


def test_a_folder_that_somebody_writes_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "theirs").touch()
    with (tmp_path / "out.partial" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PareError, match="another process is writing"), CheckpointWriter(tmp_path / "out"):
            pass
    assert (tmp_path / "out.partial" / "theirs").exists()


def test_a_signal_while_it_opens_leaves_nothing(tmp_path, monkeypatch):
    flock = fcntl.flock

    def stop(*arguments):
        monkeypatch.setattr(writers.fcntl, "flock", flock)
        raise KeyboardInterrupt

    monkeypatch.setattr(writers.fcntl, "flock", stop)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out"):
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
def test_many_shards_and_one_file_are_the_same_model(format, tiny_model, tmp_path, prune, logits_of, monkeypatch):
    prune(tiny_model, tmp_path / "one", format=format)
    monkeypatch.setattr(writers, "FLUSH_BYTES", 20_000)
    prune(tiny_model, tmp_path / "many", format=format)
    many, one = TensorFiles(tmp_path / "many"), TensorFiles(tmp_path / "one")
    shards = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(e.bytes for e in many.entries.values())
    assert set(index["weight_map"]) == set(one.entries)
    theirs = many.read(many.entries)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in one.read(one.entries).items())
    assert torch.equal(logits_of(tmp_path / "many"), logits_of(tmp_path / "one"))
    assert not ModelSource(tmp_path / "many", "many").verbatim


def test_a_shard_never_grows_past_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "MAX_SHARD_BYTES", 100)
    with CheckpointWriter(tmp_path / "out") as writer:
        for i in range(5):
            writer.add(f"t{i}", T + i)
        writer.finish({})
        writer.commit()
    files = TensorFiles(tmp_path / "out")
    assert len({e.file for e in files.entries.values()}) == 3
    assert all(torch.equal(files.read([f"t{i}"])[f"t{i}"], T + i) for i in range(5))
