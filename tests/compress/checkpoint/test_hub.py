"""From what was typed to a folder: local folders, the hub's cache, and clear words where neither is there."""

import shutil

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import filter_repo_objects

from paredown.compress.checkpoint.hub import FETCHED, NOT_FETCHED, load_tokenizer, resolve
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


def test_weights_and_their_companions_are_fetched_once_and_nothing_else():
    wanted = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model", "LICENSE",
        "License.txt", "USE_POLICY.md", "additional_chat_templates/rag.jinja", "qwen.tiktoken", "chat_template.jinja",
        "README.md",
    ]  # fmt: skip
    others = [
        "original/model.safetensors", "original/params.json", "original/tokenizer.model", "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors", "onnx/config.json", "model.gguf", "pytorch_model.bin", "x.py", "onnx/README.md",
    ]  # fmt: skip
    found = filter_repo_objects([*wanted, *others], allow_patterns=list(FETCHED), ignore_patterns=list(NOT_FETCHED))
    assert list(found) == wanted


def test_a_model_in_the_hubs_cache_takes_its_linked_files_along(cache, tmp_path, prune):
    blobs = cache.parent.parent / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(cache.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(f"../../blobs/{i}")
    prune(resolve("org/tiny")[0], tmp_path / "out")
    assert load_tokenizer(tmp_path / "out")("a").input_ids and not any(
        p.is_symlink() for p in (tmp_path / "out").iterdir()
    )
