"""paredown.json as it is read: checked, so that a damaged one is told in a sentence."""

import json
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from paredown.compress.checkpoint.writer import RECORD
from paredown.compress.errors import PareError
from paredown.compress.numerics.masks import parse_sparsity
from paredown.compress.run.streams import PROBE_TOKENS
from paredown.compress.storage.kinds import FORMAT_VERSION

LARGEST = 1 << 30  # bytes of a paredown.json that are read

Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Loss = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1e3)]


@with_config(ConfigDict(strict=True))
class TensorEntry(TypedDict):
    """One tensor as it was written."""

    shape: list[int]
    dtype: str
    sha256: str


@with_config(ConfigDict(strict=True))
class LayerEntry(TypedDict):
    """One compressed layer."""

    kept: Share
    sparsity: NotRequired[float | str | None]


@with_config(ConfigDict(strict=True))
class Probe(TypedDict, total=False):
    """Tokens and their losses in nats."""

    ids: Annotated[list[Token], Field(min_length=2, max_length=PROBE_TOKENS)]
    nll: list[Loss]


@with_config(ConfigDict(strict=True))
class Record(TypedDict):
    """What is read of paredown.json; it holds more, for people."""

    format_version: int
    tensors: dict[str, TensorEntry]
    files: NotRequired[dict[str, str]]  # name -> sha256
    layers: NotRequired[dict[str, LayerEntry]]
    tied: NotRequired[dict[str, str]]
    verbatim: NotRequired[list[str]]
    renamed: NotRequired[dict[str, str]]  # names in a packed checkpoint -> those in the family's own files
    converted: NotRequired[list[str]]  # weights that the class makes of other tensors
    probe: NotRequired[Probe | None]
    tokenizer: NotRequired[dict[str, list[int]]]
    model: NotRequired[dict[str, Any]]


_record = TypeAdapter(Record)


def read_record(folder: Path) -> Record:
    """paredown.json of a checkpoint, whole: with what `Record` does not name.

    Raises PareError if there is none, if it is damaged, and if another version of paredown wrote it in another format.
    """
    path = folder / RECORD
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise PareError(f"{folder} has no readable {RECORD} ({fault}): it was not written by paredown.") from fault
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise PareError(f"{folder} has format {version}; this paredown reads {FORMAT_VERSION}.")
    try:
        _record.validate_python(raw)
        _check_values(raw)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise PareError(f"{path} is damaged: {place} is {first['input']!r:.60}. {first['msg']}. {_AGAIN}") from fault
    except PareError as fault:
        raise PareError(f"{path} is damaged: {fault} {_AGAIN}") from fault
    return cast(Record, raw)


def _check_values(raw: Any) -> None:
    """What types do not say. Raises PareError."""
    probe = raw.get("probe") or {"ids": [0], "nll": []}
    if "ids" not in probe or len(probe["ids"]) != len(probe.get("nll", [])) + 1:
        raise PareError("the probe's tokens and losses do not belong together.")
    for layer in raw.get("layers", {}).values():
        if layer.get("sparsity") is not None:
            parse_sparsity(layer["sparsity"])


_AGAIN = "Fetch the checkpoint again. (A checkpoint without this file can be exported, and not verified.)"
