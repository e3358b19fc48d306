"""What the plan says from headers alone is what compress then does."""

from dataclasses import replace
from math import ceil

import pytest
import torch
import transformers as t

from paredown.commands.display import show_plan
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.recipe import Recipe
from paredown.compress.run.plan import check_room, make_plan

C = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": t.LlamaConfig(**C),
    "gpt2": t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "mixtral": t.MixtralConfig(**C, num_local_experts=4),
    "mamba": t.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8),
}


def planned(folder, sparsity="2:4", format="packed", **changes):
    recipe = Recipe.parse({"method": "wanda", "options": {"sparsity": sparsity}, **changes})
    return make_plan(resolve_job(ModelSource(folder, "m"), recipe, format), 144, [144])


@pytest.mark.parametrize("format", ["packed", "dense"])
@pytest.mark.parametrize("sparsity", ["2:4", 0.5, "4:8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_counts_and_bytes_are_what_compress_reports(family, sparsity, format, tmp_path, save_model, prune):
    save_model(tmp_path / "m", CONFIGS[family])
    plan = planned(tmp_path / "m", sparsity, format)
    result, writer = prune(tmp_path / "m", tmp_path / "out", sparsity=sparsity, format=format)
    assert plan.known_family and plan.blocks == 2
    assert plan.targeted == [layer["name"] for layer in result.layers]
    assert (plan.targeted_parameters, plan.kept_parameters) == (result.targeted, result.numbers)
    assert plan.bytes_after == pytest.approx(writer.bytes, rel=0.02)
    assert plan.shrinks == (format == "packed")
    assert plan.memory > 0 and plan.to_dict()["disk"] == plan.bytes_after


@pytest.mark.parametrize(("sparsity", "format", "vllm"), [("2:4", "packed", "unpacked"), (0.5, "dense", "as it is")])
def test_the_plan_says_which_engines_take_what_comes_out(sparsity, format, vllm, tiny_model, capsys):
    plan = planned(tiny_model, sparsity, format)
    assert vllm in plan.engines["vLLM"] and plan.to_dict()["engines"] == plan.engines
    show_plan(plan)
    assert "runs in" in (told := capsys.readouterr().out) and "llama.cpp" in told


def test_no_weight_is_read(tmp_path, save_model):
    save_model(tmp_path / "m", CONFIGS["llama"])
    file = tmp_path / "m" / "model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:header] + b"\xff" * (len(data) - header))  # NaN, which no weight may hold
    source = ModelSource(tmp_path / "m", "m")
    with pytest.raises(PareError, match="holds NaN"):
        source.read(["lm_head.weight"])
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64
    plan = planned(tmp_path / "m")
    assert plan.targeted_parameters == 2 * layer and plan.kept_parameters == layer
    padding = 2 * 64 * 4  # indices of the down projections: 96 columns fill one and a half blocks of 64
    assert plan.bytes_before - plan.bytes_after == 2 * (2 * layer) * 7 // 16 - padding  # 9 bits of 16 stay


def test_what_is_left_out_and_what_nobody_sees_is_named(tmp_path, save_model):
    save_model(tmp_path / "moe", CONFIGS["mixtral"])
    plan = planned(tmp_path / "moe", targets={"skip": ["q_proj"]})
    assert [n for n in plan.left_out if n.endswith("q_proj")] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert not any(n.endswith("q_proj") for n in plan.targeted)
    assert plan.unsupported == [f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)]
    save_model(tmp_path / "mamba", CONFIGS["mamba"])
    plan = planned(tmp_path / "mamba")
    assert {n.rpartition("mixer.")[2] for n in plan.unsupported} >= {"A_log", "conv1d.weight", "dt_proj.weight"}


def test_a_pattern_without_a_match_and_a_width_that_does_not_divide(tmp_path, save_model):
    save_model(tmp_path / "m", CONFIGS["llama"])
    with pytest.raises(PareError, match=r"'dwn_proj' matches no linear layer. Did you mean 'down_proj'"):
        planned(tmp_path / "m", targets={"skip": ["dwn_proj"]})
    with pytest.raises(PareError, match=r"model.layers.0.self_attn.q_proj: .*divisible by 7"):
        planned(tmp_path / "m", "3:7")


def test_float32_halves_are_stored_in_one_bit_more_per_weight(tmp_path, save_model, prune):
    save_model(tmp_path / "m", CONFIGS["llama"], torch.float32)
    plan = planned(tmp_path / "m", 0.75)
    _, writer = prune(tmp_path / "m", tmp_path / "out", sparsity=0.75)
    assert plan.bytes_after == writer.bytes
    bitmap = writer.tensors["model.layers.0.mlp.down_proj.bitmap"]
    assert bitmap["bytes"] == 64 * ceil(96 / 8)


def test_too_little_room_says_how_much_is_missing(tmp_path, save_model):
    save_model(tmp_path / "m", CONFIGS["llama"])
    plan = planned(tmp_path / "m")
    check_room(plan, tmp_path / "not" / "yet" / "there")
    with pytest.raises(PareError, match=r"are missing.*calibration.sequences"):
        check_room(replace(plan, memory=1 << 60), tmp_path / "out")
    with pytest.raises(PareError, match=r"the checkpoint needs .* GB: free .* GB, or name another output"):
        check_room(replace(plan, bytes_after=1 << 60), tmp_path / "out")
    check_room(replace(plan, bytes_after=1 << 60), tmp_path / "out", written=1 << 60)  # by a run that goes on
