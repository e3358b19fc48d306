"""Text to calibrate on and to score: the standard library, the field's corpora under their exact protocol, your files.

    stdlib | wikitext2 | c4 | ptb | org/name[:config[:split[:column]]] | file[:column] | folder

A file is .txt (one document), .jsonl, .json or .parquet. The protocols are those of the code behind the published figures,
`datautils.py` of SparseGPT and `data.py` of Wanda. Rows of a dataset stay on disk until they are asked for.
"""

import hashlib
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.text import stdlib_text

Role = Literal["calibration", "evaluation"]
T = TypeVar("T")

# suffix -> the builder of `datasets` that reads it; a .txt is read whole, without one
READERS = {
    ".txt": "text", ".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json", ".parquet": "parquet",
}  # fmt: skip
FORMS = "a .txt, .jsonl, .json or .parquet file, or a folder of them"
HOW_TO_SET: dict[Role, str] = {
    "calibration": "--set calibration.source=./text.txt",
    "evaluation": "--set 'evaluate.perplexity=[./text.txt]'",
}
# Never train by default to score on: that is what calibrates.
DEFAULT_SPLITS: dict[Role, tuple[str, ...]] = {"calibration": ("train",), "evaluation": ("test", "validation")}

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# a colon parts what stands before and after it, but not inside a slice such as train[:10%]
SELECTOR = re.compile(r":(?![^\[]*\])")
# a file that `datasets` itself wrote, as it lies in a copy of a hub repository
SHARD = re.compile(r"-\d{5}-of-\d{5}\.(parquet|jsonl?)$")
COMMIT = re.compile(r"[0-9a-f]{40}")

