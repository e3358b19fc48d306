"""A corpus: the documents of one split of a text, and the one text that they make when they are joined."""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, cast, overload

ROWS_PER_READ = 1000
Bos = Literal["auto", "none"]  # before every window, if the tokenizer adds one; or only where the papers have it


@dataclass(frozen=True, eq=False)
class Corpus:
    """The documents of one split, and what joins them where a protocol asks for one text."""

    name: str
    split: str
    documents: Sequence[str]
    joiner: str = "\n\n"
    revision: str | None = None
    max_windows: int | None = None  # the protocol reads no more windows than this
    pooled: bool = False  # windows are cut from the joined text even where single documents are long enough
    chat: bool = False  # its documents are conversations
    whole: str | None = None  # where it is a part of a text that is divided: the digest of all of it

    @property
    def title(self) -> str:
        """The name for a message; of a part of a text, with which part it is."""
        return f"{self.name} ({self.split})" if self.whole else self.name

    @property
    def text(self) -> str:
        """The documents joined. Built at each call, and as large as the corpus."""
        return self.joiner.join(self.documents)

    @cached_property
    def ends(self) -> "array[int]":
        """Where in the joined text each document ends together with the joiner after it, in characters."""
        return array("q", accumulate(len(document) + len(self.joiner) for document in self.documents))

    @cached_property
    def characters(self) -> int:
        """The length of `text`, without building it."""
        return self.ends[-1] - len(self.joiner) if self.ends else 0

    @cached_property
    def sha256(self) -> str:
        """The digest of the joined text in UTF-8."""
        digest = hashlib.sha256()
        for i, document in enumerate(self.documents):
            digest.update((self.joiner * (i > 0) + document).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def excerpt(self, start: int, stop: int) -> str:
        """`text[start:stop]`, without joining more documents than it touches."""
        first = bisect_right(self.ends, start)
        last = bisect_right(self.ends, stop) + 1  # `stop` may lie in the joiner before it
        begin = self.ends[first - 1] if first else 0
        return self.joiner.join(self.documents[first : last + 1])[start - begin : stop - begin]

    def pieces(self, most: int, size: int) -> Iterator[str]:
        """The first `most` characters of `text`, cut at line starts into pieces of at most `size` characters each."""
        pending: list[str] = []
        pending_size, remaining = 0, most
        for i, document in enumerate(self.documents):
            pending.append(((self.joiner if i else "") + document)[:remaining])
            pending_size += len(pending[-1])
            remaining -= len(pending[-1])
            while pending_size > size:
                text = "".join(pending)
                cut = _last_line_start(text, size)
                yield text[:cut]
                pending, pending_size = [text[cut:]], len(text) - cut
            if not remaining:
                break
        if pending_size:
            yield "".join(pending)


class Rows(Sequence[str]):
    """A column of strings, read from disk when it is used. A missing value is an empty document."""

    def __init__(self, data: Any, column: str) -> None:
        self._data = data.select_columns(column)
        self._column = column

    def __len__(self) -> int:
        return len(self._data)

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> list[str]: ...
    def __getitem__(self, key: int | slice) -> str | list[str]:
        value = self._data[key][self._column]
        return [row or "" for row in value] if isinstance(key, slice) else cast(str, value or "")

    def part(self, start: int, stop: int) -> "Rows":
        """The rows from `start` up to `stop`, still on disk."""
        return Rows(self._data.select(range(start, stop)), self._column)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), ROWS_PER_READ):
            yield from self[start : start + ROWS_PER_READ]


def _last_line_start(text: str, most: int) -> int:
    """The last position up to `most` where a line begins with no space, else `most`.

    Tokenizers that split text into words form no token across such a position.
    """
    newline = text.rfind("\n", 0, most - 1)
    while newline >= 0:
        if not text[newline + 1].isspace():
            return newline + 1
        newline = text.rfind("\n", 0, newline)
    return most
