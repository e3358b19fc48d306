"""What was measured of dense models, kept by content, so that a further run does not measure it again.

Of a text it is the hidden states behind the model's last block: from them the output head gives losses and the divergence
from any compressed model, and no block has to run. Of an lm-eval task it is the score with the value of each document. An
entry's name is a hash of all that it depends on: weights, tokens, dtype, kind of device, versions. A damaged entry is
measured anew and replaced.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from paredown.compress.checkpoint.companions import file_sha256
from paredown.compress.checkpoint.disk import save_tensors
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import TensorFiles, sha256
from paredown.compress.errors import PareError

FORMAT = 1  # of what is kept
STATES = ".states.safetensors"
UNFINISHED = ".new-"
DEFAULT_GB = 2.0
A_DAY = 86400  # seconds


@dataclass(frozen=True)
class ScoreCache:
    """A folder of entries of at most `most` bytes together: those that were not used for longest go first.

    Nothing that fails here stops a run: an entry that cannot be read or written is as good as none.
    """

    folder: Path
    most: int

    @classmethod
    def of_user(cls) -> "ScoreCache | None":
        """`scores` in the folder that PAREDOWN_CACHE names, by default ~/.cache/paredown; none where its size is 0.

        PAREDOWN_CACHE_GB is its size, by default 2. Raises PareError if that is no number.
        """
        own, shared = os.environ.get("PAREDOWN_CACHE"), os.environ.get("XDG_CACHE_HOME")
        folder = Path(own) if own else Path(shared or Path.home() / ".cache") / "paredown"
        size = os.environ.get("PAREDOWN_CACHE_GB") or DEFAULT_GB
        try:
            most = int(float(size) * 1e9)
        except (ValueError, OverflowError) as fault:
            raise PareError(f"PAREDOWN_CACHE_GB is {size!r}; wanted a number of gigabytes, such as 2, or 0.") from fault
        return cls(folder / "scores", most) if most > 0 else None

    def has_states(self, key: str) -> bool:
        """Whether hidden states were kept under a key; they may still turn out to be damaged."""
        return (self.folder / f"{key}{STATES}").is_file()

    def states(self, key: str) -> list[Tensor] | None:
        """The hidden states that were kept under a key, batch by batch (batch, length, hidden); None for none, or damaged."""
        path = self.folder / f"{key}{STATES}"
        try:
            with safe_open(path, "pt") as file:
                hidden = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
                whole: bool = file.metadata()["sha256"] == _digests(hidden)
            self.touch(path.name)
        except (OSError, SafetensorError, KeyError, TypeError):
            return None
        return hidden if whole else None

    def keep_states(self, key: str, hidden: Sequence[Tensor]) -> None:
        """Keep hidden states, batch by batch (batch, length, hidden), unless they are larger than the whole cache."""
        if sum(part.numel() * part.element_size() for part in hidden) <= self.most:
            with suppress(OSError, SafetensorError), self.adding() as place:
                named = {str(i): part for i, part in enumerate(hidden)}
                save_tensors(named, place / f"{key}{STATES}", {"sha256": _digests(hidden)})

    def touch(self, *names: str) -> None:
        """Say that these files were used now."""
        for name in names:
            with suppress(OSError):
                os.utime(self.folder / name)

    @contextmanager
    def adding(self) -> Iterator[Path]:
        """A folder whose files become entries where the `with` block ends, each whole or not at all; room is made for them.

        Raises OSError if they cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.folder, prefix=UNFINISHED, ignore_cleanup_errors=True) as place:
            yield Path(place)
            for path in list(Path(place).iterdir()):
                path.replace(self.folder / path.name)
        self._make_room()

    def _make_room(self) -> None:
        stamps = [(path, path.stat()) for path in self.folder.iterdir()]
        entries = sorted((stamp.st_mtime_ns, stamp.st_size, path) for path, stamp in stamps if path.is_file())
        left = sum(size for _, size, _ in entries) - self.most
        for _, size, path in entries:
            if left <= 0:
                break
            path.unlink(missing_ok=True)
            left -= size
        for path, stamp in stamps:
            if path.name.startswith(UNFINISHED) and stamp.st_mtime < time() - A_DAY:  # its process was killed
                shutil.rmtree(path, ignore_errors=True)


def content_key(folder: Path, source: ModelSource, **asked: Any) -> str:
    """A hash of the model in `folder`, of how `source` runs it, of what is `asked` of it (JSON), and of versions."""
    files = sorted({entry.file for entry in TensorFiles(folder).entries.values()} | {"config.json"})
    stamps = [(folder / name, (folder / name).stat()) for name in files]
    weights = _digest(tuple((path, stamp.st_size, stamp.st_mtime_ns) for path, stamp in stamps))
    runs = [str(source.dtype), source.device.type, [version(name) for name in ("torch", "transformers")]]
    return hashlib.sha256(json.dumps([FORMAT, weights, runs, asked], sort_keys=True).encode()).hexdigest()


def _digests(tensors: Sequence[Tensor]) -> str:
    return hashlib.sha256("".join(map(sha256, tensors)).encode()).hexdigest()


@lru_cache(maxsize=16)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of the names and contents of files, which have a size and a time of change."""
    return hashlib.sha256(json.dumps([[p.name, file_sha256(p)] for p, _, _ in files]).encode()).hexdigest()
