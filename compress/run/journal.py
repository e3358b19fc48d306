"""What a stopped run goes on from: all that the blocks done so far leave behind, saved beside the unfinished checkpoint."""

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

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import STATE, CheckpointWriter, sync
from paredown.compress.errors import PareError
from paredown.compress.model.stream import Stream
from paredown.compress.recipe import Recipe
from paredown.compress.text.windows import Windows

EVERY = 300.0  # seconds from one saved state to the next, and before the first: a shorter run starts over


@dataclass(frozen=True)
class State:
    """Facts that JSON can hold, and a file of tensors by name: `part/...` for each part of the run."""

    facts: dict[str, Any]
    path: Path

    def part(self, name: str) -> dict[str, Tensor]:
        """Read from the file, which the next save replaces."""
        with safe_open(self.path, "pt") as file:
            keys = [key for key in file.keys() if key.startswith(f"{name}/")]  # noqa: SIM118 - it is no dictionary
            return {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in keys}

    def restore(self, streams: Mapping[str, Stream]) -> None:
        """Put the streams where they were."""
        for name, stream in streams.items():
            stream.hidden = [hidden for _, hidden in sorted(self.part(name).items(), key=lambda item: int(item[0]))]
            stream.seconds = self.facts["streams"][name]


@dataclass
class Journal:
    """Saves a run's state in the writer's folder now and then; `left` is what a run of the same key left there.

    Raises PareError if that of another key lies there: hours of somebody's work.
    """

    writer: CheckpointWriter
    key: str
    note: Callable[[str], None] = lambda text: None
    left: State | None = field(init=False)
    _began: float = field(default_factory=monotonic)

    def __post_init__(self) -> None:
        self._saved = self._began
        self.left = self._load()
        if self.left is None or not self.writer.restore(self.left.facts["writer"], self.left.part("pending")):
            self.left = None
            self.writer.clear()

    @property
    def seconds(self) -> float:
        """Since this process opened it."""
        return monotonic() - self._began

    def due(self, last: bool) -> bool:
        """Whether it is time; after the `last` block a long run saves at once, for the tasks that follow."""
        return monotonic() - (self._began if last else self._saved) >= EVERY

    def save(self, facts: dict[str, Any], streams: Mapping[str, Stream], tensors: Mapping[str, Tensor]) -> None:
        """Replace the saved state. A full disk is told, and does not stop the run."""
        written, pending = self.writer.progress()
        facts = {**facts, "key": self.key, "writer": written, "streams": {n: s.seconds for n, s in streams.items()}}
        hidden = {f"{name}/{i}": t for name, s in streams.items() for i, t in enumerate(s.hidden)}
        whole = {**hidden, **tensors, **{f"pending/{name}": t for name, t in pending.items()}}
        path = self.writer.folder / STATE
        new = path.with_suffix(".new")
        try:
            save_file(_apart(whole), new, metadata={"facts": json.dumps(facts)})
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
        except SafetensorError:  # the machine went down with it
            return None
        if facts["key"] != self.key:
            raise PareError(
                f"{self.writer.folder} holds what another command, other text or another version has done so far. "
                "Remove it, or name another output with -o."
            )
        return State(facts, path)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that share memory are copied: streams do before the first block."""
    seen: set[int] = set()
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        made[name] = tensor.clone() if place in seen else tensor.contiguous()
        seen.add(place)
    return made


def key_of(
    source: ModelSource, recipe: Recipe, texts: Sequence[Windows], format: str, versions: Mapping[str, str]
) -> str:
    """Equal where a run would do the same: the same files of the model, recipe, tokens, format, device and versions."""
    files = sorted(p for p in source.folder.iterdir() if p.is_file())
    said = {
        "model": [source.id, source.revision, [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]],
        "recipe": recipe.to_dict(),
        "texts": [hashlib.sha256(w.ids.numpy().tobytes()).hexdigest() for w in texts],
        "run": [format, str(source.device), str(source.dtype), versions],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
