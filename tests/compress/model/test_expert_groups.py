"""Experts are found by trying, with all that has an entry for each of them, and what cannot lose some is refused by name."""

import families as tiny
import pytest
import torch
from transformers import DeepseekV3Config

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import blocks
from paredown.compress.model.expert_groups import check_chosen, check_experts, expert_groups
from paredown.compress.model.groups import sliced
from paredown.compress.model.reshape_keys import with_units
from paredown.compress.model.stream import start
from paredown.compress.shape_job import find_groups

FUSED = "experts.gate_up_proj experts.down_proj"
# what has an entry for each expert, within the module that holds them, with the key of their number
FOUND = {
    f"{FUSED} gate.weight = num_local_experts": "mixtral qwen3_moe mellum minimax qwen3_vl_moe",
    f"{FUSED} gate.weight = num_experts": """
        olmoe qwen2_moe qwen3_next flex_olmo cohere2_moe qwen3_5_moe qwen3_5_moe_text qwen4_exp qwen4_exp_text
    """,
    f"{FUSED} gate.weight = n_routed_experts": "deepseek_v2 mistral4 mistral_large4 unlimited_ocr",
    f"{FUSED} gate.e_score_correction_bias gate.weight = n_routed_experts": """
        deepseek_v3 axk1 axk2 deepseek_v32 dots1 dots3_note dots3_note_text glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa
        hy_v4 mimo_v2_flash solar_open
    """,
    f"{FUSED} gate.e_score_correction_bias gate.weight = num_experts": """
        kimi_linear bailing_hybrid beam exaone_moe laguna
    """,
    f"{FUSED} gate.e_score_correction_bias gate.weight = num_local_experts": "kolibri1 minimax_m3_vl minimax_m3_vl_text",
    "experts.gate_up_proj experts.gate_up_proj_bias experts.down_proj experts.down_proj_bias router.bias router.weight = "
    "num_local_experts": "gpt_oss",
    f"{FUSED} router.weight = num_local_experts": """
        llama4_text llama4 phimoe granitemoe granitemoe_swa granitemoehybrid granitemoeshared
    """,
    f"{FUSED} router.weight = moe_num_experts": "aria aria_text",
    f"{FUSED} gate.moe_statics.e_score_correction_bias gate.weight = moe_num_experts": "ernie4_5_moe",
    f"{FUSED} gate.wg.weight = num_experts": "hunyuan_v1_moe",
    f"{FUSED} e_score_correction_bias gate.weight = num_local_experts": "minimax_m2",
    f"{FUSED} e_score_correction_bias gate.weight = num_experts": "hy_v3",
    f"{FUSED} expert_bias gate.weight = num_experts": "lfm2_moe",
    f"{FUSED} expert_bias router.gate.weight = num_experts": "afmoe",
    f"{FUSED} gate.balancing_biases gate.router_mlp.out_proj.weight = num_experts": "zaya",
    "experts.up_proj experts.down_proj gate.e_score_correction_bias gate.weight = n_routed_experts": "nemotron_h",
}
DAILY = [
    "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "ernie4_5_moe", "minimax_m2", "zaya", "nemotron_h",
]  # fmt: skip
RARE = sorted({name for names in FOUND.values() for name in names.split()} - set(DAILY))


def source_of(family, folder):
    model = tiny.build(family)
    model.save_pretrained(folder)
    return model, ModelSource(folder, family)


@pytest.mark.parametrize("family", [*DAILY, *(pytest.param(f, marks=pytest.mark.all_families) for f in RARE)])
@torch.no_grad()
def test_the_experts_of_a_family_are_found_and_a_smaller_config_fits_them(family, tmp_path):
    expected = next(parts for parts, names in FOUND.items() if family in names.split())
    model, source = source_of(family, tmp_path)
    groups = [group for found in find_groups(source, blocks(source), "experts").values() for group in found]
    config, weights = model.config, model.state_dict()
    for group in groups:
        within = " ".join(part.name.removeprefix(f"{group.name}.") for part in group.parts)
        assert f"{within} = {group.config_key}" == expected and group.units == 4 and group.kind == "experts"
        assert group.inner[-1].name.endswith("down_proj") and len({part.name for part in group.inner}) >= 2
        keep = torch.tensor([True, False, True, True])
        for part in group.parts:
            weights[part.name] = sliced(weights[part.name], [part], keep)
        config = with_units(config, group.config_key, 3)
    small = tiny.class_of(family)._from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    small.load_state_dict(weights)
    assert tiny.logits_of(small).isfinite().all()


def test_a_model_without_experts_is_refused_by_name(tmp_path):
    _, source = source_of("llama", tmp_path)
    with pytest.raises(PareError, match="no block of this llama model has experts"):
        find_groups(source, blocks(source), "experts")


def test_experts_that_lie_in_groups_are_refused_by_name():
    with pytest.raises(PareError, match=r"deepseek_v3 model lie in 2 groups \(n_group\)"):
        check_experts(DeepseekV3Config(n_group=2, topk_group=1), "deepseek_v3")
    check_experts(DeepseekV3Config(n_group=1, topk_group=1), "deepseek_v3")


def test_no_fewer_experts_stay_than_a_token_gets():
    config = DeepseekV3Config(n_routed_experts=8, num_experts_per_tok=2)
    check_chosen(config, "n_routed_experts", 2)
    with pytest.raises(PareError, match=r"of the 8 experts \(n_routed_experts\) 1 would stay, and each token gets 2"):
        check_chosen(config, "n_routed_experts", 1)


@torch.no_grad()
def test_experts_that_are_told_apart_by_more_than_their_parameters_are_in_no_group(tmp_path):
    _, source = source_of("mixtral", tmp_path)
    stream, block = start(source, tiny.IDS[:1]), blocks(source)[0]
    with source.loaded(block):
        assert len(expert_groups(stream, block)) == 1
        gate = block.module.mlp.gate
        plain = gate.forward

        def first_counts_double(x):
            logits, weights, index = plain(x)
            return logits, weights * (1 + index.eq(0)), index

        gate.forward = first_counts_double
        assert expert_groups(stream, block) == []
        del gate.forward
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.module.modules())


@torch.no_grad()
def test_a_shared_expert_as_wide_as_there_are_experts_is_no_part(tmp_path):
    model = tiny.class_of("qwen2_moe")._from_config(
        tiny.tiny_config("qwen2_moe", shared_expert_intermediate_size=4), dtype=torch.float32
    )
    model.save_pretrained(tmp_path)
    source = ModelSource(tmp_path, "qwen2_moe")
    stream, block = start(source, tiny.IDS[:1]), blocks(source)[0]
    with source.loaded(block):
        (group,) = expert_groups(stream, block)
    assert not any("shared" in part.name for part in group.parts) and len(group.parts) == 3
