"""A column of .jsonl, .json or .parquet files: one document a row, kept on disk as an Arrow file for each content.

It holds strings, or conversations that the model's chat template makes strings of.

The files are read as they lie: a name is no pattern, a string that looks like a date stays a string, and a value of another
kind is told, not converted.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from paredown.compress.errors import PareError
from paredown.compress.text.by_content import cache_folder, digest_of, installed_datasets
from paredown.compress.text.chat import Chat, Kind, is_conversation
from paredown.compress.text.corpus import ROWS_PER_READ, Rows

COLUMN = "text"  # in the Arrow file; and the column of rows that are strings themselves
Choose = Callable[[Mapping[str, Kind]], str]  # from what each column holds, to the name of one


class Form(Protocol):
    """A format of files that hold columns."""

    def columns(self, path: Path) -> Iterator[tuple[str, Kind]]:
        """Each column with what it holds; columns may come many times, one of nulls never."""

    def arrays(self, path: Path, column: str) -> Iterator[Any]:
        """Arrow arrays of the column's strings and nulls."""

    def values(self, path: Path, column: str) -> Iterator[Any]:
        """The column's values as those of JSON."""


def read_column(
    form: Form, files: Sequence[Path], column: str | None, choose: Choose, chat: Chat | None = None, asked: str = ""
) -> tuple[Rows, bool]:
    """The rows of one column of all files, in order, and whether they are conversations, which need `chat`.

    `choose` finds the column where the content is not known yet; `asked` tells ways to choose apart.
    Raises PareError, naming the file and the row, for a file that cannot be read.
    """
    datasets = installed_datasets()
    digest = digest_of(files)
    stem = f"{digest}-{type(form).__name__}-{(column or '').encode().hex()[-64:]}{asked}"
    strings = cache_folder() / f"{stem}.arrow"
    talks = cache_folder() / f"{stem}-chat-{chat.key}.arrow" if chat else strings
    if not strings.is_file() and not talks.is_file():
        held = _kinds(form, files)
        chosen = choose(held)
        told = chat if held[chosen] == "chat" else None
        cached = talks if told else strings
        _write(cached, (array for path in files for array in _told(form, path, chosen, told)))
        if digest_of(files) != digest:
            cached.unlink()
            raise PareError(
                f"{', '.join(map(str, files[:3]))} changed while it was read. Run again when it is complete."
            )
    cached = strings if strings.is_file() else talks
    return Rows(datasets.Dataset.from_file(str(cached)), COLUMN), cached != strings


def _kinds(form: Form, files: Sequence[Path]) -> dict[str, Kind]:
    """What each column of all files holds. Raises PareError where there is none."""
    seen: dict[str, Kind] = {}
    for path in files:
        with _reading(path):
            for name, kind in form.columns(path):
                seen[name] = kind if seen.get(name, kind) == kind else "other"
    if not seen:
        raise PareError(f"{', '.join(map(str, files[:3]))} holds no text: there is no row with a value in it.")
    return seen


class JsonRows:
    """Objects, one a line, or all of them in one list. A row that is a string has the column `text`."""

    def columns(self, path: Path) -> Iterator[tuple[str, Kind]]:
        """As `Form.columns`."""
        for row in _json_rows(path):
            for name, value in row.items():
                if value is not None and value != []:
                    yield name, "text" if isinstance(value, str) else "chat" if is_conversation(value) else "other"

    def arrays(self, path: Path, column: str) -> Iterator[Any]:
        """As `Form.arrays`; a row without the column has a null."""
        import pyarrow as pa

        values = self.values(path, column)
        while some := list(islice(values, ROWS_PER_READ)):
            yield pa.array(some, pa.large_string())

    def values(self, path: Path, column: str) -> Iterator[Any]:
        """As `Form.values`; a row without the column has None."""
        return (row.get(column) for row in _json_rows(path))


