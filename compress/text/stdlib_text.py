"""The corpus `stdlib`: English prose and code, from the standard library of the Python that runs.

Every CPython carries megabytes of docstrings, comments and source, so a first calibration and a first perplexity need
neither a network nor a copy of anyone's text. The text differs a little between Python versions: quote the version and
the corpus digest beside a number.

A document is one module. A hash of its top-level package's name picks its split, so that no package is in two splits. A
test is in the split of what it tests, or in none. What some distributions leave out (the tests, IDLE, Tk, lib2to3,
distutils) is in no split but `train`: calibration and evaluation are alike everywhere.
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

# Debian ships these in packages of their own or not at all, and newer Pythons dropped some.
TRAIN_ONLY = frozenset(
    {"distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtle", "turtledemo"}
)

# Generated tables, and files that a distribution or a site adds: no prose, or not Python's own.
SKIPPED = frozenset({"__phello__", "encodings", "sitecustomize", "usercustomize", "html.entities"})
GENERATED = ("_sysconfigdata", "_sysconfig_vars")

# A package's hash modulo 100 picks its split: below 12 evaluation, below 24 calibration, else train. The salt was chosen,
# by sizes alone, so that both hold nearly a megabyte, and no package more than a quarter of it.
EVALUATION_BELOW, CALIBRATION_BELOW = 12, 24
SALT = "stdlib-9216"


@dataclass(frozen=True)
class Document:
    """One module of the standard library: its dotted name and its source; of `pydoc_data.topics`, the prose in it."""

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
    read = (_read(path, module) for path, module in _modules(root) if split_of(module) == split)
    readable = [document for document in read if document is not None]
    if not readable:
        raise PareError(
            f"the standard library at {root} holds no readable source for the split {split!r}; "
            "wanted the .py files beside the interpreter. Install Python with its source, or name another corpus"
        )
    return readable


def text(split: str) -> str:
    """The documents of one split joined by blank lines. Errors as `documents`."""
    return JOINER.join(document.text for document in documents(split))


@lru_cache(maxsize=4096)
def split_of(module: str) -> str | None:
    """The split of a module, from its name alone; None for a test of something that is not in `train`."""
    parts = module.split(".")
    tests = [i for i, part in enumerate(parts) if part in ("test", "tests")]
    if not tests:
        return _split_of_family(family_of(parts[0]))
    # `test.test_email.test_policy` is about email, `unittest.test.test_case` about unittest.
    subject = parts[0] if tests[0] > 0 else next((part for part in parts if part.startswith("test_")), parts[-1])
    return "train" if _split_of_family(family_of(subject.removeprefix("test_"))) == "train" else None


def _split_of_family(family: str) -> str:
    if family in TRAIN_ONLY:
        return "train"
    number = int.from_bytes(hashlib.sha256(f"{SALT}:{family}".encode()).digest()[:8], "big") % 100
    return "evaluation" if number < EVALUATION_BELOW else "calibration" if number < CALIBRATION_BELOW else "train"


def family_of(package: str) -> str:
    """One name for the top-level packages that share text: `decimal` for `_pydecimal`, `collections` for
    `_collections_abc`."""
    if package in TRAIN_ONLY:
        return package
    return re.sub(r"^_+(py(?=[a-z]))?", "", package).split("_")[0] or package


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
    """Path and dotted name of each module below `root`, sorted by name."""
    named = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        # leaves site-packages out too: it is no identifier
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
    """The prose of `pydoc_data.topics`, a module that holds one dict of strings and nothing else."""
    try:
        for statement in ast.parse(source).body:
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(statement.value, ast.Dict):
                return JOINER.join(str(entry) for entry in ast.literal_eval(statement.value).values())
    except (SyntaxError, ValueError):
        pass
    return ""
