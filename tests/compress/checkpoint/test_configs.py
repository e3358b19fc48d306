"""A config.json with any value in it ends in a sentence that names the value, before anything is built from it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTJConfig, MixtralConfig

from paredown.compress import plan
from paredown.compress.checkpoint.configs import load_config
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError

DEEP = '{"model_type": ' + "[" * 5000 + "]" * 5000 + "}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory, save_model):
    """The folder of a tiny Llama, and its config as it was saved."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    save_model(folder, LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                   num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32))  # fmt: skip
    return folder, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", "64", "Field 'hidden_size' expected int, got str"),
        ("hidden_size", None, "Field 'hidden_size'"),
        ("hidden_size", [64], "Field 'hidden_size'"),
        ("hidden_size", {"a": 64}, "Field 'hidden_size'"),
        ("hidden_size", -32, "negative dimension -32"),
        ("hidden_size", 0, "has shape"),
        ("vocab_size", True, "Field 'vocab_size'"),
        ("vocab_size", -1, "negative"),
        ("num_attention_heads", 0, "num_attention_heads"),
        ("num_attention_heads", 3, "multiple of the number of attention heads"),
        ("num_hidden_layers", 1.5, "Field 'num_hidden_layers'"),
        ("num_hidden_layers", 3, "tensors of a llama model are missing, first 'model.layers.2"),
        ("intermediate_size", 64, r"up_proj.weight' has shape|gate_proj.weight' has shape"),
        ("hidden_act", "silly", "hidden_act: 'silly'"),
        ("hidden_act", 3, "Field 'hidden_act'"),
        ("rms_norm_eps", "small", "Field 'rms_norm_eps'"),
        ("tie_word_embeddings", "no", "Field 'tie_word_embeddings'"),
        ("layer_types", ["full_attention"], "layer_types"),
        ("rope_parameters", 3, "rope_parameters"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}, "rope_parameters.rope_theta: 'x'"),
        ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1.0}, "rope_parameters|spiral"),
        ("rope_scaling", {"type": "linear", "factor": [2]}, r"rope_scaling.factor: '\[2\]'"),
        ("dtype", "float17", "dtype: 'float17'"),
        ("dtype", "int8", "dtype"),
        ("architectures", "LlamaForCausalLM", "a list of names of classes is wanted"),
        ("quantization_config", "gptq", "quantization_config: gptq"),
        ("text_config", 3, "settings of a text model inside"),
        ("transformers_weights", "../other.safetensors", "transformers_weights"),
        ("model_type", ["llama"], "not of a model type"),
        ("model_type", "llamma", "not of a model type"),
        ("num_hidden_layers", 10**9, "num_hidden_layers: 1000000000, and the files hold tensors of 2 layers"),
        ("hidden_size", 10**12, "hidden_size: 1000000000000, and the largest dimension of a tensor in the files is 64"),
        ("num_hidden_layers", 10**400, "num_hidden_layers: a number of more than 18 digits"),
        ("num_labels", 10**9, "num_labels"),
        ("pad_token_id", 10**6, "adding_idx|pad_token_id"),
        ("max_position_embeddings", 10**30, "max_position_embeddings"),
    ],
)
def test_a_value_of_no_use_is_named(key, value, said, llama):
    folder, config = llama
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(PareError, match=said) as fault:
        ModelSource(folder, "m")
    assert "\n" not in str(fault.value) and len(str(fault.value)) < 1000


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"llama"', b"\xff\xfe\x00", DEEP.encode(), b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_mapping_of_settings_is_refused(content, llama):
    folder, _ = llama
    (folder / "config.json").write_bytes(content)
    with pytest.raises(
        PareError, match=r"config.json (cannot be read as JSON|holds a .*a mapping of settings is wanted)"
    ):
        load_config(folder)


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path):
    with pytest.raises(PareError, match="has no config"):
        load_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(PareError, match="is no file of settings"):
        load_config(tmp_path)


@pytest.mark.parametrize("key", ["return_dict", "output_hidden_states", "output_attentions"])
def test_what_a_model_shall_return_is_not_left_to_the_checkpoint(key, llama):
    folder, config = llama
    (folder / "config.json").write_text(json.dumps({**config, key: key != "return_dict"}))
    assert plan(folder, "magnitude-50").targeted
    assert getattr(ModelSource(folder, "m").config, key) == (key != "return_dict")  # which is written again


def test_sizes_beyond_the_usual_that_the_class_does_not_use_are_no_fault(llama):
    folder, config = llama
    unused = {
        "max_position_embeddings": 10**7,
        "sliding_window": 10**6,
        "rope_theta": 10**9,
        "seed": 2**40,
        "extra": [1e30],
    }
    (folder / "config.json").write_text(json.dumps({**config, **unused}))
    assert ModelSource(folder, "m").parameters


def test_too_many_experts_are_refused(tmp_path, save_model):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    save_model(tmp_path, MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_local_experts": 10**6}))
    with pytest.raises(PareError, match="num_local_experts: 1000000, and the files hold tensors of at most 2"):
        ModelSource(tmp_path, "m")
    path.write_text(json.dumps({**config, "num_local_experts": 3}))
    with pytest.raises(PareError, match=r"gate.weight' has shape|is made of 2 tensors"):
        ModelSource(tmp_path, "m")


def test_an_expert_that_is_missing_is_found_without_reading_one(tmp_path, save_model, monkeypatch):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    save_model(tmp_path, MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if ".1." in name.split("experts", 1)[-1])
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path, metadata={"format": "pt"})
    monkeypatch.setattr("paredown.compress.checkpoint.tensor_files.TensorFiles.read", None)
    with pytest.raises(PareError, match=r"is made of \d tensors, first .*experts.* which hold \d+ numbers"):
        ModelSource(tmp_path, "m")


def test_tables_larger_than_the_model_are_not_computed(tmp_path, save_model):
    save_model(tmp_path, GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, rotary_dim=8))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_positions": 10**9}))
    with pytest.raises(
        PareError, match=r"computes tables of 32.0 GB, more than its weights; the largest is .*embed_positions"
    ):
        ModelSource(tmp_path, "m")


def test_a_model_computes_its_tables_as_from_pretrained_does(tmp_path, save_model):
    from transformers import AutoModelForCausalLM

    save_model(tmp_path, GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, rotary_dim=8))
    table = "transformer.h.0.attn.embed_positions"
    ours = ModelSource(tmp_path, "m").model.get_buffer(table)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").get_buffer(table)
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