class Parquet:
    """Parquet, of which only the column is read."""

    def columns(self, path: Path) -> Iterator[tuple[str, Kind]]:
        """As `Form.columns`, from the schema alone."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            for field in file.schema_arrow if file.metadata.num_rows else ():
                yield field.name, _arrow_kind(field.type)

    def arrays(self, path: Path, column: str) -> Iterator[Any]:
        """As `Form.arrays`."""
        import pyarrow as pa

        for batch in self._batches(path, column):
            array = batch.cast(pa.large_string())
            array.validate(full=True)  # that it is UTF-8
            yield array

    def values(self, path: Path, column: str) -> Iterator[Any]:
        """As `Form.values`."""
        for batch in self._batches(path, column):
            yield from batch.to_pylist()

    def _batches(self, path: Path, column: str) -> Iterator[Any]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if column not in file.schema_arrow.names:
                raise PareError(f"{path} has no column {column!r}, which other files of the text have.")
            for batch in file.iter_batches(ROWS_PER_READ, columns=[column]):
                yield batch.column(0)


def _arrow_kind(kind: Any) -> Kind:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        message = kind.value_type
        return "chat" if pa.types.is_struct(message) and {"role", "content"} <= set(message.names) else "other"
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return "text" if plain in (pa.string(), pa.large_string(), pa.string_view()) else "other"


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows as dicts. Raises ValueError naming the row that is none."""
    for number, row in enumerate(_json_values(path), 1):
        if isinstance(row, str):
            row = {COLUMN: row}
        if not isinstance(row, dict):
            raise ValueError(f'row {number} is {json.dumps(row)[:80]}, wanted an object such as {{"text": "..."}}')
        yield row


def _json_values(path: Path) -> Iterator[Any]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        number, first = next(lines, (0, "[]"))
        if first.lstrip().startswith("[") or (path.name.endswith((".json", ".json.gz")) and not _is_json(first)):
            value = _parse(first + file.read(), "the file")  # one value over all lines
            yield from value if isinstance(value, list) else [value]
            return
        yield _parse(first, f"line {number}")
        for number, line in lines:
            yield _parse(line, f"line {number}")


def _is_json(line: str) -> bool:
    try:
        json.loads(line, parse_int=float)
    except ValueError:
        return False
    return True


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_int=float)  # no number is read here, however many digits it has
    except json.JSONDecodeError as fault:
        raise ValueError(f"{where} is no JSON: {fault.msg} at character {fault.pos + 1}") from fault


def _told(form: Form, path: Path, column: str, chat: Chat | None) -> Iterator[Any]:
    """The column as Arrow arrays of strings, of conversations if `chat` is there."""
    with _reading(path):
        yield from form.arrays(path, column) if chat is None else _talks(form, path, column, chat)


def _talks(form: Form, path: Path, column: str, chat: Chat) -> Iterator[Any]:
    import pyarrow as pa

    rows = enumerate(form.values(path, column), 1)
    while some := list(islice(rows, ROWS_PER_READ)):
        yield pa.array([_talk(chat, number, value) for number, value in some], pa.large_string())


def _talk(chat: Chat, number: int, value: Any) -> str:
    try:
        return chat.text(value)
    except PareError as fault:
        raise ValueError(f"row {number}: {fault}") from fault


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Any fault of a reader becomes a PareError that names the file."""
    try:
        yield
    except PareError:
        raise
    except Exception as fault:  # json, gzip, zlib, codecs and arrow each raise their own kind
        reason = " ".join(str(fault).split()).rstrip(".") or type(fault).__name__
        raise PareError(f"the text {path} cannot be read: {reason[:300]}. Mend it, or name another file.") from fault


def _write(target: Path, arrays: Iterable[Any]) -> None:
    """Write arrays of strings as an Arrow stream, which is there as a whole or not at all."""
    import pyarrow as pa

    schema = pa.schema([(COLUMN, pa.large_string())])
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for array in arrays:
                writer.write_batch(pa.record_batch([array], schema=schema))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
