"""Save the state of a run beside the unfinished checkpoint, so that the same command resumes after an interruption."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paredown.compress.checkpoint.writer import STATE, CheckpointWriter, sync
from paredown.compress.errors import PareError
from paredown.compress.job import Job
from paredown.compress.model.stream import Stream
from paredown.compress.progress import ignore
from paredown.compress.text.windows import Windows

SAVE_EVERY = 300.0  # seconds


@dataclass(frozen=True)
class State:
    """A saved state: plain data, and a file whose tensors are called `part/name` for each part of the run."""

    facts: dict[str, Any]
    path: Path

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part by name, read from the file; the next save replaces it."""
        with safe_open(self.path, "pt") as file:
            keys = [key for key in file.keys() if key.startswith(f"{name}/")]  # noqa: SIM118 - it is no dictionary
            return {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in keys}

    def restore(self, streams: Mapping[str, Stream]) -> None:
        """Give each stream the hidden states that it had when the state was saved."""
        for name, stream in streams.items():
            stream.hidden = [hidden for _, hidden in sorted(self.part(name).items(), key=lambda item: int(item[0]))]
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
        self.state = self._load()
        if self.state is None or not self.writer.restore(self.state.facts["writer"], self.state.part("pending")):
            self.state = None
            self.writer.clear()

    @property
    def seconds(self) -> float:
        """Seconds since this process opened the journal."""
        return monotonic() - self._began

    def due(self, last: bool) -> bool:
        """Whether it is time to save. After the `last` block any run longer than `every` saves, because tasks may follow."""
        return monotonic() - (self._began if last else self._saved) >= self.every

    def save(self, facts: dict[str, Any], streams: Mapping[str, Stream], tensors: Mapping[str, Tensor]) -> None:
        """Replace the saved state. `facts` are plain data. If it cannot be written, a note says so and the run goes on."""
        written, pending = self.writer.progress()
        facts = {**facts, "key": self.key, "writer": written, "streams": {n: s.seconds for n, s in streams.items()}}
        hidden = {f"{name}/{i}": t for name, s in streams.items() for i, t in enumerate(s.hidden)}
        everything = {**hidden, **tensors, **{f"pending/{name}": t for name, t in pending.items()}}
        path = self.writer.folder / STATE
        new = path.with_suffix(".new")
        try:
            save_file(_unshared(everything), new, metadata={"facts": json.dumps(facts)})
            sync(new)
            new.replace(path)
        except (OSError, SafetensorError) as fault:
            new.unlink(missing_ok=True)
            self.note(f"what is done so far could not be saved ({fault}): a stopped run would do it again")
        self._saved = monotonic()

    def _load(self) -> State | None:
        path = self.writer.folder / STATE
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
        except SafetensorError:  # the machine went down while it was written
            return None
        if facts["key"] != self.key:
            raise PareError(
                f"{self.writer.folder} holds what another command, other text or another version has done so far. "
                "Remove it, or name another output with -o."
            )
        return State(facts, path)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors; of those that share memory, as streams do before the first block, all but one are copied."""
    seen: set[int] = set()
    unshared: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if address in seen else tensor.contiguous()
        seen.add(address)
    return unshared


def key_of(job: Job, texts: Sequence[Windows], versions: Mapping[str, str]) -> str:
    """A hash of all that a run depends on: model files, recipe, plugins, tokens, format, device, dtype and versions."""
    source, recipe = job.source, job.recipe
    files = sorted(p for p in source.folder.iterdir() if p.is_file())
    inputs = {
        "model": [source.id, source.revision, [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]],
        "recipe": recipe.to_dict(),
        "plugins": [hashlib.sha256(Path(plugin).expanduser().read_bytes()).hexdigest() for plugin in recipe.plugins],
        "texts": [hashlib.sha256(w.ids.numpy().tobytes()).hexdigest() for w in texts],
        "run": [job.format, str(source.device), str(source.dtype), versions],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
