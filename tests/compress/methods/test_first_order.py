"""The masks by gradients, from statistics of a tiny model, against slow loops over weights with autograd's own gradients."""

import pytest
import torch
import transformers

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.job import resolve_job
from paredown.compress.methods import MASKS, build
from paredown.compress.model.blocks import blocks
from paredown.compress.model.stream import start
from paredown.compress.numerics.moments import GRADIENT_NEEDS, INPUT_NEEDS, InputStats, Need, Stats, uniform_gradients
from paredown.compress.recipe import Recipe
from paredown.compress.run.plan import make_plan
from paredown.compress.survey.gradients import backward

IDS = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(0))
LAYERS = {"model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, save_model):
    """Of two layers the weight, its statistics, and each window's gradient by autograd, in float64."""
    folder = tmp_path_factory.mktemp("first-order")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = save_model(folder / "m", config, torch.float64)
    source = ModelSource(folder / "m", "m", dtype=torch.float64)
    stats = {}
    (folder / "scratch").mkdir()
    for _, found in backward(source, start(source, IDS), LAYERS, INPUT_NEEDS, GRADIENT_NEEDS, folder / "scratch"):
        stats |= found
    gradients = {name: [] for name in LAYERS}
    for window in IDS:
        model.zero_grad()
        (model(window[None], labels=window[None], use_cache=False).loss * 8).backward()
        for name in LAYERS:
            gradients[name].append(model.get_submodule(name).weight.grad.clone())
    weights = {name: model.get_submodule(name).weight.detach() for name in LAYERS}
    assert len(blocks(source)) == 2
    return {name: (weights[name], stats[name], gradients[name]) for name in sorted(LAYERS)}


def first(w, of_windows):
    return abs(w * sum(of_windows))


def both(w, of_windows):
    return abs(w * sum(of_windows) - w * w * sum(g * g for g in of_windows) / 2)


def movement(w, of_windows):
    return -w * sum(of_windows)


@pytest.mark.parametrize("sparsity", [0.5, "1:4"])
@pytest.mark.parametrize(
    ("mask", "options", "score"),
    [("taylor", {}, first), ("taylor", {"terms": "both"}, both), ("movement", {}, movement)],
)
def test_a_mask_keeps_the_highest_scores_of_autograds_gradients(mask, options, score, sparsity, measured):
    for weight, stats, gradients in measured.values():
        method = build("masked", {"mask": mask, "update": "none", "sparsity": sparsity, **options})
        keep = method.compress(weight, stats).keep
        scores = {
            (i, j): float(score(weight[i, j], [g[i, j] for g in gradients]))
            for i in range(weight.shape[0])
            for j in range(weight.shape[1])
        }
        if sparsity == 0.5:
            groups, n = [list(scores)], len(scores) // 2
        else:
            groups, n = [[(i, j + k) for k in range(4)] for i, j in scores if j % 4 == 0], 1
        wanted = {place for group in groups for place in sorted(group, key=lambda p: -scores[p])[:n]}
        assert {place for place in scores if keep[place]} == wanted


def test_the_second_term_is_collected_only_where_it_is_read():
    assert MASKS.build("taylor", {}).needs == {Need.WEIGHT_GRADIENT}
    assert MASKS.build("taylor", {"terms": "both"}).needs == {Need.WEIGHT_GRADIENT, Need.FISHER}


@pytest.mark.parametrize("mask", ["taylor", "movement", "fisher"])
def test_a_layer_that_no_token_reached_is_pruned_by_size(mask):
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    stats = Stats(InputStats.uniform(16, INPUT_NEEDS), uniform_gradients(GRADIENT_NEEDS, weight))
    keep = build("masked", {"mask": mask, "update": "none"}).compress(weight, stats).keep
    assert torch.equal(keep, build("magnitude", {}).compress(weight, stats).keep)


def test_the_plan_counts_a_gradient_for_each_weight(tiny_model):
    def solver(terms):
        raw = {"method": "masked", "options": {"mask": "taylor", "update": "none", "terms": terms}}
        job = resolve_job(ModelSource(tiny_model, "m"), Recipe.parse(raw))
        plan = make_plan(job, 64, [64])
        return plan.memory_parts["solver"], plan.targeted_parameters // len(job.blocks)

    (first, numbers), (both, _) = solver("first"), solver("both")
    assert both - first == 8 * numbers and first > 8 * numbers
