"""Text to calibrate on and to score: the standard library, the field's corpora under their exact protocol, your files.

    stdlib | wikitext2 | c4 | ptb | org/name[:config[:split[:column]]] | a .txt, .jsonl, .json or .parquet file | a folder

All but the standard library is read through `datasets`.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from paredown.compress import stdlib_text
from paredown.compress.errors import PareError, did_you_mean

Role = Literal["calibration", "evaluation"]
SUFFIXES = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Corpus:
    """Documents of one split, and how they are joined where the protocol wants one text."""

    name: str
    split: str
    documents: Sequence[str]
    joiner: str = "\n\n"
    revision: str | None = None
    max_windows: int | None = None  # the protocol reads no more windows than this

    @cached_property
    def text(self) -> str:
        return self.joiner.join(self.documents)

    @cached_property
    def sha256(self) -> str:
        """Of the joined text, in UTF-8."""
        digest = hashlib.sha256()
        for i, document in enumerate(self.documents):
            digest.update((self.joiner * (i > 0) + document).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


@dataclass(frozen=True)
class _Named:
    """Where a named corpus lies, and how the reference code of GPTQ, SparseGPT and Wanda reads it."""

    path: str
    config: str | None
    column: str
    split: dict[Role, str]
    joiner: dict[Role, str]
    files: dict[Role, str] | None = None
    first: dict[Role, int | None] | None = None  # no more documents than these
    max_windows: int | None = None  # when scoring


NAMED = {
    "wikitext2": _Named(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "text",
        {"calibration": "train", "evaluation": "test"}, {"calibration": " ", "evaluation": "\n\n"},
    ),
    "ptb": _Named(
        "ptb-text-only/ptb_text_only", "penn_treebank", "sentence",
        {"calibration": "train", "evaluation": "test"}, {"calibration": " ", "evaluation": " "},
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

    Raises PareError for an unknown name, a file that cannot be read, a missing column, an empty corpus.
    """
    if spec == "stdlib":
        return Corpus("stdlib", role, [document.text for document in stdlib_text.documents(role)])
    if spec in NAMED:
        corpus = _load_named(spec, NAMED[spec], role)
    elif _is_local(spec):
        corpus = _load_local(spec)
    elif "/" in spec:
        corpus = _load_hub(spec)
    else:
        names = ["stdlib", *NAMED]
        raise PareError(
            f"unknown text {spec!r}.{did_you_mean(spec, names)} Name one of {', '.join(names)}, a hub dataset "
            "org/name[:config[:split[:column]]], or a .txt, .jsonl or .parquet file or folder."
        )
    if not any(document.strip() for document in corpus.documents):
        raise PareError(f"{spec} holds no text. Name a file or split with text in it.")
    return corpus


def overlap(calibration: Corpus, evaluation: Corpus) -> str | None:
    """A sentence for the report if a model is scored on the text it was calibrated on, else None."""
    if calibration.sha256 != evaluation.sha256:
        return None
    return f"{evaluation.name} both calibrates and scores: the figure after compression is flattered."


def _load_named(name: str, known: _Named, role: Role) -> Corpus:
    extra: dict[str, Any] = {"data_files": {known.split[role]: known.files[role]}} if known.files else {}
    data = _load_dataset(name, known.path, known.config, split=known.split[role], **extra)
    documents = data[known.column]
    if known.first:
        documents = documents[: known.first[role]]
    limit = known.max_windows if role == "evaluation" else None
    return Corpus(name, known.split[role], list(documents), known.joiner[role], _revision(data), limit)


def _load_hub(spec: str) -> Corpus:
    path, config, split, column = [*(part or None for part in spec.split(":")), None, None, None][:4]
    assert path is not None
    data = _load_dataset(spec, path, config, split=split or "train")
    return Corpus(path, split or "train", _column(data, column, spec), revision=_revision(data))


def _load_local(spec: str) -> Corpus:
    path = Path(spec).expanduser()
    if not path.exists():
        raise PareError(f"the text {spec} does not exist. Name a .txt, .jsonl or .parquet file, or a folder of them.")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    if not files:
        raise PareError(f"the folder {spec} holds no {', '.join(SUFFIXES)} files.")
    documents: list[str] = []
    for file in files:
        documents.extend(_read_file(file))
    return Corpus(path.name, "all", documents)


def _read_file(file: Path) -> Iterable[str]:
    if file.suffix not in SUFFIXES:
        raise PareError(f"{file}: text is read from {', '.join(SUFFIXES)} files.")
    options: dict[str, Any] = {"sample_by": "document"} if file.suffix == ".txt" else {}
    data = _load_dataset(str(file), SUFFIXES[file.suffix], None, split="train", data_files=str(file), **options)
    return _column(data, None, str(file))


def _column(data: Any, column: str | None, spec: str) -> list[str]:
    strings = [name for name, kind in data.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    chosen = column or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if chosen is None or chosen not in data.features:
        raise PareError(
            f"{spec}: which column is the text? Columns: {', '.join(data.features)}. "
            "Name it as org/name:config:split:column, or call it 'text' in a file of your own."
        )
    return [text for text in data[chosen] if text is not None]


def _load_dataset(spec: str, path: str, config: str | None, **options: Any) -> Any:
    import datasets

    # no progress bars of its own for small files; downloads still show theirs through huggingface_hub
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, config, **options)
    except Exception as fault:  # datasets raises a dozen unrelated classes here
        raise PareError(
            f"the text {spec} cannot be loaded: {type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''} "
            "Without a network, name a local .txt, .jsonl or .parquet file, or stdlib."
        ) from fault


def _revision(data: Any) -> str | None:
    """The commit of a hub dataset, where its download record tells."""
    for url in getattr(data.info, "download_checksums", None) or {}:
        if "@" in url:
            return str(url).split("@")[1].split("/")[0]
    return None


def _is_local(spec: str) -> bool:
    looks = spec.startswith((".", "/", "~")) or Path(spec).suffix in SUFFIXES
    return looks or Path(spec).exists()
