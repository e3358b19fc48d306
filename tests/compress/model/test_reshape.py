"""A model without some blocks is the same model with these blocks skipped, or refused by name."""

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model import blocks as model_blocks
from paredown.compress.model import reshape
from paredown.compress.model.blocks import blocks
from paredown.compress.model.reshape import in_files, reshaped

IDS = families.IDS[:2]
SIX = {"num_hidden_layers": 6}
SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = [SLIDING, FULL, SLIDING, SLIDING, FULL, FULL]
CHUNKED, ROPE = ["chunked_attention", FULL] * 3, [1, 0] * 3
KEPT = [0, 1, 4, 5]

# name, what its config says besides, blocks that stay, settings of the smaller config that were not copied
WORKS = [
    ("llama tied", SIX, KEPT, {"num_hidden_layers": 4}),
    ("qwen3", SIX, KEPT, {"num_hidden_layers": 4}),
    ("qwen2 sliding", {**SIX, "max_window_layers": 3}, KEPT, {"layer_types": [FULL, FULL, SLIDING, SLIDING]}),
    ("gemma2", {"layer_types": MIXED}, [0, 1, 3, 5], {"layer_types": [SLIDING, FULL, SLIDING, FULL]}),
    ("gemma3_text", {"layer_types": MIXED}, KEPT, {"layer_types": [SLIDING, FULL, FULL, FULL]}),
    ("gemma3", {"text_config": {"layer_types": MIXED}}, KEPT, {"layer_types": [SLIDING, FULL, FULL, FULL]}),
    ("cohere2", {"layer_types": MIXED}, KEPT, {"layer_types": [SLIDING, FULL, FULL, FULL]}),
    ("smollm3", {**SIX, "no_rope_layers": [1, 0, 1, 1, 0, 1]}, KEPT, {"no_rope_layers": [1, 0, 0, 1]}),
    ("mixtral", SIX, KEPT, {"num_hidden_layers": 4}),
    ("deepseek_v3", {**SIX, "first_k_dense_replace": 3}, [0, 2, 3, 5], {"first_k_dense_replace": 2}),
    ("qwen2_moe", {**SIX, "mlp_only_layers": [0, 4]}, KEPT, {"mlp_only_layers": [0, 2]}),
    (
        "qwen2_moe",
        {**SIX, "decoder_sparse_step": 2},
        [0, 1, 3, 4],
        {"mlp_only_layers": [0, 3], "decoder_sparse_step": 1},
    ),
    (
        "llama4_text",
        {"layer_types": CHUNKED, "moe_layers": [1, 5], "no_rope_layers": ROPE},
        KEPT,
        {"moe_layers": [1, 3]},
    ),
    ("gpt2", {"n_layer": 6}, KEPT, {"n_layer": 4}),
    ("gpt_neo", {"num_layers": 6, "attention_types": [[["global", "local"], 3]]}, KEPT, {"num_layers": 4}),
    ("gpt_neox", SIX, KEPT, {"num_hidden_layers": 4}),
    ("falcon", SIX, KEPT, {"num_hidden_layers": 4}),
    ("minicpm3", SIX, KEPT, {"num_hidden_layers": 4}),
    ("longcat_flash", {"num_layers": 4, "num_hidden_layers": 8}, [0, 3], {"num_layers": 2, "num_hidden_layers": 4}),
    ("granitemoehybrid", {"layer_types": ["mamba", "attention"] * 3}, [0, 2, 3, 4], {"num_hidden_layers": 4}),
    ("bamba", {**SIX, "attn_layer_indices": [1, 4]}, KEPT, {"attn_layer_indices": [1, 2]}),
    ("jamba", SIX, KEPT, {"num_hidden_layers": 4}),
    ("mamba", SIX, KEPT, {"num_hidden_layers": 4}),
]

