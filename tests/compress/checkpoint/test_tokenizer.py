"""A tokenizer that cannot be loaded is one sentence, whatever the libraries raise."""

import json

import pytest

from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.errors import PareError


def newer_kind(content):
    content["model"]["type"] = "NewerKind"


def token_beyond_the_vocabulary(content):
    content["model"]["merges"] = [["a", "not-there"]]


def wrong_type(content):
    content["added_tokens"] = 3


@pytest.mark.parametrize("change", [newer_kind, token_beyond_the_vocabulary, wrong_type])
def test_a_damaged_or_newer_tokenizer_names_its_file_and_the_versions(change, tiny_model):
    path = tiny_model / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(PareError, match=r"tokenizer\.json.*cannot be loaded by tokenizers \d.* and transformers \d"):
        load_tokenizer(tiny_model)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null"])
def test_a_tokenizer_file_that_is_no_json_is_told(content, tiny_model):
    (tiny_model / "tokenizer.json").write_bytes(content)
    with pytest.raises(PareError, match="tokenizer"):
        load_tokenizer(tiny_model)


def test_a_folder_without_tokenizer_files_says_what_to_copy(tmp_path):
    with pytest.raises(PareError, match=r"has no tokenizer .* Copy tokenizer\.json"):
        load_tokenizer(tmp_path)
