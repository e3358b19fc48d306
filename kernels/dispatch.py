"""Which kernel and which tile for a product: looked up in a table per device, never searched for while serving.

A table is JSON: {"device", "arch", "basis": "measured" | "modelled", "versions", "date", "choices": [...]} and a choice is
{"op", "rows", "columns", "tokens", "path", "tile", "ratio"}: for an `op` on a weight (rows, columns) and up to `tokens`
tokens, take `path` with the launch parameters `tile`; `ratio` is dense time / its time where it was measured.
Tables are looked for in the user's cache, where `paredown tune` writes them, then among those that are shipped.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from math import log2
from pathlib import Path

import torch

BUCKETS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)  # tokens; a choice holds up to its bucket


@dataclass(frozen=True)
class Choice:
    """One line of a table. `ratio` is None where nothing was measured."""

    op: str
    rows: int
    columns: int
    tokens: int
    path: str
    tile: Mapping[str, int] = field(default_factory=dict)
    ratio: float | None = None


@dataclass(frozen=True)
class DispatchTable:
    device: str
    arch: int  # 90 for compute capability 9.0; 0 for a device that is not NVIDIA's
    basis: str  # "measured" or "modelled"
    choices: tuple[Choice, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    def find(self, op: str, tokens: int, rows: int, columns: int) -> Choice | None:
        """The choice of the smallest bucket that holds `tokens` (or the last of BUCKETS), of the nearest shape. None where
        the table knows fewer tokens only: a tile for a few of them is a bad one for thousands."""
        of_op = [choice for choice in self.choices if choice.op == op]
        bucket = min((c.tokens for c in of_op if c.tokens >= bucket_of(tokens)), default=None)
        if bucket is None:
            return None
        near = [choice for choice in of_op if choice.tokens == bucket]
        return min(near, key=lambda c: abs(log2(c.rows / rows)) + abs(log2(c.columns / columns)))

    def over(self, older: "DispatchTable") -> "DispatchTable":
        """With what an older table, measured on the same device, knows of other products and numbers of tokens."""
        if older.basis != "measured" or older.device != self.device:
            return self
        new = {(c.op, c.rows, c.columns, c.tokens) for c in self.choices}
        kept = tuple(c for c in older.choices if (c.op, c.rows, c.columns, c.tokens) not in new)
        return replace(self, choices=kept + self.choices)

    def to_json(self) -> str:
        """One choice per line."""
        head = {key: value for key, value in asdict(self).items() if key != "choices"}
        lines = ",\n".join(json.dumps(asdict(choice)) for choice in self.choices)
        return json.dumps(head)[:-1] + ', "choices": [\n' + lines + "\n]}\n"

    @classmethod
    def parse(cls, text: str) -> "DispatchTable":
        """Raises ValueError with the reason if `text` is no table."""
        try:
            raw = json.loads(text)
            return cls(**{**raw, "choices": tuple(Choice(**choice) for choice in raw["choices"])})
        except (KeyError, TypeError, ValueError) as fault:
            raise ValueError(f"not a dispatch table: {fault}") from fault

    @classmethod
    def read(cls, file: Path) -> "DispatchTable":
        """Raises ValueError with the file's name if it holds no table."""
        try:
            return cls.parse(file.read_text())
        except ValueError as fault:
            raise ValueError(f"{file}: {fault}. Remove it, and let `paredown tune` write it anew.") from fault


def choose(op: str, device: torch.device, tokens: int, rows: int, columns: int) -> Choice:
    """What to launch for `tokens` tokens times a weight (rows, columns)."""
    return _choose(op, _index(device), bucket_of(tokens), rows, columns)


def bucket_of(tokens: int) -> int:
    return next((bucket for bucket in BUCKETS if bucket >= tokens), BUCKETS[-1])


@cache
def _choose(op: str, index: int, tokens: int, rows: int, columns: int) -> Choice:
    found = table_of(index).find(op, tokens, rows, columns)
    return found or Choice(op, rows, columns, tokens, *default(op, tokens))


def default(op: str, tokens: int) -> tuple[str, dict[str, int]]:
    """Path and tile on a device that no table knows: the portable kernel while it pays, then the dense product."""
    return ("portable", {}) if tokens <= 64 else ("dense", {})


@cache
def table_of(index: int) -> DispatchTable:
    """The table of CUDA device `index`: the user's own, else the shipped one of this device or of the newest architecture
    that is not newer than its own."""
    name, arch = torch.cuda.get_device_name(index), arch_of(torch.device("cuda", index))
    own = cache_file(name)
    if own.exists():
        return DispatchTable.read(own)
    shipped = [table for path in _shipped() if (table := DispatchTable.read(path)).arch <= arch]
    nearest = max(shipped, key=lambda table: (table.arch, table.device == name), default=None)
    return nearest or DispatchTable(name, arch, "modelled", ())


def forget() -> None:
    """Read the tables again at the next product: after tuning."""
    _choose.cache_clear()
    table_of.cache_clear()


def cache_file(device: str) -> Path:
    """Where a user's own table of a device stands. PAREDOWN_CACHE names another folder."""
    folder = (
        os.environ.get("PAREDOWN_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paredown"
    )
    return Path(folder) / "kernels" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def _shipped() -> list[Path]:
    return sorted((Path(__file__).parent / "tables").glob("*.json"))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def arch_of(device: torch.device) -> int:
    """90 for compute capability 9.0; 0 for a GPU that is not NVIDIA's."""
    major, minor = torch.cuda.get_device_capability(device)
    return 0 if torch.version.hip else 10 * major + minor
