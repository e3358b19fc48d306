"""Where text comes from: the standard library, the field's corpora under their exact protocol, the hub, your own files.

    stdlib | wikitext2 | c4 | ptb | self:key | org/name[:config[:split[:column]]] | file[:column] | folder

A file is .txt (one document), .jsonl, .json or .parquet. A column holds strings, or conversations (lists of messages with a
role and a content), which are read as the model's chat template writes them. The protocols are those of the code behind the
published figures, `datautils.py` of SparseGPT and `data.py` of Wanda. Rows of a dataset stay on disk until they are used.
"""

import hashlib
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.text import stdlib_text
from paredown.compress.text.by_content import cache_folder, folder_options, installed_datasets
from paredown.compress.text.chat import Chat, Kind
from paredown.compress.text.columns import Form, JsonRows, Parquet, read_column
from paredown.compress.text.corpus import Corpus, Rows

__all__ = ["DEFAULT_SPLITS", "NAMED", "Corpus", "Role", "Rows", "load_corpus"]

Role = Literal["calibration", "evaluation"]
T = TypeVar("T")

# suffix -> how it is read; a .txt is read whole, without columns
JSON, PARQUET = JsonRows(), Parquet()
READERS: dict[str, Form | None] = {
    ".txt": None, ".jsonl": JSON, ".json": JSON, ".jsonl.gz": JSON, ".json.gz": JSON, ".parquet": PARQUET,
}  # fmt: skip
FORMS = "a .txt, .jsonl, .json or .parquet file, or a folder of them"
HOW_TO_SET: dict[Role, str] = {
    "calibration": "--set calibration.source=./text.txt",
    "evaluation": "--set 'evaluate.perplexity=[./text.txt]'",
}
# By default the split `train` never scores: it calibrates.
DEFAULT_SPLITS: dict[Role, tuple[str, ...]] = {"calibration": ("train",), "evaluation": ("test", "validation")}

OWN = "self"  # the text that the model writes itself; with a key once it is written
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# a colon between two parts of a name: not that of a drive (C:\), nor one inside a slice such as train[:10%]
SELECTOR = re.compile(r":(?!(?<=^[A-Za-z]:)[\\/])(?![^\[]*\])")
# the name that `datasets` gives the files it writes to a hub repository
SHARD = re.compile(r"-\d{5}-of-\d{5}\.(parquet|jsonl?)$")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _Named:
    """A dataset on the hub, and how the reference code of SparseGPT and Wanda reads it."""

    path: str
    config: str | None
    column: str
    split: dict[Role, str]
    joiner: dict[Role, str]
    files: dict[Role, str] | None = None
    first: dict[Role, int | None] | None = None  # only so many documents, from the start
    max_windows: int | None = None  # of an evaluation
    revision: str | None = None
    pooled: bool = False


