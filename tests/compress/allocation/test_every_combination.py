"""Any mask, update and allocation run together from a recipe of five lines: new ones are taken in by their registries."""

from math import prod

import pytest
import transformers
import yaml

from paredown.compress import compress
from paredown.compress.allocation.base import ALLOCATIONS
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.job import resolve_job
from paredown.compress.methods import MASKS, UPDATES
from paredown.compress.model.blocks import by_owner
from paredown.compress.recipe import Recipe


def ours(registry):
    return sorted(name for name, cls in registry.classes().items() if cls.__module__.startswith("paredown."))


def combinations():
    """Each mask, and so each update, with each thing that an allocation measures; among them every allocation."""
    kinds = {}
    for name in ours(ALLOCATIONS):
        kinds.setdefault(ALLOCATIONS.get(name).reads, []).append(name)
    masks, updates = ours(MASKS), ours(UPDATES)
    assert len(masks) >= max(len(updates), *map(len, kinds.values()))  # else some are left out below
    for j, (reads, strategies) in enumerate(kinds.items()):
        alike = reads == "shapes"  # nothing is measured, and a mask sees no more of it than its own sparsity
        for i, mask in enumerate(masks[: max(len(strategies), len(updates))] if alike else masks):
            yield mask, updates[(i + j) % len(updates)], strategies[i % len(strategies)]


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_model):
    folder = tmp_path_factory.mktemp("combinations") / "model"
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=256, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    save_model(folder, config)
    return folder


def test_every_mask_and_update_is_run_with_all_that_allocations_read():
    runs, reads = list(combinations()), {name: ALLOCATIONS.get(name).reads for name in ours(ALLOCATIONS)}
    assert {name for _, _, name in runs} == reads.keys()
    measured = {kind for kind in reads.values() if kind != "shapes"}
    assert {(mask, reads[name]) for mask, _, name in runs} >= {(m, kind) for m in ours(MASKS) for kind in measured}
    assert {(update, reads[name]) for _, update, name in runs} == {
        (u, kind) for u in ours(UPDATES) for kind in reads.values()
    }


@pytest.mark.parametrize(("mask", "update", "strategy"), list(combinations()))
def test_a_recipe_of_five_lines_runs(mask, update, strategy, model, text_file, tmp_path, verified_here):
    recipe = tmp_path / "recipe.yaml"
    text = {"source": str(text_file), "sequences": 2, "length": 24}
    text |= {"domain": str(text_file)} if mask == "d_pruner" else {}
    scored = {"perplexity": [str(text_file)], "length": 24, "windows": 1}
    recipe.write_text(
        f"method: masked\noptions: {{mask: {mask}, update: {update}, sparsity: 0.6}}\n"
        f"allocation: {{strategy: {strategy}}}\n"
        "targets: {include: [down_proj]}\n" + yaml.safe_dump({"calibration": text, "evaluate": scored})
    )
    report = compress(model, str(recipe), tmp_path / "out")
    sizes = {name: prod(shape) for name, shape in shapes_of(model).items()}
    removed = sum(round((1 - layer["kept"]) * sizes[layer["name"]]) for layer in report["layers"])
    total = sum(size for name, size in sizes.items() if name.endswith("down_proj"))
    assert removed == pytest.approx(0.6 * total, abs=2 * 16 / 2)  # half the rows of each layer, where they count alone
    assert report["evaluation"][0]["paired_delta"]["log_ratio"] != 0


def shapes_of(folder):
    job = resolve_job(ModelSource(folder, "m"), Recipe.parse({"method": "wanda"}))
    return {owner: members[0].shape for owner, members in by_owner(job.targets).items()}
