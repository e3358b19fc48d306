"""Write a checkpoint so that it appears whole or not at all: everything goes to OUT.partial, one rename commits."""

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from safetensors.torch import save_file
from torch import Tensor

from paredown.compress.checkpoint.tensor_files import INDEX, SINGLE, sha256
from paredown.compress.errors import PareError
from paredown.compress.storage.kinds import FORMAT_VERSION

RECORD = "paredown.json"
FLUSH_BYTES = 64 << 20  # a shard is written once this much is pending: small models stay one file, memory stays small
MAX_SHARD_BYTES = 5 << 30
SCRATCH = "scratch"
STATE = "resume.safetensors"  # what a stopped run goes on from: resume.py


class CheckpointWriter:
    """Collects tensors into shards below `OUT.partial`; `commit` renames it to OUT. Leaving without commit removes it,
    unless it is `resumable` and holds a state to go on from: then the fault says so.

    Hashing and writing go on beside the caller's work, at most one shard behind it: what was added must not change.
    Raises PareError if OUT exists and is not empty, or if another process is writing it.
    """

    def __init__(self, out: Path, resumable: bool = False) -> None:
        self.out, self.resumable = Path(out), resumable
        self.folder = self.out.with_name(self.out.name + ".partial")
        self.tensors: dict[str, dict[str, Any]] = {}  # name -> its record
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[Path] = []
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._saving: Future[None] | None = None
        self._lock: IO[str] | None = None
        self._committed = False

    def __enter__(self) -> "CheckpointWriter":
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise PareError(f"{self.out} exists and is not empty. Name another output with -o, or remove it first.")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._take()
        except BaseException:  # also a signal, which would find no `__exit__` to run
            self._drop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.shutdown(cancel_futures=True)
        if not self._committed:
            self._drop()
        if self._lock is not None:
            self._lock.close()
        full = isinstance(fault, OSError) and fault.errno == 28  # ENOSPC
        told = (
            PareError(f"the disk of {self.out.parent} is full. Free space or name another output.") if full else fault
        )
        if told is not None and self.folder.exists():
            told.add_note(f"{self.folder} is kept: the command that began it goes on from there")
        if full:
            assert told is not None
            raise told from fault

    def _take(self) -> None:
        """Have the folder to ourselves, and empty."""
        self.folder.mkdir(exist_ok=True)
        try:
            self._hold()
        except BlockingIOError:
            raise PareError(f"another process is writing {self.folder}. Wait for it, or name another output.") from None
        if not self.resumable:
            self.clear()

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove what a run that was killed has left: the lock says that nobody works on it."""
        for left in self.folder.iterdir():
            if left.name not in {".lock", *keep}:
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _hold(self) -> None:
        self._lock = self._lock or (self.folder / ".lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _drop(self) -> None:
        """Remove the folder, unless it is another process's or holds a state to go on from."""
        if self.resumable and (self.folder / STATE).exists():
            return
        with suppress(OSError):
            self._hold()
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors so far."""
        return sum(record["bytes"] for record in self.tensors.values())

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder beside the shards for what a run must put aside; a run that is stopped leaves it to the next one."""
        folder = self.folder / SCRATCH
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)

    def add(self, name: str, tensor: Tensor, **record: Any) -> None:
        """Queue one tensor, with what paredown.json shall tell of it beside shape, dtype, bytes and sha256."""
        tensor = tensor.detach().to("cpu").contiguous()
        size = tensor.numel() * tensor.element_size()
        self.tensors[name] = {
            **record,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": size,
        }
        if self._pending and self._pending_bytes + size > MAX_SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size

    def end_block(self) -> None:
        """Write out what is pending once it is worth a file."""
        if self._pending_bytes >= FLUSH_BYTES:
            self._flush()

    def progress(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `restore` needs, as facts and tensors, once all that was handed over is on the disk."""
        self._saved()
        for shard in self._shards:
            sync(shard)
        return {"tensors": self.tensors, "shards": [s.name for s in self._shards]}, self._pending

    def restore(self, facts: dict[str, Any], pending: dict[str, Tensor]) -> bool:
        """Go on from another writer's `progress` in the same folder; False if its shards are not there."""
        shards = [self.folder / name for name in facts["shards"]]
        for i, shard in enumerate(shards):
            finished = [*self.folder.glob(f"model-{i + 1:05d}-of-*.safetensors"), self.folder / SINGLE]
            if not shard.exists() and finished[0].exists():  # it was stopped after `finish`
                finished[0].rename(shard)
        if not all(shard.exists() for shard in shards):
            return False
        self.clear(keep={STATE, SCRATCH, *facts["shards"]})
        self.tensors, self._shards, self._pending = facts["tensors"], shards, dict(pending)
        self._pending_bytes = sum(t.numel() * t.element_size() for t in pending.values())
        return True

    def finish(self, record: dict[str, Any]) -> None:
        """Write the last shard, the index, and paredown.json with `record` and every tensor's own record."""
        if self._pending:
            self._flush()
        self._saved()
        names = [SINGLE] if len(self._shards) == 1 else _numbered(len(self._shards))
        final = {}
        for shard, name in zip(self._shards, names, strict=True):
            shard.rename(self.folder / name)
            final[shard.name] = name
        for entry in self.tensors.values():
            entry["file"] = final[entry["file"]]
        if len(names) > 1:
            weight_map = {name: entry["file"] for name, entry in sorted(self.tensors.items())}
            self.write_json(INDEX, {"metadata": {"total_size": self.bytes}, "weight_map": weight_map})
        self.write_json(RECORD, {"format_version": FORMAT_VERSION, **record, "tensors": self.tensors})

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, content: str) -> None:
        (self.folder / name).write_text(content)

    def copy(self, files: list[Path]) -> None:
        for file in files:
            shutil.copyfile(file, self.folder / file.name)

    def commit(self) -> None:
        """Make it durable and give it its name."""
        for path in self.folder.iterdir():
            sync(path)
        (self.folder / STATE).unlink(missing_ok=True)  # not before all else is safe
        (self.folder / ".lock").unlink()
        sync(self.folder)
        if self.out.exists():
            self.out.rmdir()  # checked to be empty
        self.folder.rename(self.out)
        sync(self.out.parent)
        self._committed = True

    def _flush(self) -> None:
        self._saved()
        path = self.folder / f"shard-{len(self._shards) + 1:05d}.safetensors"
        self._saving = self._worker.submit(self._save, path, self._pending)
        self._shards.append(path)
        self._pending, self._pending_bytes = {}, 0

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.tensors[name].update(sha256=sha256(tensor), file=path.name)
        save_file(tensors, path, metadata={"format": "pt"})

    def _saved(self) -> None:
        """Wait for the shard that is being written. Raises what went wrong there."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None


def _numbered(count: int) -> list[str]:
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
