"""Layers that control others are known by their role, and are compressed only if a recipe names them."""

import families as tiny
import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.model.blocks import Block
from paredown.compress.model.targets import control, control_counts
from paredown.compress.recipe import Recipe

CONTROLS = {
    "afmoe": {"mlp.router.gate"},
    "bailing_hybrid": {"self_attn.forget_gate.f_proj", "self_attn.b_proj", "self_attn.g_proj"},
    "dbrx": {"ffn.router.layer"},
    "deepseek_v32": {f"self_attn.indexer.{part}" for part in ("wq_b", "wk", "weights_proj")},
    "gemma3n_text": {f"altup.{part}" for part in ("correction_coefs", "prediction_coefs", "modality_router")},
    "hunyuan_v1_moe": {"mlp.gate.wg"},
    "jetmoe": {"mlp.router.layer", "self_attention.experts.router.layer"},
    "kimi_linear": {"self_attn.forget_gate.f_a_proj", "self_attn.forget_gate.f_b_proj", "self_attn.b_proj"},
    "llama4_text": {"feed_forward.router"},
    "longcat_flash": {"mlp.router.classifier"},
    "olmo_hybrid": {"linear_attn.a_proj", "linear_attn.b_proj"},
    "qwen3_next": {"linear_attn.in_proj_ba", "mlp.shared_expert_gate"},
    "xlstm": {"mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"},
    "zaya": {"mlp.gate.down_proj", *(f"mlp.gate.router_mlp.{part}" for part in ("fc1", "fc2", "out_proj"))},
    **{name: set() for name in ("llama", "gpt2", "bloom", "falcon", "mamba2", "falcon_h1", "bamba", "gpt_oss")},
}


def controls(family):
    """Names within their block of the layers with a control, without numbers of experts."""
    config = tiny.tiny_config(family)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    layers = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    found = [Block(0, "b.", layer, control_counts(config)).views() for layer in layers]
    return {view.name.removeprefix("b.") for views in found for view in views if view.control}


@pytest.mark.parametrize("family", CONTROLS)
def test_layers_that_control_others_are_known_by_their_role(family):
    assert controls(family) == CONTROLS[family]


@pytest.mark.parametrize(
    ("path", "shape", "controls_others"),
    [
        ("mlp.gate", (8, 64), True),  # as many outputs as there are experts
        ("mlp.gate_proj", (96, 64), False),
        ("self_attn.k_proj", (8, 64), False),  # a projection, of however few heads
        ("mlp.shared_expert_gate", (1, 64), True),
        ("ssm.ba", (32, 128), True),  # two for each of 16 heads
        ("laurel.linear_left", (30, 128), False),
        ("tiny.proj", (8, 16), False),
    ],
)
def test_a_few_outputs_are_one_for_each_expert_or_head(path, shape, controls_others):
    assert (control(path, ["Linear"] * 2, shape, frozenset({8, 9, 16, 32})) is not None) == controls_others


def test_a_recipe_that_names_them_targets_them_and_a_wider_pattern_does_not(tmp_path):
    tiny.save("qwen3_next", tmp_path)
    source = ModelSource(tmp_path / "bfloat16", "m")

    def chosen(**targets):
        job = resolve_job(source, Recipe.parse({"method": "wanda", "targets": targets}))
        assert {v.name for v in job.targets} | {v.name for v in job.left_out} == every
        return {view.name for view in job.targets if view.control}

    job = resolve_job(source, Recipe.parse({"method": "wanda"}))
    every = {view.name for view in [*job.targets, *job.left_out]}
    gates = {name for name in every if name.endswith("shared_expert_gate")}
    assert gates and not chosen() and not chosen(include=["mlp.*"]) and not chosen(include=["*gate*"])
    assert chosen(include=["shared_expert_gate"]) == chosen(include=["*", "shared_expert_gate"]) == gates
    assert not chosen(include=["*", "shared_expert_gate"], skip=["shared_expert_gate"])
    with pytest.raises(PareError, match="matches no linear layer"):
        chosen(include=["shared_gate"])


def test_a_layer_that_no_gradient_reaches_stays_dense_and_is_named(tmp_path, prune):
    tiny.save("deepseek_v32", tmp_path)
    recipe = {"method": "paredown_lowrank", "options": {"kept": 0.8}, "targets": {"include": ["*", "indexer"]}}
    result, _ = prune(tmp_path / "float32", tmp_path / "out", text=tiny.TEXT, **recipe)
    told = {said.partition(":")[0] for said in result.fallbacks if "no gradient of the loss reaches it" in said}
    assert told and all(".indexer." in name for name in told)
    assert not told & {layer["name"] for layer in result.layers} and len(result.layers) > 10
