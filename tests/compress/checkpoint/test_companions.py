"""What goes along with a checkpoint: plain data of the model's own folder, and nothing else."""

import json
import os

import pytest

from paredown.compress.checkpoint.companions import companions, left_behind, tokenizer_sha256, write_companions
from paredown.compress.errors import PareError

DATA = (
    "LICENSE", "LICENSE.txt", "License.md", "LICENSE-2.0", "NOTICE", "Notice.txt", "USE_POLICY.md", "merges.txt",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json",
    "tokenizer.model", "tokenizer.model.v3", "qwen.tiktoken", "additional_chat_templates/rag.jinja",
)  # fmt: skip
CODE = (
    "tokenizer.pkl",
    "tokenizer.pt",
    "tokenizer.so",
    "tokenizer.so.1",
    "tokenizer.pyc",
    "tokenizer_x.py",
    "LICENSE.exe",
)
ELSE = (
    "README.md", "report.json", "paredown.json", "config.json", "model.safetensors.index.json", "modeling_x.py", ".x.json",
    "pytorch_model.bin", "model.gguf", "onnx/config.json", "adapter_config.json", "adapter_model.safetensors",
)  # fmt: skip


@pytest.fixture
def model(tmp_path):
    for name in (*DATA, *CODE, *ELSE):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text("{}")
    return tmp_path / "model"


def test_data_goes_along_and_code_does_not(model, tmp_path):
    (tmp_path / "out").mkdir()
    assert set(write_companions(model, tmp_path / "out")) == set(DATA)
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert written == set(DATA)


def test_what_stays_behind_is_told_with_an_adapter_among_it(model):
    told = left_behind(model)
    assert all(sum(text.startswith(f"{name} does not go along") for text in told) == 1 for name in CODE)
    assert sum("adapter (LoRA)" in text and "merge_and_unload" in text for text in told) == 1
    assert len(told) == len(CODE) + 1


@pytest.mark.parametrize("begin", [b"\x7fELF", b"MZ\x90\x00", b"PK\x03\x04", b"\x80\x04\x95\x00", b"#!/bin/sh"])
def test_a_program_or_pickle_under_a_name_of_data_stays_behind(begin, model):
    (model / "tokenizer.model").write_bytes(begin + b"x" * 9)
    assert "tokenizer.model" not in companions(model)
    assert any(text.startswith("tokenizer.model does not go along") for text in left_behind(model))


def test_a_link_that_leads_outside_stays_behind_and_one_that_stays_inside_goes(model, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jinja").write_text("secret")
    (model / "tokenizer_secret.txt").symlink_to(tmp_path / "secret")
    (model / "nowhere.json").symlink_to(tmp_path / "nothing")
    (model / "inside.json").symlink_to("tokenizer.json")
    (model / "additional_chat_templates" / "rag.jinja").unlink()
    (model / "additional_chat_templates").rmdir()
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    found, told = companions(model), left_behind(model)
    assert "inside.json" in found
    for name, why in [
        ("tokenizer_secret.txt", "outside"),
        ("nowhere.json", "leads nowhere"),
        ("additional_chat_templates/a.jinja", "outside"),
    ]:
        assert name not in found and any(text.startswith(name) and why in text for text in told)


def test_links_of_the_hubs_cache_go_along(model, tmp_path):
    snapshot = tmp_path / "hub" / "models--org--m" / "snapshots" / "abc"
    blobs = tmp_path / "hub" / "models--org--m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    (snapshot / "tokenizer_config.json").symlink_to("../../refs")  # of the repository, and no file of the model
    (blobs.parent / "refs").write_text("{}")
    assert list(companions(snapshot)) == ["tokenizer.json"]


def test_auto_map_goes_where_its_code_goes(model, tmp_path):
    settings = {
        "auto_map": {"AutoTokenizer": ["x.T", None]},
        "tokenizer_class": "T",
        "deep": [{"auto_map": {}, "a": "é"}],
    }
    (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (model / "special_tokens_map.json").write_bytes(b'{"auto_map": ')  # damaged: its reader tells
    (tmp_path / "out").mkdir()
    write_companions(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written == {"tokenizer_class": "T", "deep": [{"a": "é"}]}
    assert (tmp_path / "out" / "special_tokens_map.json").read_bytes() == b'{"auto_map": '
    assert tokenizer_sha256(model) == tokenizer_sha256(tmp_path / "out")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_a_companion_that_cannot_be_read_says_so(model):
    (model / "merges.txt").chmod(0)
    with pytest.raises(PareError, match=r"merges.txt cannot be read .* Make it readable"):
        companions(model)
