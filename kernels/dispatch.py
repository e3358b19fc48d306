"""Which kernel and which tile run a product: looked up in a table of the device, never searched for while serving.

A table is JSON: {"device", "arch", "basis": "measured" | "modelled", "versions", "date", "choices": [...]}. A choice is
{"op", "rows", "columns", "tokens", "path", "tile", "ratio"}: it runs `op` on a weight (rows, columns) with at most
`tokens` tokens by `path`, with the launch parameters `tile`. `ratio` is dense time / time of this path, if it was measured:
in a measured table the lines without it are modelled.

The table of a device is read from the user's cache, where `paredown tune` writes it, or else from the shipped ones.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from math import log2
from pathlib import Path

import torch

BUCKETS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384)  # tokens; a choice is valid up to its bucket


@dataclass(frozen=True)
class Choice:
    """One line of a table: its fields are described above. `ratio` is None if nothing was measured."""

    op: str
    rows: int
    columns: int
    tokens: int
    path: str
    tile: Mapping[str, int] = field(default_factory=dict)
    ratio: float | None = None


@dataclass(frozen=True)
class DispatchTable:
    """The choices for one device, and how they were obtained."""

    device: str
    arch: int  # 90 for compute capability 9.0; 0 for a device that is not NVIDIA's
    basis: str  # "measured" or "modelled"
    choices: tuple[Choice, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    def find(self, op: str, tokens: int, rows: int, columns: int) -> Choice | None:
        """The choice for `op` with `tokens` tokens on a weight (rows, columns), or None.

        Taken from the smallest bucket that is large enough (the last of BUCKETS is for all larger numbers); of several
        shapes the nearest. None if all choices of `op` are for fewer tokens: a tile for a few is a bad one for thousands.
        """
        of_op = [choice for choice in self.choices if choice.op == op]
        bucket = min((c.tokens for c in of_op if c.tokens >= bucket_of(tokens)), default=None)
        if bucket is None:
            return None
        candidates = [choice for choice in of_op if choice.tokens == bucket]
        return min(candidates, key=lambda c: abs(log2(c.rows / rows)) + abs(log2(c.columns / columns)))

    def over(self, older: "DispatchTable") -> "DispatchTable":
        """This table, plus the choices of `older` that it has no own choice for.

        Only a table that was measured on the same device adds anything.
        """
        if older.basis != "measured" or older.device != self.device:
            return self
        new = {(c.op, c.rows, c.columns, c.tokens) for c in self.choices}
        others = tuple(c for c in older.choices if (c.op, c.rows, c.columns, c.tokens) not in new)
        return replace(self, choices=others + self.choices)

    def to_json(self) -> str:
        """JSON with one choice per line."""
        head = {key: value for key, value in asdict(self).items() if key != "choices"}
        lines = ",\n".join(json.dumps(asdict(choice)) for choice in self.choices)
        return json.dumps(head)[:-1] + ', "choices": [\n' + lines + "\n]}\n"

    @classmethod
    def parse(cls, text: str) -> "DispatchTable":
        """The table that `to_json` wrote. Raises ValueError with the reason if `text` is not a table."""
        try:
            raw = json.loads(text)
            return cls(**{**raw, "choices": tuple(Choice(**choice) for choice in raw["choices"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a dispatch table: {error}") from error

    @classmethod
    def read(cls, file: Path) -> "DispatchTable":
        """The table in `file`. Raises ValueError that names the file if it is not a table."""
        try:
            return cls.parse(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: {error}. Remove it, and let `paredown tune` write it anew.") from error


_TABLE_IN_USE: ContextVar[DispatchTable | None] = ContextVar("table_in_use", default=None)


@contextmanager
def using(table: DispatchTable) -> Iterator[None]:
    """Inside the block, `table` decides for every device, whatever the cache and the shipped tables say.

    It tries a table out before it is installed. With TRITON_INTERPRET=1 the kernels then run on CPU tensors, too.
    """
    token = _TABLE_IN_USE.set(table)
    try:
        yield
    finally:
        _TABLE_IN_USE.reset(token)


def table_in_use() -> DispatchTable | None:
    """The table of the innermost `using` block; None outside of one."""
    return _TABLE_IN_USE.get()


def choose(op: str, device: torch.device, tokens: int, rows: int, columns: int) -> Choice:
    """The path and tile for `op` with `tokens` tokens on a weight (rows, columns)."""
    if (table := table_in_use()) is not None:
        return _choice(table, op, tokens, rows, columns)
    return _cached_choice(op, _index(device), bucket_of(tokens), rows, columns)


def bucket_of(tokens: int) -> int:
    """The smallest of BUCKETS that is at least `tokens`, or the last."""
    return next((bucket for bucket in BUCKETS if bucket >= tokens), BUCKETS[-1])


@cache
def _cached_choice(op: str, index: int, tokens: int, rows: int, columns: int) -> Choice:
    return _choice(table_of(index), op, tokens, rows, columns)


def _choice(table: DispatchTable, op: str, tokens: int, rows: int, columns: int) -> Choice:
    return table.find(op, tokens, rows, columns) or Choice(op, rows, columns, tokens, *default(op, tokens))


def default(op: str, tokens: int) -> tuple[str, dict[str, int]]:
    """Path and tile where no table has a choice: the portable kernel for few tokens, the dense product for many."""
    return ("portable", {}) if tokens <= 64 else ("dense", {})


@cache
def table_of(index: int) -> DispatchTable:
    """The table of CUDA device `index`: the user's own, or else a shipped one.

    Of the shipped tables it takes the newest architecture that is not newer than the device's; of several for that
    architecture, the one for this very device. A device older than all of them gets an empty table.
    """
    name, arch = torch.cuda.get_device_name(index), arch_of(torch.device("cuda", index))
    file = cache_file(name)
    if file.exists():
        return DispatchTable.read(file)
    tables = [table for path in shipped_files() if (table := DispatchTable.read(path)).arch <= arch]
    nearest = max(tables, key=lambda table: (table.arch, table.device == name), default=None)
    return nearest or DispatchTable(name, arch, "modelled", ())


def forget() -> None:
    """Read the tables from disk again at the next product. Call it after a table was written."""
    _cached_choice.cache_clear()
    table_of.cache_clear()


def cache_file(device: str) -> Path:
    """Where the user's own table of a device is stored. The environment variable PAREDOWN_CACHE names another folder."""
    folder = (
        os.environ.get("PAREDOWN_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paredown"
    )
    return Path(folder) / "kernels" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def shipped_files() -> list[Path]:
    """The tables that come with the package."""
    return sorted((Path(__file__).parent / "tables").glob("*.json"))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def arch_of(device: torch.device) -> int:
    """The compute capability as one number: 90 for 9.0. 0 for a GPU that is not NVIDIA's."""
    major, minor = torch.cuda.get_device_capability(device)
    return 0 if torch.version.hip else 10 * major + minor
