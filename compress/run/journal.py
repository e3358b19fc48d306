"""Save the state of a run beside the unfinished checkpoint, so that the same command resumes after an interruption."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from paredown.compress.checkpoint.disk import save_tensors, sync, system_fault
from paredown.compress.checkpoint.out_folder import SCRATCH, STATE
from paredown.compress.checkpoint.tensor_files import sha256
from paredown.compress.checkpoint.writer import CheckpointWriter, Damaged
from paredown.compress.model.carried import unshared
from paredown.compress.model.stream import Stream
from paredown.compress.progress import ignore
from paredown.compress.text.windows import Windows

SAVE_EVERY = 300.0  # seconds
STATE_FORMAT = 3  # of what a walk saves: another one cannot be gone on from


@dataclass(frozen=True)
class State:
    """A saved state: plain data, and a file whose tensors are called `part/name` for each part of the run.

    The file's metadata holds the facts as JSON and their sha256; the facts hold a digest of each tensor and scratch file.
    """

    facts: dict[str, Any]
    path: Path

    @classmethod
    def read(cls, path: Path) -> "State":
        """The state in a file whose facts are as they were written. Raises Damaged, or OSError if it cannot be read."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            if _sha256(metadata["facts"]) != metadata["sha256"]:
                raise Damaged(f"the facts in {path.name} have changed since they were written")
            return cls(json.loads(metadata["facts"]), path)
        except SafetensorError as fault:  # the machine went down while it was written
            if (system := system_fault(fault)) is not None:
                raise OSError(system.errno, system.strerror, str(path)) from fault
            raise Damaged(f"{path.name} cannot be read: {fault}") from fault
        except (KeyError, TypeError) as fault:
            raise Damaged(f"{path.name} holds no facts") from fault

    def check(self) -> None:
        """Read all tensors and scratch files once. Raises Damaged if one is not as it was written."""
        try:
            with safe_open(self.path, "pt") as file:
                stored = {key: _digest(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 - no dictionary
        except SafetensorError as fault:
            raise Damaged(f"{self.path.name} cannot be read: {fault}") from fault
        for name in sorted(stored.keys() | self.facts["tensors"].keys()):
            if stored.get(name) != self.facts["tensors"].get(name):
                raise Damaged(f"{name!r} in {self.path.name} has changed since it was written")
        for name, digest in self.facts["scratch"].items():
            scratch_file = self.path.parent / SCRATCH / name
            linked = scratch_file.is_symlink() or scratch_file.parent.is_symlink()
            if linked or not scratch_file.is_file() or _file_sha256(scratch_file) != digest:
                raise Damaged(f"{SCRATCH}/{name} is missing or has changed since it was written")

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part by name, read from the file; the next save replaces it."""
        with safe_open(self.path, "pt") as file:
            keys = [key for key in file.keys() if key.startswith(f"{name}/")]  # noqa: SIM118 - it is no dictionary
            return {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in keys}

    def restore(self, streams: Mapping[str, Stream]) -> None:
        """Give each stream the hidden states that it had when the state was saved."""
        for name, stream in streams.items():
            stream.restore(self.part(name), self.facts["carried"][name])
            stream.seconds = self.facts["streams"][name]


@dataclass
class Journal:
    """Saves a run's state in the writer's folder; `state` is what an interrupted run of the same key saved there, or None.

    `every`: seconds between two saves, and before the first; a run that is interrupted earlier starts again.
    Raises PareError if the folder holds the state of another key, which may be hours of somebody's work.
    """

    writer: CheckpointWriter
    key: str
    note: Callable[[str], None] = ignore
    every: float = SAVE_EVERY
    state: State | None = field(init=False)
    _began: float = field(default_factory=monotonic)

    def __post_init__(self) -> None:
        self._saved = self._began
        self._digests: dict[tuple[str, int, int], str] = {}  # of scratch files, by name, size and time
        self.writer.key = self.key
        self.state = None
        try:
            self.state = self._restored()
        except Damaged as fault:
            self.note(
                f"what a stopped run left in {self.writer.folder} is damaged ({fault}): starting from the beginning"
            )
        if self.state is None:
            self.writer.clear()

    @property
    def seconds(self) -> float:
        """Seconds since this process opened the journal."""
        return monotonic() - self._began

    def due(self, last: bool) -> bool:
        """Whether it is time to save. After the `last` block any run longer than `every` saves, because tasks may follow."""
        return monotonic() - (self._began if last else self._saved) >= self.every

    def save(
        self, facts: dict[str, Any], streams: Mapping[str, Stream], tensors: Mapping[str, Tensor], last: bool = False
    ) -> None:
        """Replace the saved state. `facts` are plain data; after the `last` block the scratch files are done with.

        If it cannot be written, a note says so and the run goes on.
        """
        written, pending = self.writer.progress()
        facts = {**facts, "key": self.key, "writer": written, "streams": {n: s.seconds for n, s in streams.items()}}
        states = {name: stream.state() for name, stream in streams.items()}
        facts["carried"] = {name: structure for name, (_, structure) in states.items()}
        hidden = {f"{name}/{key}": t for name, (tensors, _) in states.items() for key, t in tensors.items()}
        everything = unshared({**hidden, **tensors, **{f"pending/{name}": t for name, t in pending.items()}})
        path = self.writer.folder / STATE
        new = path.with_suffix(".new")
        try:
            facts["tensors"] = {name: _digest(tensor) for name, tensor in everything.items()}
            facts["scratch"] = {} if last else self._scratch()
            told = json.dumps(facts)
            save_tensors(everything, new, {"facts": told, "sha256": _sha256(told)})
            sync(new)
            new.replace(path)
            sync(path.parent)
        except (OSError, SafetensorError) as fault:
            new.unlink(missing_ok=True)
            self.note(f"what is done so far could not be saved ({fault}): a stopped run would do it again")
        self._saved = monotonic()

    def _restored(self) -> State | None:
        """The state that a run of the same key left, with the writer as it was then; None if there is none.

        Raises Damaged, and PareError for what a run of another key left.
        """
        place = self.writer.place
        if place.finished not in (None, self.key):
            raise self.writer.belongs_to_another()
        if not place.has_state:
            return None
        state = State.read(self.writer.folder / STATE)
        if state.facts["key"] != self.key:
            raise self.writer.belongs_to_another()
        state.check()
        self.writer.restore(state.facts["writer"], state.part("pending"))
        return state

    def _scratch(self) -> dict[str, str]:
        """The digest of each scratch file by its name, flushed. Files that have not changed are not read again."""
        folder = self.writer.folder / SCRATCH
        digests = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            stamp = path.stat()
            seen = (path.name, stamp.st_size, stamp.st_mtime_ns)
            if seen not in self._digests:
                sync(path)
                self._digests[seen] = _file_sha256(path)
            digests[path.name] = self._digests[seen]
        return digests


def _digest(tensor: Tensor) -> list[Any]:
    """What tells a tensor from every other: type, shape and the sha256 of its bytes, as JSON holds them."""
    return [str(tensor.dtype), list(tensor.shape), sha256(tensor)]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(job: Any, texts: Sequence[Windows], versions: Mapping[str, str]) -> str:
    """A hash of all that a run depends on: model files, recipe, plugins, tokens, format, device, dtype and versions."""
    source, recipe = job.source, job.recipe
    # an output in the model's folder has its lock there
    files = sorted(p for p in source.folder.iterdir() if p.is_file() and p.suffix != ".lock")
    inputs = {
        "model": [source.id, source.revision, [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]],
        "recipe": recipe.to_dict(),
        "plugins": [hashlib.sha256(Path(plugin).expanduser().read_bytes()).hexdigest() for plugin in recipe.plugins],
        "texts": [
            hashlib.sha256(part.ids.numpy().tobytes()).hexdigest() for w in texts for part in (w, w.domain) if part
        ],
        "run": [STATE_FORMAT, job.format, str(source.device), str(source.dtype), versions],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
