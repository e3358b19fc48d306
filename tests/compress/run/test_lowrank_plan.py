"""What `plan` says of low rank from headers alone: exactly where shapes decide, the most there may be where the text does."""

import pytest
import transformers as t

from paredown.commands.display import show_plan
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.methods import build
from paredown.compress.recipe import Recipe
from paredown.compress.run.plan import make_plan
from paredown.evaluation.terminal import out_console

# one head for keys and values: 8 x 32, of which no rank from 7 on pays
C = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
NARROW = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(3) for part in "kv"]


@pytest.fixture
def folder(tmp_path, save_model):
    save_model(tmp_path / "m", t.LlamaConfig(**C))
    return tmp_path / "m"


def planned(folder, format="packed", **changes):
    job = resolve_job(ModelSource(folder, "m"), Recipe.parse(changes), format)
    return make_plan(job, 144, [144])


def shown(plan):
    with out_console.capture() as text:
        show_plan(plan)
    return " ".join(text.get().split())


@pytest.mark.parametrize(
    ("method", "options", "allocation"),
    [
        ("lorap", {"kept": 0.5}, None),
        ("lorap", {"target_parameters": 23000}, None),
        ("rom", {"kept": 0.7}, {"strategy": "per_type", "weights": {"[kv]_proj": 9.0, "up_proj": 0.5}}),
        ("svd_llm", {"kept": 0.7, "storage": "pifa"}, {"strategy": "uniform"}),
    ],
)
def test_ranks_that_follow_from_shapes_are_planned_to_the_number(method, options, allocation, folder, prune, tmp_path):
    recipe = {"method": method, "options": options, **({"allocation": allocation} if allocation else {})}
    plan, (result, writer) = planned(folder, **recipe), prune(folder, tmp_path / "out", **recipe)
    assert (plan.targeted_parameters, plan.kept_parameters) == (result.targeted, result.numbers)
    assert plan.bytes_after == writer.bytes and not plan.at_most
    assert set(plan.targeted) - set(plan.stay_dense) == {layer["name"] for layer in result.layers}


@pytest.mark.parametrize(
    ("method", "options", "strategy"),
    [
        ("svd_llm", {"energy": 0.5}, None),
        ("rom", {"energy": 0.999}, None),
        ("paredown_lowrank", {"kept": 0.6}, None),
        ("paredown_lowrank", {"target_parameters": 23000}, None),
        ("rom", {"kept": 0.5}, "theoretical_loss"),
        ("svd_llm", {"kept": 0.6}, "sensitivity"),
        ("fisher_svd", {"kept": 0.15}, "global"),  # of keys and values alone not even rank 1 would fit into that
    ],
)
def test_where_the_text_decides_the_plan_is_the_most_there_may_be(method, options, strategy, folder, prune, tmp_path):
    recipe = {"method": method, "options": options, **({"allocation": {"strategy": strategy}} if strategy else {})}
    plan, (result, writer) = planned(folder, **recipe), prune(folder, tmp_path / "out", **recipe)
    assert plan.at_most and not plan.stay_dense
    assert result.numbers <= plan.kept_parameters and writer.bytes <= plan.bytes_after <= plan.bytes_before
    if "energy" not in options:
        assert plan.kept_parameters - result.numbers < 0.1 * plan.targeted_parameters
    told = shown(plan)
    assert f"at most {plan.kept_parameters:,}, as the calibration text will tell" in told and "NOT shrink" not in told
    if method != "rom":  # whose bias no dense Llama can hold
        assert planned(folder, "dense", **recipe).bytes_after == plan.bytes_before


def test_layers_that_stay_dense_are_named(folder, save_model, tmp_path):
    plan = planned(folder, method="svd", options={"rank": 7})
    assert sorted(plan.stay_dense) == sorted(NARROW) and set(NARROW) < set(plan.targeted)
    assert "of these dense model.layers.0.self_attn.k_proj, " in shown(plan)
    assert planned(folder, method="svd", options={"rank": 6}).stay_dense == []
    assert len(planned(folder, method="sparse_low_rank", options={"rank": 30}).stay_dense) == 21
    save_model(tmp_path / "moe", t.MixtralConfig(**{**C, "num_hidden_layers": 1}, num_local_experts=2))
    plan = planned(tmp_path / "moe", method="svd_llm", options={"rank": 20})
    assert sum(".experts." in name for name in plan.stay_dense) == 2  # of (32, 48): only (96, 32) still shrinks
    assert not planned(tmp_path / "moe", method="svd_llm", options={"kept": 0.6}).stay_dense


