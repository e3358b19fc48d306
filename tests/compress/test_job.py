"""What a job refuses and settles before a weight is read: blocks, targets, and how one budget is spent."""

import math
from dataclasses import replace

import pytest
import torch
import transformers as t

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.model.blocks import blocks
from paredown.compress.recipe import Recipe

CONFIG = t.LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


class Sealed(ModelSource):
    """A model of which no weight may be read."""

    def materialise(self, *args):
        pytest.fail("weights were read")


@pytest.fixture
def source(tmp_path, save_model):
    save_model(tmp_path / "m", CONFIG, torch.float32)
    return Sealed(tmp_path / "m", "m")


def layers_of(source):
    return {v.name: v for block in blocks(source) for v in block.views()}


def resolved(source, method, options=None, allocation=None, targets=("*",)):
    given = {"options": options or {}, "allocation": allocation, "targets": {"include": sorted(targets)}}
    return resolve_job(source, Recipe.parse({"method": method, **given}))


@pytest.mark.parametrize(("last", "wanted"), [(0.2, {4}), (0.25, {4}), (0.6, {2, 3, 4}), (0.01, {4})])
def test_laser_edits_the_last_blocks_without_a_look_at_the_text(last, wanted, source):
    only = {n for n in layers_of(source) if "mlp" in n}
    job = resolved(source, "laser", {"last": last}, targets=only)
    chosen = {view.name for view in job.targets_within()}
    assert chosen == {n for n in only if int(n.split(".")[2]) in wanted} and len(chosen) == 3 * len(wanted)


@pytest.mark.parametrize("allocation", [None, {"strategy": "global"}, {"strategy": "per_type"}])
def test_target_parameters_that_no_ranks_can_meet_are_refused(allocation, source):
    whole = sum(p.numel() for p in source.parameters.values())
    targeted = sum(math.prod(v.shape) for v in layers_of(source).values())
    for target in (1, whole - targeted, whole, whole + 1000):
        message = (
            f"target_parameters {target:,} cannot be met: the model has {whole:,}, of which {targeted:,} are targeted"
        )
        job = resolved(source, "svd_llm", {"target_parameters": target}, allocation)
        with pytest.raises(PareError, match=message):
            job.allocate(job.targets)


def below_rank_one(source):
    """A number of parameters that leaves all layers together fewer than rank 1 takes."""
    layers = layers_of(source)
    return sum(p.numel() for name, p in source.parameters.items() if name.rpartition(".")[0] not in layers) + 10


def test_a_global_budget_below_rank_one_is_refused(source):
    job = resolved(source, "svd_llm", {"target_parameters": below_rank_one(source)}, {"strategy": "global"})
    with pytest.raises(PareError, match="rank 1 in every layer takes"):
        job.allocate(job.targets)


@pytest.mark.parametrize("allocation", [None, {"strategy": "per_type"}, {"strategy": "theoretical_loss"}])
def test_a_target_below_rank_one_is_refused_by_every_strategy(allocation, source):
    job = resolved(source, "svd_llm", {"target_parameters": below_rank_one(source)}, allocation)
    # as if a survey had measured the same loss everywhere
    choices = {v.name: [replace(c, loss=1.0) for c in job.method.choices(v.shape)] for v in job.targets}
    with pytest.raises(PareError, match="rank 1"):
        job.allocate(job.targets, choices, tokens=72)


@pytest.mark.parametrize(
    ("allocation", "fault"),
    [
        ({"strategy": "per_type", "weights": {"v_proj": 3, "vproj": 2}}, "'vproj'"),
        # only the last part counts
        ({"strategy": "per_type", "weights": {"self_attn.v_proj": 3}}, "'self_attn.v_proj'"),
        # of a layer that is skipped
        ({"strategy": "per_type", "weights": {"[ud]*": 3, "down_proj": 2}}, "'down_proj'"),
        ({"strategy": "global", "weights": {"v_proj": 3}}, "global has no option 'weights'"),
        ({"strategy": "uniform", "weights": {"v_proj": 3}}, "uniform has no option 'weights'"),
    ],
)
def test_weights_of_an_allocation_that_would_go_unheard_are_refused(allocation, fault, source):
    only = {n for n in layers_of(source) if n.endswith(("v_proj", "up_proj"))}
    unheard = (
        rf"allocation.weights {fault} matches no layer: .*last part of layers: up_proj, v_proj\..*strategy: per_type"
    )
    with pytest.raises(PareError, match=fault if "has no" in fault else unheard):
        resolved(source, "svd_llm", {}, allocation, only)
    job = resolved(source, "svd_llm", {}, {"strategy": "per_type", "weights": {"[uv]*": 3}}, only)
    assert job.allocate(job.targets).keys() == only


@pytest.mark.parametrize("strategy", ["uniform", "per_type", "global"])
def test_an_allocation_needs_a_method_with_choices(strategy, source):
    with pytest.raises(
        PareError, match=r"offers no choices, so that an allocation has nothing to spread. Leave it out"
    ):
        resolved(source, "sparse_low_rank", {}, {"strategy": strategy})


@pytest.mark.parametrize("strategy", ["per_type", "theoretical_loss", "sensitivity", "global"])
@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.9}])
def test_one_budget_cannot_be_spent_where_each_layers_rank_is_given(options, strategy, source):
    with pytest.raises(PareError, match=f"allocation {strategy} spends one budget: ask by kept or target_parameters"):
        resolved(source, "svd_llm", options, {"strategy": strategy})
    job = resolved(source, "svd_llm", options, {"strategy": "uniform"})
    assert job.allocate(job.targets) is None