NAMED = {
    "wikitext2": _Named(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "text",
        {"calibration": "train", "evaluation": "test"}, {"calibration": " ", "evaluation": "\n\n"}, pooled=True,
    ),
    # The main branch holds a script, which datasets 4 refuses to run. The hub's own branch of parquet files holds none.
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


@dataclass(frozen=True)
class _Request:
    """What a caller asks for."""

    spec: str
    role: Role
    chat: Chat | None = None
    only_chat: bool = False

    @property
    def mark(self) -> str:
        """Tells apart, in names of caches, two ways to choose a column."""
        return "-messages" if self.only_chat else ""

    @property
    def template(self) -> Chat:
        """The chat template, for a column of conversations. Raises PareError if there is none."""
        if self.chat is None:
            raise PareError(f"{self.spec} holds conversations, and a chat template is not known here. Name plain text.")
        self.chat.check(self.spec)
        return self.chat


def load_corpus(spec: str, role: Role, chat: Chat | None = None, only_chat: bool = False) -> Corpus:
    """The corpus that `spec` names (see the forms above), in its split for `role`.

    The column is `text`, or `messages` if it holds conversations, which need `chat`, or the only one of conversations, or
    of strings; `only_chat` takes no strings. Of a hub dataset, or a local folder laid out like one, the
    split `train` calibrates, and `test` scores, or `validation` where there is no `test`. Any other folder is read
    recursively, its files in sorted order. Raises PareError for an unknown name, a file that cannot be read, a missing
    column or split, and a corpus without text.
    """
    if role not in DEFAULT_SPLITS:
        raise PareError(f"unknown role {role!r} of a text; wanted one of {', '.join(DEFAULT_SPLITS)}.")
    if "\0" in spec or not _is_unicode(spec):
        raise PareError(f"the name {spec[:200]!r} is no UTF-8 text. Rename the file, or name {FORMS}.")
    try:
        corpus = _load(_Request(spec, role, chat, only_chat))
    except (OSError, RuntimeError) as fault:  # no right to read it, a name that is too long, ~ of nobody
        told = fault.strerror if isinstance(fault, OSError) else str(fault).rstrip(".")
        raise PareError(f"the text {spec[:200]} cannot be read: {told}. Name {FORMS}.") from fault
    if only_chat and not corpus.chat:
        raise PareError(
            f"{spec} holds no conversations: leave out `chat: true`, or name a file with a column of messages."
        )
    if not any(document.strip() for document in corpus.documents):
        raise PareError(f"{spec} holds no text. Name a file or split with text in it.")
    return corpus


def _load(asked: _Request) -> Corpus:
    spec, role = asked.spec, asked.role
    if spec == "stdlib":
        documents = [document.text for document in stdlib_text.documents(role)]
        return Corpus("stdlib", role, documents, stdlib_text.JOINER, f"Python {platform.python_version()}")
    if spec in NAMED:
        return _load_named(spec, NAMED[spec], role)
    if spec.partition(":")[0] == OWN:
        return _load_own(asked)
    path, *selectors = [spec] if Path(spec).exists() else SELECTOR.split(spec)
    if path.strip() and _is_local(path):
        return _load_local(asked, Path(path).expanduser(), selectors)
    if HUB_NAME.fullmatch(path) and len(selectors) <= 3:
        return _load_hub(asked, path, selectors)
    names = ["stdlib", *NAMED]
    raise PareError(
        f"unknown text {spec!r}.{did_you_mean(spec, names)} Name one of {', '.join(names)}, a hub dataset "
        f"org/name[:config[:split[:column]]], or {FORMS}."
    )


def own_file(key: str) -> Path:
    """Where the text of this key is that a model wrote."""
    return cache_folder() / f"{OWN}-{key}.jsonl"


def _load_own(asked: _Request) -> Corpus:
    key = asked.spec.partition(":")[2]
    path = own_file(key)
    if not key:
        raise PareError(
            "self is text that the model writes, which only compress reads. Name a file of that name as ./self."
        )
    if not path.is_file():
        raise PareError(
            f"the text {asked.spec} is not in {path.parent} any more: name it self, to have it written again."
        )
    corpus = _load_local(_Request(str(path), asked.role), path, [])
    return replace(corpus, name=OWN, split="written by the model")


def _load_named(name: str, named: _Named, role: Role) -> Corpus:
    datasets = installed_datasets()
    split = named.split[role]
    optional = {
        "data_files": {split: named.files[role]} if named.files else None,
        "revision": named.revision,
    }
    options = {key: value for key, value in optional.items() if value is not None}
    data = _fetch(lambda: datasets.load_dataset(named.path, named.config, split=split, **options), name, role)
    first = named.first[role] if named.first else None
    if first is not None:
        data = data.select(range(min(first, len(data))))
    return Corpus(
        name,
        split,
        Rows(data, _chosen(_kinds_of(data), named.column, _Request(name, role))),
        named.joiner[role],
        _revision(data) or named.revision,
        named.max_windows if role == "evaluation" else None,
        named.pooled,
    )


def _load_hub(asked: _Request, path: str, selectors: Sequence[str]) -> Corpus:
    """A dataset on the hub, or a local folder laid out like one."""
    datasets = installed_datasets()
    spec, role = asked.spec, asked.role
    config, split, column = [*(part or None for part in selectors), None, None, None][:3]
    options = _fetch(lambda: folder_options(path, config), spec, role) if Path(path).is_dir() else {}
    if split is None:
        splits = _fetch(lambda: datasets.get_dataset_split_names(path, config_name=config, **options), spec, role)
        split = next((name for name in DEFAULT_SPLITS[role] if name in splits), None)
        if split is None:
            raise PareError(
                f"{spec} has no split {' or '.join(DEFAULT_SPLITS[role])} for {role}; it has {', '.join(splits)}. "
                f"Name one, as in {path}:{config or ''}:{splits[0]}"
            )
    data = _fetch(lambda: datasets.load_dataset(path, config, split=split, **options), spec, role)
    name = Path(path).name if Path(path).exists() else path
    kinds, revision = _kinds_of(data), _revision(data)
    chosen = _chosen(kinds, column, asked)
    if kinds[chosen] == "chat":
        chat = asked.template
        return Corpus(name, split, _talks(data, chosen, chat, asked), chat.joiner, revision, chat=True)
    return Corpus(name, split, Rows(data, chosen), revision=revision)


def _talks(data: Any, column: str, chat: Chat, asked: _Request) -> Rows:
    """The conversations of a dataset as text, which its own cache keeps."""
    mark = hashlib.sha256(f"{data._fingerprint}-{column}-{chat.key}".encode()).hexdigest()

    def text(row: dict[str, Any]) -> dict[str, str]:
        return {"text": chat.text(row[column])}

    def rendered() -> Any:
        return data.map(text, remove_columns=data.column_names, new_fingerprint=mark)

    return Rows(_fetch(rendered, asked.spec, asked.role), "text")


def _load_local(asked: _Request, path: Path, selectors: Sequence[str]) -> Corpus:
    spec = asked.spec
    if not path.exists():
        raise PareError(f"the text {spec} does not exist. Name {FORMS}.")
    if path.is_dir() and len(selectors) <= 3 and (selectors or _has_hub_layout(path)):
        return _load_hub(asked, str(path), selectors)
    if len(selectors) > (3 if path.is_dir() else 1):
        raise PareError(f"too many parts in {spec}. Name file:column, or folder[:config[:split[:column]]].")
    files = sorted(_text_files(path)) if path.is_dir() else [path]
    if not files or not all(_is_text(file) and file.is_file() for file in files):
        raise PareError(f"{path} is no text to read: wanted {FORMS}.")
    column = selectors[0] if selectors else None
    read = [_read(reader, list(group), column, asked) for reader, group in groupby(files, _reader)]
    parts, talks = [rows for rows, _ in read], {is_chat for _, is_chat in read}
    if len(talks) > 1:
        raise PareError(f"some files of {spec} hold text, and others conversations. Name them one by one.")
    documents = parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))
    if talks == {True}:
        return Corpus(path.name, "all", documents, asked.template.joiner, chat=True)
    return Corpus(path.name, "all", documents)