ROWS_AT_ONCE = 1000
# characters; shorter documents (headings, blank rows) are shared by honest splits too
TELLING = 64


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents of one split, and how they are joined where the protocol wants one text."""

    name: str
    split: str
    documents: Sequence[str]
    joiner: str = "\n\n"
    revision: str | None = None
    max_windows: int | None = None  # the protocol reads no more windows than this
    pooled: bool = False  # windows are cut from the joined text even where single documents are long enough

    @property
    def text(self) -> str:
        """The documents joined: built at each call, and as large as the corpus."""
        return self.joiner.join(self.documents)

    @cached_property
    def characters(self) -> int:
        """The length of `text`, without building it."""
        return sum(map(len, self.documents)) + len(self.joiner) * max(len(self.documents) - 1, 0)

    @cached_property
    def sha256(self) -> str:
        """Of the joined text, in UTF-8."""
        digest = hashlib.sha256()
        for i, document in enumerate(self.documents):
            digest.update((self.joiner * (i > 0) + document).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


class Rows(Sequence[str]):
    """A column of strings, read from disk as it is asked for. A missing value reads as an empty document."""

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
        found = self._data[key][self._column]
        return [row or "" for row in found] if isinstance(key, slice) else cast(str, found or "")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self[start : start + ROWS_AT_ONCE]


@dataclass(frozen=True)
class _Named:
    """Where a named corpus lies, and how the reference code of SparseGPT and Wanda reads it."""

    path: str
    config: str | None
    column: str
    split: dict[Role, str]
    joiner: dict[Role, str]
    files: dict[Role, str] | None = None
    first: dict[Role, int | None] | None = None  # no more documents than these
    max_windows: int | None = None  # when scoring
    revision: str | None = None
    pooled: bool = False


NAMED = {
    "wikitext2": _Named(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "text",
        {"calibration": "train", "evaluation": "test"}, {"calibration": " ", "evaluation": "\n\n"}, pooled=True,
    ),
    # The repository's head holds a script, which datasets 4 refuses to run; the hub's conversion to parquet does not.
    "ptb": _Named(
        "ptb-text-only/ptb_text_only", None, "sentence",
        {"calibration": "train", "evaluation": "test"}, {"calibration": " ", "evaluation": " "},
        {"calibration": "penn_treebank/train/*.parquet", "evaluation": "penn_treebank/test/*.parquet"},
        revision="refs/convert/parquet", pooled=True,
    ),
    "c4": _Named(
        "allenai/c4", None, "text",
        {"calibration": "train", "evaluation": "validation"}, {"calibration": " ", "evaluation": " "},
        {"calibration": "en/c4-train.00000-of-01024.json.gz", "evaluation": "en/c4-validation.00000-of-00008.json.gz"},
        {"calibration": None, "evaluation": 1100}, 256,
    ),
}  # fmt: skip


def load_corpus(spec: str, role: Role) -> Corpus:
    """The corpus a SPEC names, in its split for `role`.

    The column is `text`, or the only one of strings. A hub dataset, or a local folder laid out like one, gives `train` to
    calibrate and `test`, or else `validation`, to score. Any other folder is read recursively, its files in sorted order.
    Raises PareError for an unknown name, a file that cannot be read, a missing column or split, an empty corpus.
    """
    if role not in DEFAULT_SPLITS:
        raise PareError(f"unknown role {role!r} of a text; wanted one of {', '.join(DEFAULT_SPLITS)}.")
    corpus = _find(spec, role)
    if not any(document.strip() for document in corpus.documents):
        raise PareError(f"{spec} holds no text. Name a file or split with text in it.")
    return corpus


def overlap(calibration: Corpus, evaluation: Corpus) -> str | None:
    """A sentence for the report if a model is scored on what it was calibrated on, wholly or by documents; else None."""
    if calibration.sha256 == evaluation.sha256:
        return f"{evaluation.name} both calibrates and scores: the figure after compression is flattered."
    scored = {document for document in evaluation.documents if len(document.strip()) >= TELLING}
    shared = len(scored.intersection(calibration.documents))
    if not shared:
        return None
    return (
        f"{shared} of the {len(scored)} documents of {evaluation.name} ({evaluation.split}) also calibrate: "
        "the figure after compression is flattered."
    )


def _find(spec: str, role: Role) -> Corpus:
    if spec == "stdlib":
        documents = [document.text for document in stdlib_text.documents(role)]
        return Corpus("stdlib", role, documents, stdlib_text.JOINER, f"Python {platform.python_version()}")
    if spec in NAMED:
        return _load_named(spec, NAMED[spec], role)
    head, *selectors = [spec] if Path(spec).exists() else SELECTOR.split(spec)
    if _is_local(head):
        return _load_local(spec, Path(head).expanduser(), selectors, role)
    if HUB_NAME.fullmatch(head) and len(selectors) <= 3:
        return _load_hub(spec, head, selectors, role)
    names = ["stdlib", *NAMED]
    raise PareError(
        f"unknown text {spec!r}.{did_you_mean(spec, names)} Name one of {', '.join(names)}, a hub dataset "
        f"org/name[:config[:split[:column]]], or {FORMS}."
    )


def _load_named(name: str, known: _Named, role: Role) -> Corpus:
    import datasets

    split = known.split[role]
    given = {
        "data_files": {split: known.files[role]} if known.files else None,
        "revision": known.revision,
    }
    options = {key: value for key, value in given.items() if value is not None}
    data = _reached(lambda: datasets.load_dataset(known.path, known.config, split=split, **options), name, role)
    first = known.first[role] if known.first else None
    if first is not None:
        data = data.select(range(min(first, len(data))))
    return Corpus(
        name,
        split,
        Rows(data, _column(data, known.column, name)),
        known.joiner[role],
        _revision(data) or known.revision,
        known.max_windows if role == "evaluation" else None,
        known.pooled,
    )


def _load_hub(spec: str, path: str, selectors: Sequence[str], role: Role) -> Corpus:
    """A dataset in the hub's layout, on the hub or in a local folder."""
    import datasets

    config, split, column = [*(part or None for part in selectors), None, None, None][:3]
    if split is None:
        splits = _reached(lambda: datasets.get_dataset_split_names(path, config_name=config), spec, role)
        split = next((name for name in DEFAULT_SPLITS[role] if name in splits), None)
        if split is None:
            raise PareError(
                f"{spec} has no split {' or '.join(DEFAULT_SPLITS[role])} for {role}; it has {', '.join(splits)}. "
                f"Name one, as in {path}:{config or ''}:{splits[0]}"
            )
    data = _reached(lambda: datasets.load_dataset(path, config, split=split), spec, role)
    name = Path(path).name if Path(path).exists() else path
    return Corpus(name, split, Rows(data, _column(data, column, spec)), revision=_revision(data))


