"""From what was typed to a folder: local folders, the hub's cache, and clear words where neither is there."""

import shutil

import huggingface_hub.constants
import pytest

from paredown.compress.checkpoint.hub import load_tokenizer, resolve
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tiny_model, tmp_path, monkeypatch):
    """The tiny model as the hub's own client would have stored it."""
    entry = tmp_path / "cache" / "models--org--tiny"
    shutil.copytree(tiny_model, entry / "snapshots" / REVISION)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return entry / "snapshots" / REVISION


def test_a_folder_is_itself_and_has_no_revision(tiny_model):
    assert resolve(str(tiny_model)) == (tiny_model, None)


def test_a_cached_model_is_found_without_a_network_and_knows_its_commit(cache):
    for revision in (None, "main", REVISION):
        folder, commit = resolve("org/tiny", revision)
        assert folder.resolve() == cache.resolve() and commit == REVISION
    assert ModelSource(folder, "org/tiny", commit).family == "llama"
    assert load_tokenizer(folder)("a").input_ids


@pytest.mark.parametrize("model", ["org/other", "no-body/nothing"])
def test_a_model_that_is_not_cached_says_so(model, cache):
    with pytest.raises(PareError, match=f"{model} is not in the local cache.*name a local folder"):
        resolve(model)


def test_another_revision_than_the_cached_one_says_so(cache):
    with pytest.raises(PareError, match="not in the local cache"):
        resolve("org/tiny", "v2")


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_id(model):
    with pytest.raises(PareError, match=r"no such folder. Name a folder"):
        resolve(model)


def test_a_file_is_no_folder(tiny_model):
    with pytest.raises(PareError, match="no such folder"):
        resolve(str(tiny_model / "config.json"))


def test_a_name_that_the_hub_cannot_hold_is_refused(cache):
    with pytest.raises(PareError, match="--bad/name"):
        resolve("--bad/name--")
