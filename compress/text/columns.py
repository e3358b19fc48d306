"""A column of text in .jsonl, .json or .parquet files: one document a row, kept on disk as an Arrow file for each content.

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
from paredown.compress.text.by_content import cache_folder, digest_of
from paredown.compress.text.corpus import ROWS_PER_READ, Rows

COLUMN = "text"  # in the Arrow file; and the column of rows that are strings themselves
Choose = Callable[[Mapping[str, bool]], str]  # from whether each column is one of strings, to the name of one


class Form(Protocol):
    """A format of files that hold columns."""

    def columns(self, path: Path) -> Iterator[tuple[str, bool]]:
        """Each column with whether its values are strings; columns may come many times, one of nulls never."""

    def arrays(self, path: Path, column: str) -> Iterator[Any]:
        """Arrow arrays of the column's strings and nulls."""


def read_column(form: Form, files: Sequence[Path], column: str | None, choose: Choose) -> Rows:
    """The rows of one column of all files, in order; `choose` finds the column where the content is not known yet.

    Raises PareError, naming the file and the row, for a file that cannot be read.
    """
    import datasets

    digest = digest_of(files)
    cached = cache_folder() / f"{digest}-{type(form).__name__}-{(column or '').encode().hex()[-64:]}.arrow"
    if not cached.is_file():
        seen: dict[str, bool] = {}
        for path in files:
            with _reading(path):
                for name, strings in form.columns(path):
                    seen[name] = strings and seen.get(name, True)
        if not seen:
            raise PareError(f"{', '.join(map(str, files[:3]))} holds no text: there is no row with a value in it.")
        chosen = choose(seen)
        _write(cached, (array for path in files for array in _told(form, path, chosen)))
        if digest_of(files) != digest:
            cached.unlink()
            raise PareError(
                f"{', '.join(map(str, files[:3]))} changed while it was read. Run again when it is complete."
            )
    return Rows(datasets.Dataset.from_file(str(cached)), COLUMN)


class JsonRows:
    """Objects, one a line, or all of them in one list. A row that is a string has the column `text`."""

    def columns(self, path: Path) -> Iterator[tuple[str, bool]]:
        """As `Form.columns`."""
        for row in _json_rows(path):
            for name, value in row.items():
                if value is not None:
                    yield name, isinstance(value, str)

    def arrays(self, path: Path, column: str) -> Iterator[Any]:
        """As `Form.arrays`; a row without the column has a null."""
        import pyarrow as pa

        values = (row.get(column) for row in _json_rows(path))
        while some := list(islice(values, ROWS_PER_READ)):
            yield pa.array(some, pa.large_string())


class Parquet:
    """Parquet, of which only the column is read."""

    def columns(self, path: Path) -> Iterator[tuple[str, bool]]:
        """As `Form.columns`, from the schema alone."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            for field in file.schema_arrow if file.metadata.num_rows else ():
                kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
                yield field.name, kind in (pa.string(), pa.large_string(), pa.string_view())

    def arrays(self, path: Path, column: str) -> Iterator[Any]:
        """As `Form.arrays`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if column not in file.schema_arrow.names:
                raise PareError(f"{path} has no column {column!r}, which other files of the text have.")
            for batch in file.iter_batches(ROWS_PER_READ, columns=[column]):
                array = batch.column(0).cast(pa.large_string())
                array.validate(full=True)  # that it is UTF-8
                yield array


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


def _told(form: Form, path: Path, column: str) -> Iterator[Any]:
    with _reading(path):
        yield from form.arrays(path, column)


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