def _has_hub_layout(folder: Path) -> bool:
    """Whether the folder is a copy of a hub dataset: its card lists configurations, or its files are named as shards."""
    card = folder / "README.md"
    if card.is_file():
        front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        if front and re.search(r"^(configs|dataset_info):", front[1], re.MULTILINE):
            return True
    return any(SHARD.search(path.name) for path in _text_files(folder))


def _text_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and _is_text(path):
            yield path


def _is_text(path: Path) -> bool:
    return path.name.endswith(tuple(READERS))


def _reader(path: Path) -> Form | None:
    return next((reader for suffix, reader in READERS.items() if path.name.endswith(suffix)), None)


def _read(reader: Form | None, files: list[Path], column: str | None, asked: _Request) -> tuple[Sequence[str], bool]:
    """The documents of files that one reader reads, and whether they are conversations."""
    if reader is None:
        if column is not None:
            raise PareError(
                f"a .txt file has no columns, and {asked.spec} names the column {column!r}. Name the file alone."
            )
        return [_read_text(path) for path in files], False

    def choose(kinds: Mapping[str, Kind]) -> str:
        chosen = _chosen(kinds, column, asked)
        if kinds[chosen] == "chat":
            _ = asked.template  # tell before all rows are read that there is none
        return chosen

    return read_column(reader, files, column, choose, asked.chat, asked.mark)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise PareError(
            f"{path} is not UTF-8 text: byte {fault.start} is 0x{fault.object[fault.start]:02x}. Convert it to UTF-8."
        ) from fault
    except OSError as fault:
        raise PareError(f"{path} cannot be read: {fault.strerror}.") from fault