@pytest.mark.parametrize(
    ("recipe", "format", "said"),
    [
        ({"method": "svd_llm", "reconstruct": {"steps": 1}}, "dense", "reconstruction tunes factors"),
        ({"method": "rom"}, "dense", "has no bias, and the affine form needs one"),
        ({"method": "sparse_low_rank", "allocation": {"strategy": "global"}}, "packed", "offers no choices"),
        ({"method": "svd", "allocation": {"strategy": "per_type", "weights": {"w_proj": 2}}}, "packed", "'w_proj'"),
        ({"method": "svd", "options": {"rank": 3}, "allocation": {"strategy": "global"}}, "packed", "not rank or energy"),
        ({"method": "laser", "allocation": {"strategy": "global"}}, "packed", "ask by kept .*chooses each rank by itself"),
        ({"method": "cur", "allocation": {"strategy": "per_type"}}, "packed", "ask by kept .*chooses each rank by itself"),
        ({"method": "cur", "options": {"kept": 0.5}, "allocation": {"strategy": "global"}}, "packed", "take sensitivity"),
    ],
    ids=lambda value: value.get("method") if isinstance(value, dict) else value[:9],
)  # fmt: skip
def test_what_the_run_would_refuse_the_plan_refuses(recipe, format, said, folder, prune, tmp_path):
    recipe = {"options": {}, **recipe}
    with pytest.raises(PareError, match=said):
        planned(folder, format, **recipe)
    with pytest.raises(PareError, match=said):
        prune(folder, tmp_path / "out", format=format, **recipe)


def test_shares_that_lorap_gives_by_name_are_refused_where_no_layer_is_called_so(save_model, tmp_path):
    save_model(tmp_path / "gpt2", t.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    with pytest.raises(PareError, match=r"'v_proj'.* last part of layers: c_attn, c_fc, c_proj"):
        planned(tmp_path / "gpt2", method="lorap")
    mine = {"strategy": "per_type", "weights": {"c_proj": 3.0}}
    assert planned(tmp_path / "gpt2", method="lorap", allocation=mine).shrinks


@pytest.mark.parametrize("strategy", ["per_type", "sensitivity"])
def test_cur_spends_a_budget_that_it_is_asked_for(strategy, folder, prune, tmp_path):
    recipe = {"method": "cur", "options": {"kept": 0.5}, "allocation": {"strategy": strategy}}
    result, _ = prune(folder, tmp_path / "out", **recipe)
    assert 0.3 < result.numbers / result.targeted <= 0.5


def test_curing_takes_from_llama_3_1_8b_what_its_paper_says():
    """8.03B parameters become 7.32B: q, k and gate of ten blocks."""
    method = build("cur", {})
    saved = 0
    for shape in ((4096, 4096), (1024, 4096), (14336, 4096)):
        saved += 10 * (shape[0] * shape[1] - method.numbers(shape, method.planned_rank(shape)))
    assert round(8.03 - saved / 1e9, 2) == 7.32


def test_the_memory_of_reconstruction_is_planned(folder):
    recipe = {"method": "svd_llm", "options": {"kept": 0.5}}
    plain, tuned = (planned(folder, **recipe, **more) for more in ({}, {"reconstruct": {"steps": 1}}))
    # float32 masters, gradients and two moments of one of three blocks
    assert plain.memory_parts["tuning"] == 0 and tuned.memory_parts["tuning"] > 16 * plain.targeted_parameters // 3
    assert tuned.memory > plain.memory


def test_the_first_lines_say_what_share_is_targeted_and_why_not_more(folder, save_model, tmp_path):
    plan = planned(folder, method="svd", options={"kept": 0.6}, targets={"skip": ["q_proj"]})
    assert sum(plan.untargeted.values()) == plan.parameters - plan.targeted_parameters
    assert plan.untargeted == {
        "embeddings, head and others outside the blocks": 2 * 128 * 32 + 32,
        "left out by targets": 3 * 32 * 32,
        "norms, biases and other vectors": 3 * 2 * 32,
    }
    share = f"{plan.targeted_parameters / plan.parameters:.1%}"
    assert f"targeted {share} of the model: 18 layers" in shown(plan)
    assert "% embeddings, head and others outside the blocks, " in shown(plan)
    save_model(tmp_path / "mamba", t.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4))
    assert planned(tmp_path / "mamba", method="svd").untargeted["matrices that no method can edit"] > 0
