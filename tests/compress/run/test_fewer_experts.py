"""Runs that remove whole experts: the router chooses among those that stay, and the checkpoint is an ordinary smaller one."""

import json
import math

import pytest
import torch
import transformers as t
import yaml
from transformers import AutoModelForCausalLM

from paredown.compress import PareError, plan
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.methods import METHODS
from paredown.compress.methods.structured.experts import ExpertStats
from paredown.compress.model.blocks import blocks
from paredown.compress.run.cut import experts_of, left_of
from paredown.compress.shape_job import find_groups
from paredown.compress.survey import expert_fit
from paredown.compress.survey.expert_fit import ExpertFit

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


@pytest.mark.parametrize("method", ["expert_frequency", "mc_smoe", "paredown_experts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_get_no_token_go_and_nothing_changes(family, method, model_of, run, tmp_path):
    model = model_of(family)
    report = run(model, {"method": method, "options": {"units": 6}})
    key = FAMILIES[family][2]
    ((named, sizes),) = report["structure"]["units"].items()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sizes == [8, 6] and config.get(key, config.get(named)) == 6
    # OLMoE weighs by probabilities among all experts: where some go, the others count for more, and are fitted to that
    most = 1e-2 if (family, method) == ("olmoe", "paredown_experts") else 1e-5
    assert abs(report["evaluation"][0]["paired_delta"]["log_ratio"]) < most
    stay = [e for e in range(8) if e not in IDLE]
    before, after = routers(model), routers(tmp_path / "out")
    assert before.keys() == after.keys() and before
    for name, router in after.items():
        torch.testing.assert_close(router, before[name][stay])
    assert all(layer["kept"] == 0.75 and layer["name"].endswith("mlp") for layer in report["layers"])


def twin(tensor, name, order, family):
    """Experts 4 to 7 become copies of 0 to 3 with their hidden channels in another order; a router's entries stay."""
    if "experts." not in name:
        return
    fused, channels = "gate_up" in name, len(order)
    pairs = torch.stack([2 * order, 2 * order + 1], 1).flatten()  # GPT-OSS: in x out, gate and up side by side
    if name.endswith("down_proj_bias"):
        tensor[4:] = tensor[:4]
    elif family == "gpt_oss":
        tensor[4:] = tensor[:4][..., pairs] if fused else tensor[:4][:, order]
    else:
        tensor[4:] = tensor[:4][:, torch.cat([order, order + channels])] if fused else tensor[:4][..., order]


@pytest.mark.parametrize(("family", "channels"), [("mixtral", 24), ("deepseek_v3", 16), ("gpt_oss", 24)])
@torch.no_grad()
def test_experts_that_are_alike_but_for_the_order_of_their_channels_become_one_that_is_as_they_were(
    family, channels, save_model, tmp_path
):
    kind, sizes, _ = FAMILIES[family]
    sizes = {k: v for k, v in {**SIZES, **sizes}.items() if v is not None}
    model = save_model(tmp_path / "model", kind(**sizes), torch.float32)
    own = {n: t for n, t in model.state_dict().items() if "mlp." in n and len(t) == 8}
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(1))
    for name, tensor in own.items():
        if "bias" in name:
            torch.nn.init.normal_(tensor)
        twin(tensor, name, order, family)
    model.save_pretrained(tmp_path / "model")
    source = ModelSource(tmp_path / "model", family)
    group, block = find_groups(source, blocks(source), "experts")[1][0], blocks(source)[1]
    likes = torch.randn(30, 4, generator=torch.Generator().manual_seed(2)).double().repeat(1, 2)  # of pairs the same
    count = torch.arange(8, 0, -1).double()
    with source.loaded(block):
        experts = experts_of(group, block, ExpertStats(count, count, count, likes.T @ likes))
        cut = METHODS.build("mc_smoe", {"units": 4}).compress(experts, 4)
        left = left_of(block, group, cut)
    assert cut.into.tolist() == [0, 1, 2, 3] * 2 and {n for n in own if n.startswith(block.prefix)} <= left.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, own[name][:4])


