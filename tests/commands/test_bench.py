"""`paredown bench` as a person types it."""

import json
import xml.etree.ElementTree as ET
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import transformers as t

QUICK = ["--batch", "1,2", "--context", "16", "--decode", "4", "--repeats", "1", "--device", "cpu"]


@pytest.fixture
def bench(paredown):
    return partial(paredown, "bench")


@pytest.fixture
def packed(tmp_path, tiny_model, prune):
    prune(tiny_model, tmp_path / "packed")
    return tmp_path / "packed"


def test_a_packed_checkpoint_is_timed_beside_its_original_and_the_result_is_kept(bench, packed, tiny_model, tmp_path):
    out = tmp_path / "speed"
    code, told, said = bench(packed, "--against", tiny_model, *QUICK, "-o", out, "--json")
    result = json.loads(told)
    assert code == 0, said
    assert result == json.loads((out / "bench.json").read_text())
    assert (result["model"], result["against"], result["dtype"]) == (str(packed), str(tiny_model), "bfloat16")
    assert [row["batch"] for row in result["end_to_end"]] == [1, 2]
    assert result["device"]["type"] == "cpu" and result["device"]["name"] and result["versions"]["transformers"]
    assert result["memory"]["model"]["weights_bytes"] < result["memory"]["against"]["weights_bytes"]
    assert "| 2 | decode |" in (out / "bench.md").read_text()
    assert ET.parse(out / "bench.svg").getroot().tag.endswith("svg")
    assert "loading" in said


def test_the_screen_shows_tables_and_what_was_capped(bench, tiny_model):
    code, told, said = bench(tiny_model, "--batch", "1", "--repeats", "1")
    assert code == 0
    assert "Tokens per second" in told and "Memory" in told and "Layers" in told
    assert "decode is 32 tokens, not 64: the model allows 64" in said


def test_both_sides_run_in_the_dtype_of_the_one_in_question(bench, tmp_path, tiny_model, tiny_config, save_model):
    import torch

    save_model(tmp_path / "wide", tiny_config, torch.float32)
    result = json.loads(bench(tiny_model, "--against", tmp_path / "wide", *QUICK, "--json")[1])
    assert result["dtype"] == "bfloat16"
    assert result["memory"]["model"]["weights_bytes"] == result["memory"]["against"]["weights_bytes"]


def test_faults_are_named_with_their_next_step(bench, tiny_model, tiny_config, save_model, tmp_path, monkeypatch):
    def fails(said, *arguments):
        code, told, error = bench(*arguments)
        assert code == 1 and not told and said in error.replace("\n", " "), error

    fails("no such folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    fails("error: ", tmp_path / "empty")
    fails("wanted whole numbers separated by commas", tiny_model, "--batch", "1,x")
    fails("decode 1: at least 4", tiny_model, "--decode", "1")
    fails("repeats 0", tiny_model, "--repeats", "0")
    (tmp_path / "file").write_text("")
    fails("no folder can be made there", tiny_model, *QUICK, "-o", tmp_path / "file")
    other = t.LlamaConfig(**{**tiny_config.to_dict(), "vocab_size": 512})
    save_model(tmp_path / "other", other)
    fails("a vocabulary of 320 tokens", tiny_model, "--against", tmp_path / "other", *QUICK)
    size = sum(path.stat().st_size for path in tiny_model.glob("*.safetensors"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size * 3 // 2))
    assert bench(tiny_model, *QUICK)[0] == 0
    fails("cannot be timed in turn", tiny_model, "--against", tiny_model, *QUICK)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size // 2))
    fails("alone takes", tiny_model, *QUICK)
