"""Write a checkpoint so that it appears whole or not at all: tensors in shards, and what describes them beside them."""

import json
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from paredown.compress.checkpoint.disk import FULL, in_words, save_tensors, sync, system_fault
from paredown.compress.checkpoint.out_folder import SCRATCH, STATE, OutFolder
from paredown.compress.checkpoint.tensor_files import INDEX, SINGLE, sha256
from paredown.compress.errors import PareError
from paredown.compress.storage.kinds import FORMAT_VERSION

RECORD = "paredown.json"
LOG = "log.jsonl"  # what the run told, see run/run_log.py
SCORES = "evaluation"  # a folder of scores that were measured on what is written: each names what it depends on
FLUSH_BYTES = 64 << 20
MAX_SHARD_BYTES = 5 << 30
METADATA = {"format": "pt"}  # of a shard, as transformers writes it


class Damaged(Exception):
    """What a stopped run left is not what it wrote. The message says which file, and how it differs."""


class CheckpointWriter:
    """Collects tensors into shards in `folder`, which `commit` makes OUT: see `OutFolder`.

    Leaving the `with` block without a commit removes the folder. If the writer is `resumable` and the folder holds a saved
    state, or if the checkpoint in it is finished, it stays, and the fault gets a note that says so. `key` names the run.

    A shard is written, once `flush_bytes` are pending, by a thread that is at most one shard behind the caller: what was
    added must not change. One tensor aside, no shard exceeds `max_shard_bytes`.

    `remote_code`: code that loads packed weights goes along, see remote_code.py.

    Raises PareError if OUT exists and is not empty, if it cannot be written, if another process is writing it, if what
    another run left would be lost, or if the disk is full.
    """

    def __init__(
        self,
        out: Path,
        resumable: bool = False,
        flush_bytes: int = FLUSH_BYTES,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        remote_code: bool = False,
    ) -> None:
        self.out, self.resumable, self.key = Path(out), resumable, ""
        self.remote_code = remote_code
        self.flush_bytes, self.max_shard_bytes = flush_bytes, max_shard_bytes
        self.place = OutFolder(self.out)
        self.tensors: dict[str, dict[str, Any]] = {}  # name -> its record
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[Path] = []
        self.keep = False  # what was written is worth a look, though it is not finished
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._saving: Future[None] | None = None

    def __enter__(self) -> "CheckpointWriter":
        try:
            self.place.open()
            if not self.resumable:
                self._open_anew()
        except BaseException as fault:  # a signal too: `__exit__` does not run after it
            self.__exit__(type(fault), fault, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.shutdown(cancel_futures=True)
        error = self._in_words(fault) or fault
        self._leave(error)
        if error is not None and error is not fault:
            raise error from fault

    def _open_anew(self) -> None:
        """Empty the folder. Raises PareError if another run may continue in it."""
        if self.place.has_state or self.place.finished is not None:
            raise self.belongs_to_another()
        self.clear()

    def _leave(self, fault: BaseException | None) -> None:
        """Remove the folder unless there is something in it to keep, which `fault` is told, and free the lock."""
        try:
            if self.place.finished is None and not self.place.has_state and not self.keep:
                self.place.discard()
            self.place.close()
        except BaseException as late:  # a signal
            self._tell(late)
            raise
        if fault is not None:
            self._tell(fault)

    def _tell(self, fault: BaseException) -> None:
        """Add to a fault what it leaves."""
        if self.place.placed:
            fault.add_note(f"{self.out} is whole: the run was done")
        elif self.place.has_state:
            fault.add_note(f"{self.folder} is kept: the command that began it goes on from there")
        elif self.place.finished is not None and not isinstance(fault, PareError):
            fault.add_note(f"{self.folder} is kept, with the finished checkpoint: {self.place.by_hand}")

    def _in_words(self, fault: BaseException | None) -> PareError | None:
        """The sentence for a fault of the disk that we write to; None for any other fault."""
        system = system_fault(fault)
        if system is None:
            return None
        files = [Path(str(name)) for name in (system.filename, system.filename2) if name is not None]
        if any(file.is_relative_to(self.folder) for file in files) or (not files and system.errno in FULL):
            return in_words(system, self.out, self.folder.parent)
        return in_words(system, self.out, files[0].parent) if system.errno in FULL else None

    def belongs_to_another(self) -> PareError:
        """The refusal of a folder in which another run may go on, or whose checkpoint only has to be moved."""
        if self.place.finished is not None:
            return PareError(
                f"{self.folder} holds a finished checkpoint that could not be moved to {self.out}. "
                f"Move it ({self.place.by_hand}), remove it, or name another output with -o."
            )
        return PareError(
            f"{self.folder} holds what another command, other text or another version has done so far. "
            "Remove it, or name another output with -o."
        )

    @property
    def folder(self) -> Path:
        """Where files are written until `commit`."""
        return self.place.folder

    @property
    def left(self) -> int:
        """Bytes of a checkpoint that a stopped run has left in the folder."""
        return sum(path.lstat().st_size for path in self.folder.glob("*.safetensors") if path.name != STATE)

    def clear(self, keep: Collection[str] = ()) -> None:
        """Begin anew in the folder: remove what a stopped run left there, except the names in `keep`."""
        self.place.begin(keep)

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
        self.tensors[name] = {**record, **_described(tensor), "bytes": size}
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

    def restore(self, facts: dict[str, Any], pending: dict[str, Tensor]) -> None:
        """Continue from the `progress` of an earlier writer of this folder. Raises Damaged if its shards have changed."""
        self.place.reopen()
        shards = [self.folder / name for name in facts["shards"]]
        for i, shard in enumerate(shards):
            finals = [*self.folder.glob(f"model-{i + 1:05d}-of-*.safetensors"), self.folder / SINGLE]
            if not shard.exists() and finals[0].exists():  # that writer was stopped after `finish`
                finals[0].rename(shard)
            _check_shard(shard, {n: r for n, r in facts["tensors"].items() if r.get("file") == shard.name})
        self.clear(keep={STATE, SCRATCH, SCORES, LOG, *facts["shards"]})
        self.tensors, self._shards, self._pending = facts["tensors"], shards, dict(pending)
        self._pending_bytes = sum(t.numel() * t.element_size() for t in pending.values())

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
        path = self.folder / name
        try:
            path.write_text(content, encoding="utf-8", newline="\n")
        except OSError as fault:  # which does not name the file where it could be opened
            raise OSError(fault.errno, fault.strerror, str(path)) from fault

    def commit(self) -> None:
        """Make the folder OUT. Raises PareError, which says where the checkpoint lies, if it cannot be put there."""
        self.place.commit(self.key)

    def commit_finished(self, key: str) -> bool:
        """Make OUT of a checkpoint that a run of this key had finished and could not put there. False if there is none."""
        if self.place.finished is None or self.place.finished != key:
            return False
        self.place.commit(key)
        return True

    def _flush(self) -> None:
        self._wait()
        path = self.folder / f"shard-{len(self._shards) + 1:05d}.safetensors"
        self._saving = self._worker.submit(self._save, path, self._pending)
        self._shards.append(path)
        self._pending, self._pending_bytes = {}, 0

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.tensors[name].update(sha256=sha256(tensor), file=path.name)
        save_tensors(tensors, path, METADATA)

    def _wait(self) -> None:
        """Wait for the shard that is being written. Raises the fault of its thread."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None


def _numbered(count: int) -> list[str]:
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _check_shard(shard: Path, recorded: dict[str, dict[str, Any]]) -> None:
    """Raises Damaged if a shard does not hold exactly the recorded tensors."""
    if shard.is_symlink() or not shard.is_file():
        raise Damaged(f"{shard.name} is missing")
    try:
        with safe_open(shard, "pt") as file:
            if set(file.keys()) != set(recorded) or file.metadata() != METADATA:
                raise Damaged(f"{shard.name} holds other tensors than were written")
            for name, record in recorded.items():
                tensor = file.get_tensor(name)
                if _described(tensor) != {key: record[key] for key in ("shape", "dtype")}:
                    raise Damaged(f"{name} in {shard.name} has another shape or type than was written")
                if sha256(tensor) != record["sha256"]:
                    raise Damaged(f"{name} in {shard.name} has changed since it was written")
    except SafetensorError as fault:
        if (system := system_fault(fault)) is not None:
            raise OSError(system.errno, system.strerror, str(shard)) from fault
        raise Damaged(f"{shard.name} cannot be read: {fault}") from fault


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def pending_bytes(block: int) -> int:
    """About what the writer holds of blocks of so many bytes, half of whose weights are removed: one shard is filled while
    another is written, and saving makes one more copy."""
    return 3 * (FLUSH_BYTES + block * 9 // 16)