def _load_local(spec: str, path: Path, selectors: Sequence[str], role: Role) -> Corpus:
    if not path.exists():
        raise PareError(f"the text {spec} does not exist. Name {FORMS}.")
    if path.is_dir() and len(selectors) <= 3 and (selectors or _has_hub_layout(path)):
        return _load_hub(spec, str(path), selectors, role)
    if len(selectors) > (3 if path.is_dir() else 1):
        raise PareError(f"too many parts in {spec}. Name file:column, or folder[:config[:split[:column]]].")
    files = sorted(_text_files(path)) if path.is_dir() else [path]
    if not files or not all(map(_reader, files)):
        raise PareError(f"{path} is no text to read: wanted {FORMS}.")
    column = selectors[0] if selectors else None
    parts = [_read(reader, list(group), column, spec, role) for reader, group in groupby(files, _reader)]
    return Corpus(path.name, "all", parts[0] if len(parts) == 1 else list(chain.from_iterable(parts)))


def _has_hub_layout(folder: Path) -> bool:
    """Whether the folder says how it is to be read: by its card, or by the names that `datasets` gives its shards."""
    card = folder / "README.md"
    if card.is_file():
        front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        if front and re.search(r"^(configs|dataset_info):", front[1], re.MULTILINE):
            return True
    return any(SHARD.search(path.name) for path in _text_files(folder))


def _text_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and _reader(path):
            yield path


def _reader(path: Path) -> str | None:
    return next((reader for suffix, reader in READERS.items() if path.name.endswith(suffix)), None)


def _read(reader: str | None, files: list[Path], column: str | None, spec: str, role: Role) -> Sequence[str]:
    if reader == "text":
        if column is not None:
            raise PareError(f"a .txt file has no columns, and {spec} names the column {column!r}. Name the file alone.")
        return [_read_text(path) for path in files]
    import datasets

    names = [str(path) for path in files]
    data = _reached(lambda: datasets.load_dataset(reader, data_files=names, split="train"), spec, role)
    return Rows(data, _column(data, column, spec))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise PareError(
            f"{path} is not UTF-8 text: byte {fault.start} is 0x{fault.object[fault.start]:02x}. Convert it to UTF-8."
        ) from fault
    except OSError as fault:
        raise PareError(f"{path} cannot be read: {fault.strerror}.") from fault


def _column(data: Any, column: str | None, spec: str) -> str:
    strings = [name for name, kind in data.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    chosen = column or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if chosen is not None and chosen in strings:
        return chosen
    wanted = f"no column of strings named {chosen!r}" if chosen else "no column 'text', and not just one of strings"
    head = SELECTOR.split(spec)[0]
    form = f"{head}:column" if _reader(Path(head)) else f"{head}:config:split:column"
    raise PareError(
        f"{spec} has {wanted}. Columns: {', '.join(data.features) or 'none'}; of strings: {', '.join(strings) or 'none'}."
        f"{did_you_mean(chosen or '', strings)} Name one as {form}, or call it 'text' in a file of your own."
    )


def _reached(load: Callable[[], T], spec: str, role: Role) -> T:
    """What `load` returns. Whatever the hub, its cache or a file's reader raises becomes a PareError with a way out."""
    import datasets

    # no progress bars of its own for small files; downloads still show theirs through huggingface_hub
    datasets.disable_progress_bars()
    try:
        return load()
    except Exception as fault:  # datasets, the hub, httpx and arrow each raise their own kind
        said = " ".join(f"{fault.__cause__ or ''} {fault}".split())
        raise PareError(
            f"the text {spec} cannot be loaded: {type(fault).__name__}: {said[:400]} "
            f"Without a network, name {FORMS}, or stdlib: {HOW_TO_SET[role]}"
        ) from fault


def _revision(data: Any) -> str | None:
    """The commit of a hub dataset: `datasets` names the folder of its cache after it."""
    folders = (part for file in data.cache_files for part in Path(file["filename"]).parent.parts)
    return next((part for part in folders if COMMIT.fullmatch(part)), None)


def _is_local(head: str) -> bool:
    looks = head.startswith((".", "/", "~")) or _reader(Path(head)) is not None
    return looks or Path(head).exists()
