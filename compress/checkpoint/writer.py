"""Write a checkpoint so that it appears whole or not at all: all files go to OUT.partial, and one rename makes it OUT.

While a process writes OUT.partial it holds a lock on OUT.partial.lock beside it, which the system frees if it is killed.
"""

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from paredown.compress.checkpoint.tensor_files import INDEX, SINGLE, sha256
from paredown.compress.errors import PareError
from paredown.compress.storage.kinds import FORMAT_VERSION

RECORD = "paredown.json"
FLUSH_BYTES = 64 << 20
MAX_SHARD_BYTES = 5 << 30
SCRATCH = "scratch"  # a folder in OUT.partial
STATE = "resume.safetensors"  # the state from which a stopped run continues: run/journal.py


class CheckpointWriter:
    """Collects tensors into shards in `OUT.partial`; `commit` renames the folder to OUT.

    Leaving the `with` block without a commit removes the folder. If the writer is `resumable` and the folder holds a saved
    state, it stays, and the fault gets a note that says so.

    A shard is written, once `flush_bytes` are pending, by a thread that is at most one shard behind the caller: what was
    added must not change. One tensor aside, no shard exceeds `max_shard_bytes`.

    Raises PareError if OUT exists and is not empty, if another process is writing it, or if the disk is full.
    """

    def __init__(
        self,
        out: Path,
        resumable: bool = False,
        flush_bytes: int = FLUSH_BYTES,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.out, self.resumable = Path(out), resumable
        self.flush_bytes, self.max_shard_bytes = flush_bytes, max_shard_bytes
        self.folder = self.out.with_name(self.out.name + ".partial")
        self.tensors: dict[str, dict[str, Any]] = {}  # name -> its record
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[Path] = []
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._saving: Future[None] | None = None
        self._lock = FileLock(f"{self.folder}.lock", thread_local=False)
        self._committed = False

    def __enter__(self) -> "CheckpointWriter":
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise PareError(f"{self.out} exists and is not empty. Name another output with -o, or remove it first.")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._open()
        except BaseException:  # a signal too: `__exit__` does not run after it
            self._discard()
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.shutdown(cancel_futures=True)
        if not self._committed:
            self._discard()
        self._unlock()
        disk_full = isinstance(fault, OSError) and fault.errno == errno.ENOSPC
        error = (
            PareError(f"the disk of {self.out.parent} is full. Free space or name another output.")
            if disk_full
            else fault
        )
        if error is not None and self.folder.exists():
            error.add_note(f"{self.folder} is kept: the command that began it goes on from there")
        if disk_full:
            assert error is not None
            raise error from fault

    def _open(self) -> None:
        """Lock the folder, make it if it is not there, and empty it unless a stopped run may continue in it."""
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise PareError(f"another process is writing {self.folder}. Wait for it, or name another output.") from None
        self.folder.mkdir(exist_ok=True)
        if not self.resumable:
            self.clear()

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove what a killed run left in the folder, except the names in `keep`."""
        for path in self.folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _discard(self) -> None:
        """Remove the folder, unless another process writes it or a stopped run can continue in it."""
        if self.resumable and (self.folder / STATE).exists():
            return
        with suppress(OSError):  # Timeout is one
            self._lock.acquire(blocking=False)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _unlock(self) -> None:
        """Free the lock and leave no file of it. Unix removes the name first, so that no two processes lock one name."""
        if not self._lock.is_locked:
            return
        file = Path(self._lock.lock_file)
        if os.name == "nt":  # where an open file cannot be removed, neither ours nor that of the next process
            self._lock.release(force=True)
            with suppress(OSError):
                file.unlink()
        else:
            file.unlink(missing_ok=True)
            self._lock.release(force=True)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors added so far."""
        return sum(record["bytes"] for record in self.tensors.values())

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder beside the shards for a run's temporary files. A run that stops leaves it for the one that continues."""
        folder = self.folder / SCRATCH
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)

    def add(self, name: str, tensor: Tensor, **record: Any) -> None:
        """Queue one tensor. `record` goes into paredown.json beside its shape, dtype, bytes and sha256."""
        tensor = tensor.detach().to("cpu").contiguous()
        size = tensor.numel() * tensor.element_size()
        self.tensors[name] = {
            **record,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": size,
        }
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size

    def end_block(self) -> None:
        """Write a shard if enough is pending."""
        if self._pending_bytes >= self.flush_bytes:
            self._flush()

    def progress(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `restore` needs, as JSON and as tensors; the shards that it names are on the disk by then."""
        self._wait()
        for shard in self._shards:
            sync(shard)
        return {"tensors": self.tensors, "shards": [s.name for s in self._shards]}, self._pending

    def restore(self, facts: dict[str, Any], pending: dict[str, Tensor]) -> bool:
        """Continue from the `progress` of an earlier writer of this folder. False if its shards are not all there."""
        shards = [self.folder / name for name in facts["shards"]]
        for i, shard in enumerate(shards):
            final = [*self.folder.glob(f"model-{i + 1:05d}-of-*.safetensors"), self.folder / SINGLE][0]
            if not shard.exists() and final.exists():  # that writer was stopped after `finish`
                final.rename(shard)
        if not all(shard.exists() for shard in shards):
            return False
        self.clear(keep={STATE, SCRATCH, *facts["shards"]})
        self.tensors, self._shards, self._pending = facts["tensors"], shards, dict(pending)
        self._pending_bytes = sum(t.numel() * t.element_size() for t in pending.values())
        return True

    def finish(self, record: dict[str, Any]) -> None:
        """Write the last shard, the index, and paredown.json with `record` and the record of every tensor."""
        if self._pending:
            self._flush()
        self._wait()
        names = [SINGLE] if len(self._shards) == 1 else _numbered(len(self._shards))
        final_names = {}
        for shard, name in zip(self._shards, names, strict=True):
            shard.rename(self.folder / name)
            final_names[shard.name] = name
        for entry in self.tensors.values():
            entry["file"] = final_names[entry["file"]]
        if len(names) > 1:
            weight_map = {name: entry["file"] for name, entry in sorted(self.tensors.items())}
            self.write_json(INDEX, {"metadata": {"total_size": self.bytes}, "weight_map": weight_map})
        self.write_json(RECORD, {"format_version": FORMAT_VERSION, **record, "tensors": self.tensors})

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, content: str) -> None:
        (self.folder / name).write_text(content, encoding="utf-8", newline="\n")

    def copy(self, files: list[Path]) -> None:
        for file in files:
            shutil.copyfile(file, self.folder / file.name)

    def commit(self) -> None:
        """Flush all files to the disk and rename the folder to OUT."""
        for path in self.folder.iterdir():
            sync(path)
        (self.folder / STATE).unlink(missing_ok=True)  # only once all else is safe
        sync(self.folder)
        if self.out.exists():
            self.out.rmdir()  # empty: `__enter__` checked it
        self.folder.rename(self.out)
        sync(self.out.parent)
        self._committed = True

    def _flush(self) -> None:
        self._wait()
        path = self.folder / f"shard-{len(self._shards) + 1:05d}.safetensors"
        self._saving = self._worker.submit(self._save, path, self._pending)
        self._shards.append(path)
        self._pending, self._pending_bytes = {}, 0

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.tensors[name].update(sha256=sha256(tensor), file=path.name)
        save_file(tensors, path, metadata={"format": "pt"})

    def _wait(self) -> None:
        """Wait for the shard that is being written. Raises the fault of its thread."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None


def _numbered(count: int) -> list[str]:
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def sync(path: Path) -> None:
    """Flush a file, or the list of files of a folder, to the disk."""
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():  # Windows opens no folders, and keeps their lists of files by itself
        return
    handle = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)  # and flushes only what it may write
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pending_bytes(block: int) -> int:
    """About what the writer holds of blocks of so many bytes, half of whose weights are removed: one shard is filled while
    another is written, and saving makes one more copy."""
    return 3 * (FLUSH_BYTES + block * 9 // 16)
