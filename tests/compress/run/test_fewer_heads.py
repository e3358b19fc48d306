"""Runs that remove key/value heads with their query heads: ordinary smaller models that compute what they say."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as t
import yaml
from transformers import AutoModelForCausalLM

from paredown.compress import PareError, plan
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.model.narrower import check_narrower
from paredown.compress.model.reshape import reshaped
from paredown.compress.recipe import Recipe
from paredown.compress.shape_job import resolve
from paredown.evaluation.schema import check_report

# nine query heads share three keys and values, and the hidden size says nothing of a head's
SIZES = {
    "vocab_size": 320, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256,
    "pad_token_id": 256,
}  # fmt: skip
NO_SIZE = {**SIZES, "hidden_size": 72}  # of a head: it is what the hidden size leaves for each of nine
del NO_SIZE["head_dim"]
EXPERTS = {
    "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
CONFIGS = {
    "llama": t.LlamaConfig(**SIZES),
    "qwen3": t.Qwen3Config(**SIZES),  # with a norm of each head
    "phi3": t.Phi3Config(**NO_SIZE),  # one matrix for queries, keys and values
    "gpt_oss": t.GptOssConfig(**SIZES, **EXPERTS),  # with sinks
}
HYBRID = {**SIZES, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
# with a state space, its unit, what says how many there are, and what one has of other things
STATE_SPACES = {
    "falcon_h1": (
        t.FalconH1Config(
            **HYBRID, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=1,
            mamba_chunk_size=8,
        ),
        6, {"mamba_n_heads": [8, 6], "mamba_d_ssm": [64, 48]},
    ),
    "nemotron_h": (
        t.NemotronHConfig(
            **{k: v for k, v in HYBRID.items() if k != "num_hidden_layers"}, layers_block_type=["mamba", "attention"],
            mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=16, n_groups=4, chunk_size=8,
        ),
        3, {"n_groups": [4, 3], "mamba_num_heads": [8, 6]},
    ),
    "qwen3_next": (
        t.Qwen3NextConfig(
            **HYBRID, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
            linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=0,
        ),
        1, {"linear_num_key_heads": [2, 1], "linear_num_value_heads": [4, 2]},
    ),
}  # fmt: skip
ALONE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
errors = []
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    probe = json.load(open(folder + "/paredown.json"))["probe"]
    ids = torch.tensor([probe["ids"]])
    nll = -model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    errors.append(float((nll - torch.tensor(probe["nll"])).abs().max()))
    assert model.generate(ids[:, :4], max_new_tokens=2, do_sample=False).shape[1] == 6
assert not [name for name in sys.modules if name.startswith("paredown")]
print(max(errors))
"""
FORM = "num_key_value_heads 2 in place of 3 and num_attention_heads 6 in place of 9"


def recipe(method="paredown_width", **options):
    return {"method": method, "options": {"units": 2, "unit": "kv_groups", **options}}


