"""Every weight matrix of a block is seen as (out, in), and nobody is left out without being named."""

import pytest
import torch
import transformers as t

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import blocks
from paredown.compress.model.targets import matches, select

C = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = t.Qwen3MoeConfig(**C, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
GPT2 = t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)
MAMBA = t.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8)


@pytest.fixture
def first_block(tmp_path, save_model):
    def run(config):
        save_model(tmp_path / "m", config)
        source = ModelSource(tmp_path / "m", "m")
        block = blocks(source)[0]
        source.materialise(block.prefix, block.names)
        return source, block

    return run


def test_a_llama_block_shows_its_seven_linears(first_block):
    source, block = first_block(t.LlamaConfig(**C))
    assert [b.prefix for b in blocks(source)] == ["model.layers.0.", "model.layers.1."]
    shapes = {v.name.removeprefix(block.prefix): v.shape for v in block.views()}
    assert shapes == {
        "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96),
    }  # fmt: skip
    assert block.others() == []


def test_transposed_weights_are_seen_and_assigned_as_out_by_in(first_block):
    _, block = first_block(GPT2)
    view = next(v for v in block.views() if v.name.endswith("c_attn"))
    assert view.shape == (192, 64) and view.module.weight.shape == (64, 192)
    assert torch.equal(view.weight, view.module.weight.T)
    new = torch.arange(192 * 64).view(192, 64).to(view.weight)
    view.assign(new)
    assert torch.equal(view.module.weight, new.T) and view.module.weight.is_contiguous()


def test_each_expert_is_a_view_of_the_fused_weight_and_routers_are_none(first_block):
    source, block = first_block(MOE)
    names = [v.name.removeprefix(block.prefix) for v in block.views()]
    assert [n for n in names if "gate_up_proj" in n] == [f"mlp.experts.gate_up_proj.{e}" for e in range(4)]
    view = next(v for v in block.views() if v.name.endswith("down_proj.2"))
    fused = source.model.model.layers[0].mlp.experts.down_proj
    before = fused.clone()
    assert view.shape == (64, 32) and view.owner == "model.layers.0.mlp.experts.down_proj"
    view.assign(torch.zeros(64, 32, dtype=torch.bfloat16))
    assert not fused[2].any() and torch.equal(fused[[0, 1, 3]], before[[0, 1, 3]])
    assert not any(n.endswith("mlp.gate") for n in names)
    assert block.others() == ["model.layers.0.mlp.gate.weight"]


def test_matrices_of_a_state_space_block_that_no_method_sees_are_named(first_block):
    _, block = first_block(MAMBA)
    assert {v.name.rpartition(".")[2] for v in block.views()} == {"in_proj", "x_proj", "out_proj"}
    assert {"mixer.A_log", "mixer.conv1d.weight", "mixer.dt_proj.weight"} <= {
        n.removeprefix(block.prefix) for n in block.others()
    }


@pytest.mark.parametrize(
    ("name", "pattern", "yes"),
    [
        ("model.layers.0.mlp.up_proj", "*", True),
        ("model.layers.0.mlp.up_proj", "up_proj", True),
        ("model.layers.0.mlp.up_proj", "mlp", True),
        ("model.layers.0.mlp.up_proj", "layers.0.*", True),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", True),
        ("model.layers.10.mlp.up_proj", "layers.1", False),
        ("model.layers.0.mlp.up_proj", "up", False),
        ("model.layers.0.mlp.gate_up_proj", "up_proj", False),
        ("model.layers.0.mlp.gate_up_proj", "*up_proj", True),
        ("model.layers.0.mlp.up_proj", "mlp.up_*", True),
    ],
)
def test_a_pattern_matches_whole_parts_of_a_name(name, pattern, yes):
    assert matches(name, pattern) is yes


def test_selected_and_left_out_are_all_and_a_pattern_without_a_match_is_an_error(first_block):
    _, block = first_block(t.LlamaConfig(**C))
    views = block.views()
    chosen, left = select(views, ["*"], ["q_proj", "k_proj", "lm_head"], "lm_head")
    assert [v.name.rpartition(".")[2] for v in left] == ["q_proj", "k_proj"] and len(chosen) == 5
    with pytest.raises(PareError, match=r"'dwn_proj' matches no linear layer. Did you mean 'down_proj'\?.*up_proj"):
        select(views, ["dwn_proj"], [], "lm_head")