def test_a_plan_says_what_the_run_writes(model_of, run, tmp_path):
    model = model_of("qwen3_moe")
    raw = {"method": "reap", "options": {"kept": 0.5}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(raw))
    planned, report = plan(model, str(tmp_path / "plan.yaml")), run(model, raw)
    assert planned.kept_parameters == report["parameters"]["kept"] < report["parameters"]["targeted"]
    assert planned.bytes_after == report["bytes"]["after"] < report["bytes"]["before"]
    assert list(report["structure"]["units"].values()) == [[8, 4]]  # a share of the experts, not of all parameters


def test_a_plan_counts_the_float32_copies_of_the_experts_that_are_found_and_fitted(save_model, tmp_path):
    kind, sizes, _ = FAMILIES["qwen3_moe"]
    save_model(tmp_path / "model", kind(**{**SIZES, **sizes, "num_experts": 64, "moe_intermediate_size": 256}))
    experts = 64 * 3 * 256 * 32  # parameters of a block's, in bfloat16

    def parts(raw):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**raw, "options": {"kept": 0.75}}))
        planned = plan(tmp_path / "model", str(tmp_path / "plan.yaml"), overrides=["calibration.sequences=1"])
        assert planned.memory >= planned.memory_parts["finding"]
        return planned.memory_parts

    plain = parts({"method": "reap"})
    assert 10 * experts < plain["finding"] < 14 * experts and plain["solver"] == 0
    assert parts({"method": "paredown_experts"})["solver"] > 4 * 48 * (9 * 32 * 256 + 256**2)
    assert parts({"method": "mc_smoe"})["solver"] > 2 * 2 * 64 * 2 * 256 * 32


def test_what_no_setting_of_the_config_counts_alone_is_told_and_stays(model_of, run, tmp_path):
    model, raw = model_of("deepseek_v3"), {"method": "minitron", "options": {"units": 16, "multiple": 8}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(raw))
    told = "model.layers.1.mlp.shared_experts: their channels stay, because no setting of the config says how many"
    remarks = [said for said in plan(model, str(tmp_path / "plan.yaml")).remarks if "no setting" in said]
    assert len(remarks) == 1 and remarks[0].startswith(told)
    assert run(model, raw)["fallbacks"] == remarks
    small, dense = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "out", model))
    name = "model.layers.1.mlp.shared_experts.up_proj.weight"
    assert torch.equal(small[name], dense[name]) and len(small["model.layers.0.mlp.up_proj.weight"]) == 16


def test_the_fit_lowers_the_error_of_what_the_experts_give_and_says_where_it_cannot_be_made(
    save_model, run, tmp_path, monkeypatch
):
    kind, sizes, _ = FAMILIES["qwen3_moe"]
    save_model(tmp_path / "model", kind(**{**SIZES, **sizes}), torch.float32)
    raw, before, plain = {"method": "paredown_experts", "options": {"kept": 0.5}}, {}, ExpertFit.fitted

    def spied(self, *given):
        found = plain(self, *given)
        before[self.group.name] = found.before
        return found

    monkeypatch.setattr(ExpertFit, "fitted", spied)
    report = run(tmp_path / "model", raw)
    monkeypatch.setattr(ExpertFit, "fitted", plain)
    assert not report["fallbacks"] and {layer["name"] for layer in report["layers"]} == before.keys()
    for layer in report["layers"]:
        assert 0 < layer["relative_error"] < before[layer["name"]] < 2
    monkeypatch.setattr(expert_fit, "choice", lambda arguments: None)
    report = run(tmp_path / "model", raw, "unseen")
    assert [said for said in report["fallbacks"] if "are not fitted" in said] == report["fallbacks"] != []
    assert all(layer["relative_error"] is None for layer in report["layers"])


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
    model, raw = model_of("mixtral"), {"method": "paredown_experts", "options": {"kept": 0.5}}
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
