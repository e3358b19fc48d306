"""The corpus `stdlib`: three sides that never share a package, alike wherever the same Python is installed."""

import ast
import sysconfig
from pathlib import Path

import pytest

from paredown.compress.errors import PareError
from paredown.compress.text.stdlib_text import SPLITS, documents, split_of, text

TRAIN_ONLY = {"test", "tests", "idlelib", "lib2to3", "tkinter", "distutils", "turtledemo", "pydoc_data", "ensurepip"}


@pytest.fixture(scope="module")
def corpus():
    return {split: documents(split) for split in SPLITS}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of our own making: `library({"path": b"source"})` is what the corpus then reads."""

    def build(files):
        for name, source in {"argparse.py": b"# one", "threading.py": b"# two", **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(source)
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        return tmp_path

    return build


def names(split):
    return [document.module for document in documents(split)]


def test_no_module_and_no_package_stands_on_two_sides(corpus):
    for level in (lambda m: m, lambda m: m.split(".")[0]):
        sides = [{level(document.module) for document in corpus[split]} for split in SPLITS]
        assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


def test_no_text_of_a_held_out_module_is_a_training_text(corpus):
    held_out = {document.text for split in SPLITS[1:] for document in corpus[split] if len(document.text) > 200}
    assert not held_out & {document.text for document in corpus["train"]}


def test_the_held_out_sides_are_large_and_no_package_fills_a_third_of_one(corpus):
    for split in ("calibration", "evaluation"):
        sizes = {}
        for document in corpus[split]:
            package = document.module.split(".")[0]
            sizes[package] = sizes.get(package, 0) + len(document.text.encode())
        assert sum(sizes.values()) > 700_000
        assert len(sizes) >= 15
        assert max(sizes.values()) < sum(sizes.values()) / 3


def test_what_distributions_leave_out_is_never_held_out(corpus):
    for split in ("calibration", "evaluation"):
        for document in corpus[split]:
            assert not TRAIN_ONLY & set(document.module.split(".")), document.module


def test_documents_are_sorted_and_the_same_every_time(corpus):
    for split in ("calibration", "evaluation"):
        modules = [document.module for document in corpus[split]]
        assert modules == sorted(set(modules))
        assert documents(split) == corpus[split]


def test_the_sides_are_fixed_by_name_alone_so_another_python_draws_the_same():
    drawn = {
        name: split_of(name) for name in ("argparse", "typing", "logging.handlers", "importlib._bootstrap", "json")
    }
    assert drawn == {
        "argparse": "evaluation", "typing": "evaluation", "logging.handlers": "calibration",
        "importlib._bootstrap": "calibration", "json": "train",
    }  # fmt: skip


@pytest.mark.parametrize(("twin", "module"), [("_pydatetime", "datetime"), ("_collections_abc", "collections")])
def test_a_private_twin_stands_on_the_side_of_its_module(twin, module):
    assert split_of(twin) == split_of(module) == "evaluation"


def test_a_test_is_trained_on_only_where_its_subject_is():
    assert split_of("test.test_json.test_decode") == "train"
    assert split_of("test.test_argparse") is None
    assert split_of("test.test_ctypes.test_arrays") is None
    assert split_of("ctypes.test.test_arrays") is None
    assert split_of("test.test_logging") is None


def test_a_document_is_the_source_of_its_module(corpus):
    argparse = next(document for document in corpus["evaluation"] if document.module == "argparse")
    path = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    assert argparse.text == path.read_text(encoding="utf-8").strip()


def test_text_joins_the_documents_by_blank_lines(corpus):
    assert text("calibration") == "\n\n".join(document.text for document in corpus["calibration"])


def test_the_language_topics_are_read_as_prose(library):
    entries = {"assert": "The assert statement\n", "if": "Conditional"}
    library({"pydoc_data/__init__.py": b"", "pydoc_data/topics.py": f"topics = {entries!r}\n".encode()})
    topics = next(document for document in documents("train") if document.module == "pydoc_data.topics")
    assert topics.text == "The assert statement\n\n\nConditional"


def test_the_topics_of_this_python_hold_no_escaped_newlines(corpus):
    topics = [document for document in corpus["train"] if document.module == "pydoc_data.topics"]
    if not topics:
        pytest.skip("this Python comes without pydoc_data.topics")
    assert topics[0].text.count("\n") > 1000
    with pytest.raises(SyntaxError):
        ast.parse(topics[0].text)


def test_what_cannot_be_read_or_is_not_pythons_own_is_left_out(library):
    root = library(
        {
            "json/decoder.py": b"# json",
            "site-packages/numpy/core.py": b"# not ours",
            "dist-packages/apt.py": b"# not ours",
            "json/__pycache__/scanner.py": b"# stale",
            "json/latin.py": b"# \xe9\xff",
            "encodings/cp037.py": b"table = {}",
            "_sysconfigdata__linux.py": b"vars = {}",
            "sitecustomize.py": b"# a site's",
            "empty.py": b"\n",
        }
    )
    (root / "json" / "gone.py").symlink_to(root / "nowhere.py")
    assert names("train") == ["json.decoder"]
    assert names("evaluation") == ["argparse"]
    assert names("calibration") == ["threading"]


def test_a_zipped_python_is_told_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(PareError, match=r"found none at .*python311\.zip"):
        documents("evaluation")


def test_an_unknown_split_is_told_the_known_ones():
    with pytest.raises(PareError, match=r"no split 'evalution'.*train, calibration, evaluation.*Did you mean 'eval"):
        documents("evalution")