def _kinds_of(data: Any) -> dict[str, Kind]:
    """What each column of a dataset holds, by its type."""
    datasets = installed_datasets()
    kinds: dict[str, Kind] = {}
    for name, feature in data.features.items():
        inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else None
        talks = isinstance(inner, dict) and {"role", "content"} <= inner.keys()
        strings = getattr(feature, "dtype", "") in ("string", "large_string")
        kinds[name] = "chat" if talks else "text" if strings else "other"
    return kinds


def _chosen(columns: Mapping[str, Kind], column: str | None, asked: _Request) -> str:
    """The column to read, of those that hold what is asked for.

    Raises PareError where none is named and more than one could be meant.
    """
    talks = [name for name, kind in columns.items() if kind == "chat"]
    strings = [name for name, kind in columns.items() if kind == "text" and not asked.only_chat]
    alone = [names[0] for names in (talks, strings) if len(names) == 1]
    usual = [name for name, held in (("text", strings), ("messages", talks)) if name in held]
    chosen = column or next(iter([*usual, *alone]), None)
    if chosen in (*talks, *strings):
        return str(chosen)
    what = "messages ([{role, content}, ...])" if asked.only_chat else "strings"
    wanted = chosen or ("messages" if asked.only_chat else "text")
    lack = f"no column of {what} named {chosen!r}" if chosen else f"no column {wanted!r}, and not just one of {what}"
    if wanted in columns:
        lack = f"values in its column {wanted!r} that are no {what}"
    path = SELECTOR.split(asked.spec)[0]
    form = f"{path}:column" if _is_text(Path(path)) else f"{path}:config:split:column"
    fitting = talks if asked.only_chat else strings
    raise PareError(
        f"{asked.spec} has {lack}. Columns: {', '.join(columns) or 'none'}; of {what}: {', '.join(fitting) or 'none'}."
        f"{did_you_mean(chosen or '', fitting)} Name one as {form}, or call it {wanted!r} in a file of your own."
    )


def _fetch(load: Callable[[], T], spec: str, role: Role) -> T:
    """What `load` returns. Any fault of the hub, its cache or a file's reader becomes a PareError that says what to do."""
    # `datasets` shows a bar for every small file; downloads have their own, from huggingface_hub
    installed_datasets().disable_progress_bars()
    try:
        return load()
    except PareError:
        raise
    except Exception as fault:  # datasets, the hub, httpx and arrow each raise their own kind
        reason = " ".join(f"{fault.__cause__ or ''} {fault}".split())
        raise PareError(
            f"the text {spec} cannot be loaded: {type(fault).__name__}: {reason[:400]} "
            f"Without a network, name {FORMS}, or stdlib: {HOW_TO_SET[role]}"
        ) from fault


def _revision(data: Any) -> str | None:
    """The commit of a hub dataset, from the folder in the cache of `datasets` that bears its name."""
    folders = (part for file in data.cache_files for part in Path(file["filename"]).parent.parts)
    return next((part for part in folders if COMMIT.fullmatch(part)), None)


def _is_unicode(name: str) -> bool:
    return all(not "\ud800" <= character <= "\udfff" for character in name)


def _is_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or _is_text(Path(path)) or Path(path).exists()
