"""The corpus `stdlib`: English prose and code, read at run time from the running Python's own standard library.

Every CPython carries megabytes of docstrings, comments and source, so a first calibration and a first perplexity need
neither a network nor a copy of anyone's text. The text differs a little between Python versions: quote the version and
the corpus digest beside a number.

A document is one module. The side of the split is drawn from the name of its top-level package, so that a package never
stands on two sides, and a test stands on the side of what it tests or nowhere. What some distributions leave out (the
tests, IDLE, Tk, lib2to3, distutils) may enter the training side only: calibration and evaluation are alike everywhere.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from paredown.compress.errors import PareError, did_you_mean

SPLITS = ("train", "calibration", "evaluation")

JOINER = "\n\n"

# Debian packs these apart or not at all, and newer Pythons dropped some: never calibration or evaluation.
TRAIN_ONLY = frozenset(
    {"distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtle", "turtledemo"}
)

# Generated tables and the files a distribution or a site writes: no prose, or not Python's own.
SKIPPED = frozenset({"__phello__", "encodings", "sitecustomize", "usercustomize", "html.entities"})
GENERATED = ("_sysconfigdata", "_sysconfig_vars")

# Of 100 drawn numbers, those below 12 are evaluation and the next 12 calibration. The salt was searched for, by sizes
# alone, to give both nearly a megabyte, with no package above a quarter of it.
EVALUATION_BELOW, CALIBRATION_BELOW = 12, 24
SALT = "stdlib-9216"


@dataclass(frozen=True)
class Document:
    """One module of the standard library: its dotted name and its whole source, or the prose of the language topics."""

    module: str
    text: str


def documents(split: str) -> list[Document]:
    """The documents of one split, sorted by module name.

    Raises `PareError` for an unknown split, and where the standard library is not a folder of readable source.
    """
    if split not in SPLITS:
        raise PareError(
            f"the corpus stdlib has no split {split!r}; wanted one of {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
        )
    root = _library()
    found = (_read(path, module) for path, module in _modules(root) if split_of(module) == split)
    chosen = [document for document in found if document is not None]
    if not chosen:
        raise PareError(
            f"the standard library at {root} holds no readable source for the split {split!r}; "
            "wanted the .py files beside the interpreter. Install Python with its source, or name another corpus"
        )
    return chosen


def text(split: str) -> str:
    """The documents of one split joined by blank lines. Errors as `documents`."""
    return JOINER.join(document.text for document in documents(split))


@lru_cache(maxsize=4096)
def split_of(module: str) -> str | None:
    """The split a module belongs to, from its name alone; `None` for a test whose subject is held out of training."""
    parts = module.split(".")
    side = _side(_family(parts[0]))
    tests = [place for place, part in enumerate(parts) if part in ("test", "tests")]
    if not tests:
        return side
    # `test.test_email.test_policy` speaks of email, `unittest.test.test_case` of unittest.
    subject = parts[0] if tests[0] > 0 else next((part for part in parts if part.startswith("test_")), parts[-1])
    return "train" if _side(_family(subject.removeprefix("test_"))) == "train" else None


def _side(family: str) -> str:
    if family in TRAIN_ONLY:
        return "train"
    drawn = int.from_bytes(hashlib.sha256(f"{SALT}:{family}".encode()).digest()[:8], "big") % 100
    return "evaluation" if drawn < EVALUATION_BELOW else "calibration" if drawn < CALIBRATION_BELOW else "train"


def _family(name: str) -> str:
    """`_pydecimal` is decimal written in Python and `_collections_abc` a part of collections: they share one name."""
    if name in TRAIN_ONLY:
        return name
    return re.sub(r"^_+(py(?=[a-z]))?", "", name).split("_")[0] or name


def _library() -> Path:
    root = Path(sysconfig.get_path("stdlib") or "")
    if not (root / "argparse.py").is_file():
        raise PareError(
            f"the corpus stdlib reads the source of Python's standard library, and found none at {root} "
            "(a zipped or a stripped Python?). Run an ordinary Python installation, or name another corpus, "
            "such as a .txt file"
        )
    return root


def _modules(root: Path) -> Iterator[tuple[Path, str]]:
    """Path and dotted name of each module below `root`, sorted by name; site-packages is no identifier and drops out."""
    named = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if all(part.isidentifier() for part in parts) and "__pycache__" not in parts:
            named.append((".".join(part for part in parts if part != "__init__") or parts[0], path))
    for module, path in sorted(named):
        skipped = module.split(".")[0] in SKIPPED or module in SKIPPED or module.startswith(GENERATED)
        if not skipped:
            yield path, module


def _read(path: Path, module: str) -> Document | None:
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if module == "pydoc_data.topics":
        source = _topics(source)
    return Document(module, source.strip()) if source.strip() else None


def _topics(source: str) -> str:
    """The prose of `pydoc_data.topics`: a module that holds nothing but a dict of escaped strings."""
    try:
        for statement in ast.parse(source).body:
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(statement.value, ast.Dict):
                return JOINER.join(str(entry) for entry in ast.literal_eval(statement.value).values())
    except (SyntaxError, ValueError):
        pass
    return ""
