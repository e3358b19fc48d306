"""Packed classes are treated as the library's own, and nothing but they loads a packed checkpoint."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers as t
from packing import pack_folder
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.quantizers import AutoQuantizationConfig

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.configs import load_config
from paredown.compress.errors import PareError

IDS = torch.arange(3, 19)[None]
C = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}


@pytest.fixture
def packed(tmp_path):
    """The folder of a packed Llama."""
    torch.manual_seed(0)
    pack_folder(LlamaForCausalLM(LlamaConfig(**C)), tmp_path / "packed")
    return tmp_path / "packed"


def edit_config(folder, **changes):
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def test_packed_weights_are_not_quantised_on_top(packed):
    with pytest.raises(PareError, match="--format dense"):
        AutoModelForCausalLM.from_pretrained(packed, quantization_config=t.QuantoConfig(weights="int8"))
    own = AutoQuantizationConfig.from_dict(load_config(packed).quantization_config)  # which lm-eval hands on
    AutoModelForCausalLM.from_pretrained(packed, quantization_config=own)


def test_buffers_that_a_parent_module_fills_are_filled(tmp_path):
    torch.manual_seed(0)
    config = t.FalconH1Config(**C, **MAMBA, mamba_chunk_size=8, ssm_multipliers=[0.5, 1.0, 2.0, 3.0, 4.0])
    dense = pack_folder(t.FalconH1ForCausalLM(config), tmp_path / "packed")
    model = transformers_plugin.load(tmp_path / "packed")
    assert torch.equal(model.model.layers[0].mamba.mup_vector, dense.model.layers[0].mamba.mup_vector)
    assert torch.equal(logits(model), logits(dense))


def test_mixers_that_round_otherwise_in_quantised_models_compute_as_in_the_dense_one(tmp_path):
    torch.manual_seed(0)
    config = t.FalconMambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=8)
    dense = pack_folder(t.FalconMambaForCausalLM(config).to(torch.bfloat16), tmp_path, where="_proj")
    model = transformers_plugin.load(tmp_path)
    assert model.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(dense))


def test_a_packed_class_is_not_custom_code(packed):
    model = transformers_plugin.load(packed)
    assert not model.is_custom_code() and not model.config.is_custom_code()
    assert model._can_set_attn_implementation() == LlamaForCausalLM._can_set_attn_implementation()


def test_the_config_of_the_dense_family_comes_back_exactly(packed, tmp_path):
    config = LlamaConfig(
        **C, id2label={0: "a", 1: "b", 2: "c"}, rope_parameters={"rope_type": "default", "rope_theta": 9.0}
    )
    config.architectures = ["LlamaForCausalLM"]
    twin = transformers_plugin.packed_config(config, {})
    twin.save_pretrained(tmp_path)
    read = load_config(tmp_path)
    assert read.id2label == config.id2label and transformers_plugin.packed_modules(read) == {}
    assert transformers_plugin.dense_config(read).to_dict() == config.to_dict()
    assert transformers_plugin.packed_config(transformers_plugin.dense_config(read), {}).to_dict() == twin.to_dict()


def test_a_class_of_the_family_does_not_load_a_packed_checkpoint(packed):
    with pytest.raises(ValueError, match=r"import paredown\.compress"):
        LlamaForCausalLM.from_pretrained(packed)
    with pytest.raises(ValueError, match=r"import paredown\.compress"):
        LlamaForCausalLM.from_pretrained(packed, config=LlamaConfig.from_pretrained(packed))


@pytest.mark.parametrize("label", [..., None])
def test_a_packed_checkpoint_under_the_family_s_name_is_refused(packed, label):
    edit_config(packed, model_type="llama", architectures=["LlamaForCausalLM"], id2label=label)
    for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained):
        with pytest.raises(PareError, match="LlamaForCausalLM cannot load a packed checkpoint"):
            load(packed)


ALONE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
for read in (LlamaConfig, LlamaForCausalLM, AutoModelForCausalLM, AutoTokenizer):
    try:
        read.from_pretrained(sys.argv[1])
    except Exception as fault:
        print(type(fault).__name__, fault)
"""


def test_a_process_without_our_import_is_told_to_import_it(packed, tokenizer):
    tokenizer.save_pretrained(packed)
    assert AutoTokenizer.from_pretrained(packed)("a").input_ids
    done = subprocess.run([sys.executable, "-c", ALONE, packed], capture_output=True, text=True)
    config, model, auto, tokens = [line for line in done.stdout.splitlines() if line.startswith("ValueError")]
    assert "import paredown.compress" in config == model == tokens and "paredown_llama" in auto


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil(name, value):
    def change(tensors):
        tensors[name].view(-1)[0] = value

    return change


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(f"{LAYER}.values"), "missing tensor"),
        (lambda tensors: tensors.pop("model.norm.weight"), "missing tensor 'model.norm.weight'"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected tensor 'extra'"),
        (spoil(f"{LAYER}.values", float("nan")), f"{LAYER}.values.*NaN"),
        (spoil("model.norm.weight", float("inf")), "model.norm.weight.*NaN or infinite"),
        (spoil(f"{LAYER}.bitmap", 255), f"{LAYER}.bitmap: marks"),
    ],
)
def test_damaged_tensors_are_named(packed, change, said):
    damage(packed, change)
    with pytest.raises(PareError, match=said):
        AutoModelForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"version": 3}, "has format 3.*upgrade paredown"),
        ({"version": 1}, "has format 1.*compress the model again"),
        ({"version": None}, "has format None"),
        ({"version": "2"}, "has format 2"),
        ({"modules": ["a"]}, "modules in config.json is"),
        ({"modules": None}, "modules in config.json is None"),
        ({"verbatim": {"a": 1}}, "verbatim in config.json is"),
        ({"modules": {LAYER: {"kind": "bitmap"}}}, f"{LAYER}.*lacks layout, shape"),
        ({"modules": {LAYER: [1]}}, f"{LAYER}.*spec is"),
    ],
)
def test_settings_of_another_format_or_damaged_ones_are_refused_wherever_they_are_read(packed, settings, said):
    raw = json.loads((packed / "config.json").read_text())["quantization_config"]
    edit_config(packed, quantization_config={**raw, **settings})
    with pytest.raises(PareError, match=said):
        transformers_plugin.packed_modules(load_config(packed))
    with pytest.raises(PareError, match=said):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_packed_model_and_its_config_can_be_pickled_and_copied(packed):
    model = AutoModelForCausalLM.from_pretrained(packed)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin) is type(model) and torch.equal(logits(twin), logits(model))
    config = AutoConfig.from_pretrained(packed)
    assert pickle.loads(pickle.dumps(config)).to_dict() == copy.deepcopy(config).to_dict() == config.to_dict()


UNPICKLE = """
import pickle, sys
assert "transformers" not in sys.modules
model, ids, wanted = pickle.load(open(sys.argv[1], "rb"))
assert type(model).__name__ == "PackedLlamaForCausalLM"
assert float((model(ids, use_cache=False).logits - wanted).abs().max()) < 1e-4
"""


def test_a_spawned_process_unpickles_a_packed_model(packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed)
    (tmp_path / "pickled").write_bytes(pickle.dumps((model, IDS, logits(model))))
    done = subprocess.run([sys.executable, "-c", UNPICKLE, tmp_path / "pickled"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
