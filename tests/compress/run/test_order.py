"""Each order of the walk against a loop over transformers' own model, which prunes layer by layer with hooks on its inputs."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.methods import build
from paredown.compress.numerics.moments import InputStats, Need, Stats
from paredown.compress.recipe import Recipe

GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
IN_ONE = [[name for group in GROUPS for name in group]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, save_model):
    folder = tmp_path_factory.mktemp("order") / "model"
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    save_model(folder, config, torch.float32)
    return folder


def observed(model, layers, ids):
    """The Gram matrix and more of each layer's inputs, by name."""
    stats = {name: InputStats(model.get_submodule(name).in_features, frozenset({Need.GRAM})) for name in layers}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: stats[name].update(args[0]))
        for name in layers
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: Stats(s) for name, s in stats.items()}


def by_hand(folder, ids, order):
    """The pruned weights, by name."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    method = build("sparsegpt", {"sparsity": "2:4"})
    names = {name.rpartition(".")[2]: [] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(names) == {*IN_ONE[0], "lm_head"}
    steps = [
        [f"model.layers.{block}.{'mlp' if 'gate' in n or 'up' in n or 'down' in n else 'self_attn'}.{n}" for n in group]
        for block in range(3)
        for group in (GROUPS if order == "true_sequential" else IN_ONE)
    ]
    dense = observed(model, [name for group in steps for name in group], ids)
    for group in steps:
        stats = dense if order == "independent" else observed(model, group, ids)
        for name in group:
            weight = model.get_submodule(name).weight
            weight.data = method.compress(weight.data, stats[name]).weight
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("order", ["block", "true_sequential", "independent"])
def test_weights_are_pruned_by_the_inputs_that_the_order_names(order, model_folder, tmp_path, prune, windows):
    prune(model_folder, tmp_path / "out", method="sparsegpt", format="dense", order=order)
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), by_hand(model_folder, windows.ids, order)
    others = [by_hand(model_folder, windows.ids, o) for o in ("block", "true_sequential", "independent") if o != order]
    name = "model.layers.2.mlp.down_proj.weight"
    assert {n for n, tensor in found.items() if (tensor == 0).any()} >= {n for n in found if "proj" in n}
    for tensor in found:
        torch.testing.assert_close(found[tensor], wanted[tensor], rtol=1e-3, atol=1e-4)
    assert all((found[name] - other[name]).abs().max() > 1e-2 * found[name].abs().max() for other in others)


def test_the_order_that_a_recipe_does_not_name_is_by_blocks(model_folder, tmp_path, prune):
    assert Recipe.parse({"method": "wanda"}).order == "block"
    prune(model_folder, tmp_path / "named", order="block")
    prune(model_folder, tmp_path / "left-out")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("named", "left-out"))
    assert first == second


def test_a_method_that_compares_with_the_dense_model_goes_in_turn_and_not_independently(model_folder):
    raw = {"method": "paredown_lowrank", "options": {"kept": 0.6}}
    source = ModelSource(model_folder, "m")
    for order in ("block", "true_sequential"):
        resolve_job(source, Recipe.parse({**raw, "order": order}))
    with pytest.raises(PareError, match=r"paredown_lowrank compares them.*leave order out"):
        resolve_job(source, Recipe.parse({**raw, "order": "independent"}))


def test_an_order_that_there_is_not_is_refused():
    with pytest.raises(PareError, match=r"order.*'block', 'true_sequential' or 'independent'.*'sequential'"):
        Recipe.parse({"method": "wanda", "order": "sequential"})


@pytest.mark.parametrize("order", ["true_sequential", "independent"])
def test_experts_go_in_any_order(order, tmp_path, save_model, prune):
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    save_model(tmp_path / "model", config)
    result, _ = prune(tmp_path / "model", tmp_path / "out", order=order)
    names = [layer["name"] for layer in result.layers]
    assert len(names) == len(set(names)) == 2 * (4 + 2 * 4)