def test_what_comes_out_loads_without_us_and_scores_what_the_run_saw(save_model, run_raw, tmp_path):
    outs = []
    for family in ("qwen3", "phi3", "gpt_oss"):
        save_model(tmp_path / family, CONFIGS[family], torch.float32)
        report = run_raw(tmp_path / family, recipe(), f"{family}-out")
        check_report(report)
        assert report["structure"]["units"] == {"num_key_value_heads": [3, 2], "num_attention_heads": [9, 6]}
        assert len(report["layers"]) == 2 and report["parameters"]["kept"] < report["parameters"]["targeted"]
        written = json.loads((tmp_path / f"{family}-out" / "config.json").read_text())
        assert (written["num_key_value_heads"], written["num_attention_heads"], written["head_dim"]) == (2, 6, 8)
        outs.append(str(tmp_path / f"{family}-out"))
    done = subprocess.run([sys.executable, "-c", ALONE, *outs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.splitlines()[-1]) < 1e-4


@pytest.mark.parametrize("method", ["paredown_width", "minitron"])
def test_heads_of_a_state_space_go_and_what_comes_out_loads_without_us(method, save_model, run_raw, tmp_path):
    outs = []
    for family, (config, units, counts) in STATE_SPACES.items():
        save_model(tmp_path / family, config, torch.float32)
        report = run_raw(tmp_path / family, recipe(method, unit="ssm_heads", units=units), f"{family}-out")
        assert report["structure"]["units"] == counts
        outs.append(str(tmp_path / f"{family}-out"))
    done = subprocess.run([sys.executable, "-c", ALONE, *outs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.splitlines()[-1]) < 1e-4


def test_heads_of_a_state_space_that_do_nothing_go_and_nothing_changes(save_model, run_raw, tmp_path):
    config, units, _ = STATE_SPACES["falcon_h1"]
    dense = save_model(tmp_path / "model", config, torch.float32)
    for layer in dense.model.layers:
        layer.mamba.out_proj.weight.data[:, 8:24] = 0  # the second and third head of eight
    dense.save_pretrained(tmp_path / "model")
    report = run_raw(tmp_path / "model", recipe(unit="ssm_heads", units=units))
    assert abs(report["evaluation"][0]["paired_delta"]["log_ratio"]) < 1e-4
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stay = torch.tensor([0, 3, 4, 5, 6, 7])
    for before, after in zip(dense.model.layers, small.model.layers, strict=True):
        for name in ("A_log", "D", "dt_bias"):
            torch.testing.assert_close(getattr(after.mamba, name), getattr(before.mamba, name)[stay])
        assert after.mamba.conv1d.weight.shape[0] == 48 + 2 * 16


def test_units_of_another_kind_stay(save_model, tmp_path):
    config, units, _ = STATE_SPACES["falcon_h1"]
    save_model(tmp_path / "model", config, torch.float32)
    source = ModelSource(tmp_path / "model", "falcon_h1")
    for unit, count, part in (("ssm_heads", units, "mamba"), ("kv_groups", 1, "self_attn")):
        job = resolve(source, Recipe.parse(recipe("random", unit=unit, units=count)))
        assert {group.name.rpartition(".")[2] for group in job.all_groups} == {part} and job.remarks == []


@pytest.fixture
def model(save_model, tmp_path):
    save_model(tmp_path / "model", CONFIGS["llama"], torch.float32)
    return tmp_path / "model"


def test_a_plan_says_what_becomes_of_all_keys(model, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe()))
    planned = plan(model, str(tmp_path / "recipe.yaml"))
    assert any(FORM in remark for remark in planned.remarks)
    unit = 36 * 8 * 2 * (3 + 1)  # three query heads in q and o, one key and one value
    assert planned.targeted_parameters - planned.kept_parameters == 2 * unit


@pytest.mark.parametrize("method", ["paredown_width", "minitron", "flap"])
def test_heads_that_do_nothing_go_and_nothing_changes(method, model, run_raw, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(model)
    for layer in dense.model.layers:
        layer.self_attn.o_proj.weight.data[:, 24:48] = 0
        layer.self_attn.v_proj.weight.data[8:16] *= 1e-4  # for scores that do not see the reader
    dense.save_pretrained(model)
    report = run_raw(model, recipe(method))
    assert abs(report["evaluation"][0]["paired_delta"]["log_ratio"]) < 1e-4
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for before, after in zip(dense.model.layers, small.model.layers, strict=True):
        rows = torch.arange(24).view(3, 8)[[0, 2]].flatten()
        torch.testing.assert_close(after.self_attn.k_proj.weight, before.self_attn.k_proj.weight[rows])
        assert after.self_attn.q_proj.weight.shape == (48, 36)


def test_a_number_of_heads_that_the_family_refuses_is_told_before_anything_is_measured(save_model, tmp_path):
    config = t.LlamaConfig(**{**SIZES, "hidden_size": 45})  # of which nine is a divisor, and six is none
    save_model(tmp_path / "model", config, torch.float32)
    with pytest.raises(
        PareError, match=r"refuses num_key_value_heads 2 and num_attention_heads 6 .*another kept or units"
    ):
        resolve(ModelSource(tmp_path / "model", "llama"), Recipe.parse(recipe("random")))


def test_a_smaller_model_that_computes_with_other_numbers_is_refused(model):
    source = ModelSource(model, "llama")
    job = resolve(source, Recipe.parse(recipe("random")))
    small = reshaped(source, [0, 1], job.values)
    check_narrower(source, small, job.groups)
    small.blocks[0].module.self_attn.scaling *= 2
    with pytest.raises(PareError, match=r"layers.0.self_attn of a llama model gives something else.*fewer kv_groups"):
        check_narrower(source, small, job.groups)