REFUSED = [
    ("jamba", SIX, [0, 2, 3, 5], "model.layers.2 is JambaMambaDecoderLayer now and would be JambaAttentionDecoderLayer"),
    ("gpt2", {"n_layer": 6, "scale_attn_by_inverse_layer_idx": True}, KEPT, "transformer.h.4.attn.scaling is 0.05 now"),
    ("diffllama", SIX, KEPT, r"model.layers.4.self_attn.lambda_init is 0.6\d* now and would be 0.4"),
    ("minimax", {"layer_types": ["linear_attention", FULL] * 3}, KEPT, "self_attn.num_hidden_layers is 6 now"),
    ("gemma3n_text", {}, [0, 1, 3], "without the blocks 2: .*types producing a cache"),
    ("zamba2", {}, [0, 2, 3], "layers.3.shared_transformer.* of a block that stays is the same tensor as .*layers.1"),
    ("beam", {"layer_types": MIXED, "mlp_layer_types": ["dense"] * 6}, KEPT, "model.layers.4 would give other outputs"),
    ("zaya", SIX, KEPT, "the argument .* of model.layers.4 is an output of block 3 now"),
]  # fmt: skip


def save(folder, name, changes):
    """A tiny float32 model of a family."""
    torch.manual_seed(0)
    config = families.tiny_config(name, **changes)
    families.class_of(name)._from_config(config, dtype=torch.float32).save_pretrained(folder)
    return ModelSource(folder, name)


def write(source, small, folder):
    """The smaller checkpoint, as the source's files hold it."""
    folder.mkdir()
    names = [name for name in source.parameters if small.renamed(name) is not None]
    stored = {in_files(source, small, key): t for key, t in source.as_stored(names, {})}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    small.config.save_pretrained(folder)


@torch.no_grad()
def logits_without(folder, gone):
    """Those of the dense model, each of whose blocks in `gone` returns what it is given."""

    def skip(module, args, kwargs, output):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    model = families.load(folder)
    for i in gone:
        model_blocks._decoder(model)[1][i].register_forward_hook(skip, with_kwargs=True)
    return families.logits_of(model, IDS)


@pytest.mark.parametrize(("name", "changes", "kept", "settings"), WORKS)
def test_the_smaller_model_is_the_model_with_blocks_skipped(name, changes, kept, settings, tmp_path):
    source = save(tmp_path / "model", name, changes)
    small = reshaped(source, kept, {})
    assert small.kept == tuple(kept) and [block.index for block in small.blocks] == kept
    assert small.config.model_type == source.config.model_type
    text = small.config.get_text_config()
    assert {key: getattr(text, key) for key in settings} == settings
    write(source, small, tmp_path / "small")
    gone = [block.index for block in blocks(source) if block.index not in kept]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", experts_implementation="eager").eval()
    torch.testing.assert_close(families.logits_of(loaded, IDS), logits_without(tmp_path / "model", gone))
    shapes = {n: t.shape for n, t in loaded.state_dict().items()}
    assert shapes == {n: t.shape for n, t in small.model.state_dict().items()}
    assert all(t.device.type == "meta" for t in small.model.state_dict().values())


@pytest.mark.parametrize(("name", "changes", "kept", "why"), REFUSED)
def test_blocks_that_no_config_describes_are_refused_by_name(name, changes, kept, why, tmp_path):
    source = save(tmp_path / "model", name, changes)
    with pytest.raises(PareError, match=why):
        reshaped(source, kept, {})


def test_a_block_of_another_kind_is_noticed(tmp_path, monkeypatch):
    source = save(tmp_path / "model", "gemma3_text", {"layer_types": MIXED})
    options = reshape.options

    def wrong(text, kept, count):
        return options(text, kept, count) | {"layer_types": [[SLIDING, FULL, SLIDING, FULL]]}

    monkeypatch.setattr(reshape, "options", wrong)
    with pytest.raises(PareError, match=r"model.layers.4.*full_attention.* now and would be .*sliding_attention"):
        reshaped(source, KEPT, {})


