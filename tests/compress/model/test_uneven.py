"""Models whose blocks keep numbers of units of their own, or lack a part: what is read of them, proved, and refused."""

import pytest
import torch
import transformers as t
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from paredown.compress import PareError
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.model.blocks import blocks
from paredown.compress.model.uneven import uneven
from paredown.compress.shape_job import find_groups

S = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
GPT2 = t.GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=4, n_inner=24, n_positions=64)
OPT = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
# by family: its config, and the shapes of the first block's parameters with 20 of 24 units
FAMILIES = {
    "llama": (
        t.LlamaConfig(**S),
        {"gate_proj.weight": (20, 16), "up_proj.weight": (20, 16), "down_proj.weight": (16, 20)},
    ),
    "gpt2": (GPT2, {"c_fc.weight": (16, 20), "c_fc.bias": (20,), "c_proj.weight": (20, 16)}),
    "phi3": (t.Phi3Config(**S), {"gate_up_proj.weight": (40, 16), "down_proj.weight": (16, 20)}),
    "qwen3": (
        t.Qwen3Config(**S, head_dim=8),
        {"gate_proj.weight": (20, 16), "up_proj.weight": (20, 16), "down_proj.weight": (16, 20)},
    ),
    "opt": (
        t.OPTConfig(**OPT, word_embed_proj_dim=16),
        {"fc1.weight": (20, 16), "fc1.bias": (20,), "fc2.weight": (16, 20)},
    ),
}


@pytest.fixture
def source_of(tmp_path, save_model):
    def of(config, dtype=torch.bfloat16):
        save_model(tmp_path / "m", config, dtype)
        source = ModelSource(tmp_path / "m", "m")
        return source, blocks(source)

    return of


def groups_of(source, all_blocks):
    return [group for found in find_groups(source, all_blocks, uneven=True).values() for group in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_group_gets_a_number_of_units_of_its_own_and_only_those_that_differ_are_told(family, source_of):
    config, expected = FAMILIES[family]
    source, all_blocks = source_of(config)
    groups = groups_of(source, all_blocks)
    assert [group.units for group in groups] == [24] * 3 and {group.config_key for group in groups} == {""}
    small = uneven(source, {groups[0].name: 20, groups[1].name: 24}, groups)
    assert small.shapes.sizes == {f"{groups[0].name}.{name}": shape for name, shape in expected.items()}
    stored = small.config.quantization_config
    assert stored["sizes"] == {name: list(shape) for name, shape in small.shapes.sizes.items()}
    assert (
        stored["modules"] == {}
        and "absent" not in stored
        and small.config.model_type == f"paredown_{config.model_type}"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_may_lack_attention_and_narrow_what_is_left(family, source_of):
    source, all_blocks = source_of(FAMILIES[family][0])
    attention = next(name for name in ("self_attn", "attn") if hasattr(all_blocks[1].module, name))
    groups, gone = groups_of(source, all_blocks), f"{all_blocks[1].prefix}{attention}"
    small = uneven(source, {group.name: 16 for group in groups}, groups, [gone])
    assert small.shapes.absent == (gone,) and small.config.quantization_config["absent"] == [gone]
    names = set(source.model.state_dict())
    assert set(small.model.state_dict()) == {name for name in names if not name.startswith(f"{gone}.")}
    assert all(parameter.is_meta for parameter in small.model.parameters())


def test_the_units_of_an_absent_mlp_are_not_counted(source_of):
    source, all_blocks = source_of(FAMILIES["llama"][0])
    small = uneven(source, {"model.layers.1.mlp": 8}, groups_of(source, all_blocks), ["model.layers.1.mlp"])
    assert not small.shapes.sizes and small.shapes.absent == ("model.layers.1.mlp",)


def test_a_class_that_reads_sizes_from_its_config_is_refused_by_name(source_of, monkeypatch):
    def forward(self, hidden_states):
        up = self.gate_up_proj(hidden_states)
        gate, up = up[..., : self.config.intermediate_size], up[..., self.config.intermediate_size :]
        return self.down_proj(up * self.activation_fn(gate))

    source, all_blocks = source_of(FAMILIES["phi3"][0])
    groups = groups_of(source, all_blocks)
    monkeypatch.setattr(Phi3MLP, "forward", forward)
    with pytest.raises(PareError, match=r"model.layers.1.mlp of a phi3 model fails"):
        uneven(source, {groups[1].name: 16}, groups)


@pytest.mark.parametrize(
    ("config", "gone", "why"),
    [
        (FAMILIES["llama"][0], "model.layers.0.self_attn", "self_attn cannot be left out: it lies in the first block"),
        (
            t.Gemma2Config(**S, head_dim=8),
            "model.layers.1.self_attn",
            "cannot be left out: it lies in the first block of its kind",
        ),
        (
            t.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=4),
            "transformer.h.1.mlp",
            "transformer.h.1.mlp hands on the residual stream",
        ),
    ],
    ids=["first block", "first of its kind", "residual stream"],
)
def test_a_part_that_the_model_cannot_do_without_is_refused(config, gone, why, source_of):
    source, _ = source_of(config, torch.float32)
    with pytest.raises(PareError, match=why):
        uneven(source, {}, [], [gone])
    if "layers.0" in gone:  # its MLP has no cache
        assert uneven(source, {}, [], ["model.layers.0.mlp"]).shapes.absent


def test_experts_of_single_blocks_cannot_differ_in_number(source_of):
    source, all_blocks = source_of(
        t.Qwen3MoeConfig(**S, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    )
    (group, *_), *_ = find_groups(source, all_blocks, "experts", uneven=True).values()
    with pytest.raises(PareError, match=r"model.layers.0.mlp.*reads its sizes from the config"):
        uneven(source, {group.name: 2}, [group])
