"""Every weight and buffer comes in the dtype, and with the values, that `from_pretrained` gives it."""

from dataclasses import fields

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import TensorFiles

SIZES = {
    **dict.fromkeys(["vocab_size"], 128),
    **dict.fromkeys(["hidden_size", "n_embd"], 32),
    **dict.fromkeys(["intermediate_size", "n_inner", "mamba_d_ssm"], 64),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "v_head_dim", "qk_nope_head_dim", "mamba_d_head", "kv_channels", "q_lora_rank"], 16),
    **dict.fromkeys(["kv_lora_rank", "state_size", "mamba_d_state", "chunk_size", "mamba_chunk_size"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim", "mamba_dt_rank", "mamba_n_heads", "attention_head_dim"], 8),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["moe_intermediate_size"], 16),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts", "mamba_n_groups"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx"], 32),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]}, "hunyuan_v1_moe": {"attention_head_dim": 16}, "gptj": {}, "codegen": {"n_head": 4, "rotary_dim": 4},
    "deepseek_v3": {}, "falcon_h1": {"mamba_n_heads": 4}, "jamba": {}, "ernie4_5_moe": {}, "gpt_oss": {}, "gemma3_text": {}, "bloom": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1}, "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2},
    "glm4_moe": {}, "llama4_text": {}, "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 2},
}  # fmt: skip


def built(family, folder, dtype):
    """A checkpoint of a tiny random model of a family."""
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[family]
    sizes = {f.name: SIZES[f.name] for f in fields(config_class) if f.name in SIZES}
    model = t.AutoModelForCausalLM.from_config(config_class(**{**sizes, **FAMILIES[family]}), dtype=dtype)
    for name, weight in model.state_dict().items():
        if "bias" in name and weight.is_floating_point():
            weight.copy_(torch.randn(weight.shape))  # which no dtype but its own can hold
    model.save_pretrained(folder)
    return folder


def tensors(model):
    """All parameters and buffers by name, those of tied modules under both names."""
    return {
        f"{path}.{name}": tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


def assert_as_from_pretrained(folder, dtype):
    source = ModelSource(folder, "m", dtype=dtype)
    source.materialise("", source.parameters)
    ours, theirs = tensors(source.model), tensors(t.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    ours |= {copy: ours[original] for copy, original in source.tied.items()}
    assert set(ours) == set(theirs)
    for name, wanted in theirs.items():
        assert ours[name].dtype == wanted.dtype, name
        assert torch.equal(ours[name], wanted), name


@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes_and_values_are_those_of_from_pretrained(family, tmp_path):
    assert_as_from_pretrained(built(family, tmp_path, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("family", ["gpt_oss", "ernie4_5_moe", "gptj"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_another_compute_dtype_is_followed_too(family, dtype, tmp_path):
    assert_as_from_pretrained(built(family, tmp_path, torch.bfloat16), dtype)


def test_a_part_that_the_class_keeps_in_float32_is_float32_even_where_it_is_stored_in_bfloat16(tmp_path):
    path = built("hunyuan_v1_moe", tmp_path, torch.bfloat16) / "model.safetensors"
    save_file({name: w.bfloat16() for name, w in load_file(path).items()}, path, metadata={"format": "pt"})
    assert_as_from_pretrained(tmp_path, torch.bfloat16)
    source = ModelSource(tmp_path, "m")
    source.materialise("", source.parameters)
    assert source.model.model.layers[0].mlp.gate.wg.weight.dtype == torch.float32


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_what_is_written_keeps_its_stored_dtype(format, tmp_path, prune, tokenizer):
    tokenizer.save_pretrained(built("lfm2_moe", tmp_path / "model", torch.bfloat16))
    prune(tmp_path / "model", tmp_path / "out", format=format, method="magnitude")
    before, after = TensorFiles(tmp_path / "model").entries, TensorFiles(tmp_path / "out").entries
    kept = {name: entry.dtype for name, entry in before.items() if name in after}
    assert {after[name].dtype for name in kept} == {torch.float32, torch.bfloat16}
    assert kept == {name: after[name].dtype for name in kept}
    name = next(name for name in kept if "expert_bias" in name)
    read = [TensorFiles(tmp_path / folder).read([name])[name] for folder in ("model", "out")]
    assert read[0].dtype == torch.float32 and torch.equal(*read)