def test_units_change_the_shapes_that_they_count_and_nothing_else(tmp_path):
    source = save(tmp_path / "model", "llama", SIX)
    small = reshaped(source, range(6), {"intermediate_size": 64})
    shapes = {name: tuple(t.shape) for name, t in small.blocks[3].module.state_dict().items()}
    assert shapes["mlp.gate_proj.weight"] == (64, 64) and shapes["mlp.down_proj.weight"] == (64, 64)
    assert small.config.intermediate_size == 64 and source.config.intermediate_size == 96
    both = reshaped(source, KEPT, {"intermediate_size": 32})
    assert [block.prefix for block in both.blocks] == [f"model.layers.{i}." for i in range(4)]
    assert both.blocks[2].index == 4 and both.blocks[2].module.mlp.up_proj.weight.shape == (32, 64)
    with pytest.raises(PareError, match=r"head_dim 8: model.layers.0.self_attn.scaling is 0.25 now"):
        reshaped(source, range(6), {"head_dim": 8})


def test_of_two_numbers_in_a_name_the_blocks_own_is_changed(tmp_path):
    source = save(tmp_path / "model", "mixtral", SIX)
    small = reshaped(source, [1, 3], {})
    expert = "model.layers.3.block_sparse_moe.experts.3.w1.weight"
    assert expert in source.files.entries
    assert in_files(source, small, expert) == "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    assert in_files(source, small, "model.layers.2.input_layernorm.weight") is None
    assert in_files(source, small, "lm_head.weight") == "lm_head.weight"
    assert small.renamed("model.layers.3.mlp.experts.down_proj") == "model.layers.1.mlp.experts.down_proj"
    assert small.renamed("model.layers.0.mlp.experts.down_proj") is None


def test_files_may_name_blocks_without_the_prefix_of_the_class(tmp_path):
    save(tmp_path / "model", "gpt2", {"n_layer": 4})
    path = tmp_path / "model" / "model.safetensors"
    stored = {name.removeprefix("transformer."): t.clone() for name, t in load_file(path).items()}
    stored |= {f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4).tril() for i in range(4)}  # as old files have them
    save_file(stored, path, metadata={"format": "pt"})
    source = ModelSource(tmp_path / "model", "m")
    small = reshaped(source, [0, 3], {})
    assert in_files(source, small, "h.3.mlp.c_fc.weight") == "h.1.mlp.c_fc.weight"
    assert "h.3.attn.bias" in source.verbatim and not small.dropped_verbatim
    assert [in_files(source, small, f"h.{i}.attn.bias") for i in range(4)] == [
        "h.0.attn.bias",
        None,
        None,
        "h.1.attn.bias",
    ]
    assert small.renamed("transformer.h.3.ln_1.weight") == "transformer.h.1.ln_1.weight"


def test_layers_of_multi_token_prediction_are_left_out_with_a_remark(tmp_path):
    save(tmp_path / "model", "deepseek_v3", {**SIX, "num_nextn_predict_layers": 1})
    path = tmp_path / "model" / "model.safetensors"
    stored = load_file(path)
    extra = {name.replace("layers.5.", "layers.6."): t.clone() for name, t in stored.items() if "layers.5." in name}
    extra |= {"model.layers.6.eh_proj.weight": torch.zeros(64, 128)}
    save_file({**stored, **extra}, path, metadata={"format": "pt"})
    source = ModelSource(tmp_path / "model", "m")
    small = reshaped(source, KEPT, {})
    assert sorted(small.dropped_verbatim) == sorted(extra) and small.config.num_nextn_predict_layers == 0
    assert len(small.remarks) == 1 and f"{len(extra)} tensors of layers after the last block" in small.remarks[0]


@pytest.mark.parametrize("kept", [[], [3, 1], [1, 1], [4, 6], [-1, 2]])
def test_blocks_that_are_not_there_cannot_be_kept(kept, tmp_path):
    source = save(tmp_path / "model", "llama", SIX)
    with pytest.raises(PareError, match="of 6 cannot be kept: name each once, in order, from 0 to 5"):
        reshaped(source, kept, {})


def test_a_packed_model_is_refused(tmp_path):
    source = save(tmp_path / "model", "llama", SIX)
    source.modules = {"model.layers.0.mlp.up_proj": None}
    with pytest.raises(PareError, match="is packed, and an ordinary smaller model cannot be made"):
        reshaped(source, KEPT, {})
