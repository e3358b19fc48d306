"""config.json says the same to transformers 5 as before, and to readers of the old keys too."""

import json

import pytest
from transformers import AutoConfig

from paredown.compress.checkpoint.config_file import write_config_file

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
OLD = {  # model type and old keys, as configs on the hub have them
    "llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "yarn": ("qwen2", {"rope_theta": 1e6, "rope_scaling": YARN}),
    "linear": ("llama", {"rope_theta": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "dynamic": ("llama", {"rope_theta": 2e4, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "default": ("mistral", {"rope_theta": 1e6, "rope_scaling": None}),
    "gemma 3": (
        "gemma3_text",
        {"rope_theta": 3e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gemma 3's own": ("gemma3_text", {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}),
    "gpt-neox": ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 20000, "rope_scaling": None}),
    "phi": ("phi", {"rope_theta": 2e4, "partial_rotary_factor": 0.5, "rope_scaling": None}),
    "modernbert": ("modernbert-decoder", {"global_rope_theta": 2e5, "local_rope_theta": 2e4, "rope_scaling": None}),
    "olmo 3": ("olmo3", {"rope_theta": 5e5, "rope_scaling": YARN}),
    "phi 3": ("phi3", {"original_max_position_embeddings": 32, "rope_scaling": {"rope_type": "longrope", **LONG}}),
}


@pytest.fixture
def written(tmp_path):
    """`written(settings, again)`: config.json after it was read and written; `again`: from what transformers 5 saves."""

    def run(settings, again=False):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        if again:
            AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        (tmp_path / "out").mkdir(exist_ok=True)
        write_config_file(config, tmp_path / "out", tmp_path / "config.json", "XForCausalLM")
        found = json.loads((tmp_path / "out" / "config.json").read_text())
        assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == config.rope_parameters
        return found

    return run


@pytest.mark.parametrize("again", [False, True], ids=["from the hub", "from transformers 5"])
@pytest.mark.parametrize("name", OLD)
def test_readers_of_the_old_keys_find_the_same_rope(name, again, written):
    family, old = OLD[name]
    found = written({"model_type": family, **SIZES, **old}, again)
    scaling = old.get("rope_scaling") or {}
    assert {key: found[key] for key in old if key != "rope_scaling"} == {
        k: v for k, v in old.items() if k != "rope_scaling"
    }
    assert scaling.items() <= (found["rope_scaling"] or {}).items()


def test_keys_of_other_readers_are_not_made_up(written):
    found = written({"model_type": "llama", **SIZES, "rope_theta": 5e5, "rope_scaling": LLAMA3}, again=True)
    assert not {"rope_local_base_freq", "rotary_pct", "global_rope_theta"} & set(found)
    assert found["rope_scaling"] == LLAMA3  # and no rope_theta in it


def test_both_names_of_the_dtype_are_written(written):
    assert written({"model_type": "llama", **SIZES, "torch_dtype": "bfloat16"})["dtype"] == "bfloat16"
    assert written({"model_type": "llama", **SIZES, "dtype": "bfloat16"})["torch_dtype"] == "bfloat16"


def test_the_architecture_is_always_named_and_code_never(written):
    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    found = written({"model_type": "llama", **SIZES, "auto_map": code, "_name_or_path": "/home/me"})
    assert found["architectures"] == ["XForCausalLM"] and not {"auto_map", "_name_or_path"} & set(found)
    found = written({"model_type": "llama", **SIZES, "architectures": ["LlamaForCausalLM"]})
    assert found["architectures"] == ["LlamaForCausalLM"]
