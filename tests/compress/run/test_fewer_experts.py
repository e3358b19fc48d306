"""Runs that remove whole experts: the router chooses among those that stay, and the checkpoint is an ordinary smaller one."""

import json
import math

import pytest
import torch
import transformers as t
import yaml
from transformers import AutoModelForCausalLM

from paredown.compress import PareError, plan

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256,
    "num_experts_per_tok": 2, "head_dim": 8,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES = {
    "mixtral": (t.MixtralConfig, {"num_local_experts": 8}, "num_local_experts"),
    "qwen3_moe": (t.Qwen3MoeConfig, {"num_experts": 8, "moe_intermediate_size": 16}, "num_experts"),
    "deepseek_v3": (
        t.DeepseekV3Config,
        {"n_routed_experts": 8, "moe_intermediate_size": 16, **LATENT},
        "n_routed_experts",
    ),
    "gpt_oss": (
        t.GptOssConfig,
        {"num_local_experts": 8, "sliding_window": 16, "rope_parameters": None},
        "num_local_experts",
    ),
    "olmoe": (t.OlmoeConfig, {"num_experts": 8}, "num_experts"),
}
IDLE = (2, 5)


@pytest.fixture
def model_of(tmp_path, save_model):
    """`model_of(family)`: the folder of a tiny model whose router never chooses two of eight experts."""

    def make(family, **changes):
        kind, sizes, _ = FAMILIES[family]
        sizes = {**SIZES, **sizes, **changes}
        folder = tmp_path / "model"
        model = save_model(folder, kind(**{k: v for k, v in sizes.items() if v is not None}), torch.float32)
        for name, tensor in model.state_dict().items():
            if name.endswith(("gate.weight", "router.weight")) and len(tensor) == 8:
                torch.nn.init.normal_(tensor)
                silence(name, tensor)
            elif name.endswith("router.bias"):
                tensor[list(IDLE)] = -1e4
            elif name.endswith("e_score_correction_bias"):
                tensor[list(IDLE)] = -2.0
        model.save_pretrained(folder)
        return folder

    return make


def silence(name, router):
    """No token likes the idle experts: each token likes one of two opposites better."""
    router[IDLE[0]], router[IDLE[1]] = 0.0, 0.0
    router[0], router[1] = 4 * router[0], -4 * router[0]
    router[3], router[4] = 4 * router[3], -4 * router[3]


@pytest.fixture
def run(run_raw):
    return run_raw


def routers(folder):
    """The matrices that choose among experts, by name; the model is transformers' own."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {n: p.detach() for n, p in model.named_parameters() if n.endswith(("mlp.gate.weight", "router.weight"))}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_get_no_token_go_and_nothing_changes(family, model_of, run, tmp_path):
    model = model_of(family)
    report = run(model, {"method": "expert_frequency", "options": {"units": 6}})
    key = FAMILIES[family][2]
    ((named, sizes),) = report["structure"]["units"].items()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sizes == [8, 6] and config.get(key, config.get(named)) == 6
    assert abs(report["evaluation"][0]["paired_delta"]["log_ratio"]) < 1e-5
    stay = [e for e in range(8) if e not in IDLE]
    before, after = routers(model), routers(tmp_path / "out")
    assert before.keys() == after.keys() and before
    for name, router in after.items():
        torch.testing.assert_close(router, before[name][stay])
    assert all(layer["kept"] == 0.75 and layer["name"].endswith("mlp") for layer in report["layers"])


def test_a_plan_says_what_the_run_writes(model_of, run, tmp_path):
    model = model_of("qwen3_moe")
    raw = {"method": "reap", "options": {"kept": 0.5}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(raw))
    planned, report = plan(model, str(tmp_path / "plan.yaml")), run(model, raw)
    assert planned.kept_parameters == report["parameters"]["kept"] < report["parameters"]["targeted"]
    assert planned.bytes_after == report["bytes"]["after"] < report["bytes"]["before"]
    assert list(report["structure"]["units"].values()) == [[8, 4]]  # a share of the experts, not of all parameters


def test_data_free_methods_run_where_experts_are_not_told_their_tokens(tmp_path, save_model, run):
    text = {
        **SIZES,
        "num_experts_per_tok": 1,
        "num_local_experts": 8,
        "intermediate_size_mlp": 24,
        "moe_layers": [0, 1],
    }
    save_model(tmp_path / "llama4", t.Llama4TextConfig(**text), torch.float32)
    report = run(tmp_path / "llama4", {"method": "aimer", "options": {"kept": 0.5}})
    assert all(layer["kept"] == 0.5 for layer in report["layers"]) and len(report["layers"]) == 2
    with pytest.raises(PareError, match="its experts are not told which tokens are theirs"):
        run(tmp_path / "llama4", {"method": "reap", "options": {"kept": 0.5}}, "reap")


def test_an_interrupted_run_goes_on_to_the_same_bytes(model_of, run, tmp_path):
    model, raw = model_of("mixtral"), {"method": "reap", "options": {"kept": 0.5}}
    run(model, raw, "whole")

    class Stopped(Exception):
        pass

    def stop(done):
        raise Stopped

    with pytest.raises(Stopped):
        run(model, raw, progress=stop, save_every=0.0)
    run(model, raw, save_every=0.0)
    out, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")} for name in ("out", "whole")
    )
    assert out == whole


def test_experts_go_in_a_stage_before_others_and_are_tuned(model_of, run, tmp_path):
    stages = [
        {"method": "reap", "options": {"kept": 0.75}, "reconstruct": {"steps": 2, "batch": 2}},
        {"method": "magnitude", "options": {"sparsity": "2:4"}},
    ]
    report = run(model_of("mixtral"), {"stages": stages})
    assert report["structure"]["units"] == {"num_local_experts": [8, 6]}
    assert math.isfinite(report["evaluation"][0]["paired_delta"]["log_ratio"])


@pytest.mark.parametrize(
    ("family", "changes", "options", "told"),
    [
        ("mixtral", {}, {"units": 1}, "each token gets 2"),
        ("mixtral", {}, {"kept": 0.1}, "each token gets 2"),
        ("mixtral", {}, {"units": 8}, "of the 8 units of num_local_experts 8 would stay"),
        ("deepseek_v3", {"n_group": 2}, {"kept": 0.5}, "lie in 2 groups"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    family, changes, options, told, model_of, run, tmp_path
):
    with pytest.raises(PareError, match=told):
        run(model_of(family, **changes), {"method": "reap", "options": options})
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
