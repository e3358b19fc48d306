"""Experts in whatever class and layout are seen one by one as (out, in), with the tokens that reach each of them."""

from math import prod

import families as tiny
import pytest
import torch
from torch import nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.model.stream import start
from paredown.compress.numerics.moments import Need
from paredown.compress.recipe import Recipe
from paredown.compress.run.plan import make_plan
from paredown.compress.survey.gradients import backward
from paredown.compress.survey.products import InputObserver

# classes that multiply with (in, out), with all experts at once, with rows of one matrix, or by themselves
FAMILIES = ["gpt_oss", "llama4_text", "dbrx", "jetmoe", "longcat_flash", "aria_text"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")

    def saved(family):
        if not (root / family).exists():
            tiny.save(family, root / family)
        return root / family / "float32"

    return saved


@pytest.mark.parametrize("family", FAMILIES)
def test_nearly_all_of_the_blocks_is_targeted_and_each_expert_can_be_replaced(family, folder):
    source = ModelSource(folder(family), family)
    job = resolve_job(source, Recipe.parse({"method": "wanda"}))
    inside = sum(t.numel() for n, t in source.parameters.items() if n.startswith(tuple(b.prefix for b in job.blocks)))
    assert sum(prod(view.shape) for view in job.targets) > 0.95 * inside
    block = job.blocks[-1]
    with source.loaded(block):
        for view in [v for v in block.views() if v.expert == 1]:
            before, new = view.whole.clone(), torch.randn(view.shape)
            view.assign(new)
            assert view.weight.data_ptr() == view.raw.data_ptr() and torch.equal(view.whole[1], new)
            assert torch.equal(view.whole[2:], before[2:]) and torch.equal(view.whole[0], before[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_factors_every_expert_and_what_is_loaded_is_what_was_measured(family, folder, tmp_path, prune):
    recipe = {"method": "svd_llm", "options": {"kept": 0.7, "storage": "pifa"}}
    job = resolve_job(ModelSource(folder(family), family), Recipe.parse(recipe))
    result, _ = prune(folder(family), tmp_path / "out", text=tiny.TEXT, **recipe)
    assert {layer["name"] for layer in result.layers} == {view.name for view in job.targets}
    assert result.numbers == make_plan(job, 96, [96]).kept_parameters < 0.7 * result.targeted + 1
    ids = torch.tensor([result.probe["ids"]])
    measured = tiny.losses_of(tiny.load(tmp_path / "out"), ids)[0]
    torch.testing.assert_close(measured, torch.tensor(result.probe["nll"]), rtol=1e-5, atol=1e-5)


class Batched(nn.Module):
    """All experts at once, as Llama 4 multiplies: tokens that do not reach an expert are zeros there."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x):  # (experts, tokens, 8)
        return torch.bmm(x, self.gate_up_proj)


def test_of_a_batched_product_each_expert_gets_the_tokens_that_reach_it():
    module = type("Llama4TextExperts", (Batched,), {})()
    views = Block(0, "m.", nn.ModuleDict({"experts": module})).views()
    x = torch.randn(3, 5, 8)
    x[0, 2:], x[2] = 0, 0
    observer = InputObserver(views, frozenset({Need.GRAM}), torch.device("cpu"))
    with observer:
        module(x)
    assert {name: s.count for name, s in observer.stats.items()} == {
        "m.experts.gate_up_proj.0": 2, "m.experts.gate_up_proj.1": 5
    }  # fmt: skip
    own = x[0, :2].double()
    torch.testing.assert_close(observer.stats["m.experts.gate_up_proj.0"].gram, own.T @ own / 2, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_gradients_at_a_batched_product_are_those_of_the_tokens_that_reach_the_expert(folder, tmp_path):
    source = ModelSource(folder("llama4_text"), "llama4")
    views = {v.name for b in blocks(source) for v in b.views() if v.expert is not None}
    needs = frozenset({Need.OUTPUT_GRADIENT_DIAGONAL})
    found = {}
    for _, stats in backward(source, start(source, tiny.IDS), views, frozenset({Need.GRAM}), needs, tmp_path):
        found |= {name: s.gradient(Need.OUTPUT_GRADIENT_DIAGONAL) * s.inputs.count for name, s in stats.items()}
    model, name = tiny.load(folder("llama4_text")), next(n for n in found if "down_proj" in n)
    owner, _, expert = name.rpartition(".")
    module, kept = model.get_submodule(owner.rpartition(".")[0]), []
    bmm = torch.bmm

    def keeping(x, weight):
        output = bmm(x, weight)
        if weight is module.down_proj:
            output.retain_grad()
            kept.append(output)
        return output

    torch.bmm = keeping
    try:
        with torch.enable_grad():
            model.requires_grad_()
            logits = model(tiny.IDS, use_cache=False).logits[:, :-1].flatten(0, 1)
            nn.functional.cross_entropy(logits, tiny.IDS[:, 1:].flatten(), reduction="sum").backward()
    finally:
        torch.bmm = bmm
    at_weights = kept[0].grad[
        int(expert)
    ]  # what reaches no token of the expert has a gradient, too, and is not counted
    reached = (kept[0][int(expert)] != 0).any(-1)
    torch.testing.assert_close(found[name], at_weights[reached].double().square().sum(0), rtol=1e-4, atol=1e-12)


def test_experts_of_one_weight_are_factored_together_or_not_at_all(folder):
    for targets in ({"include": ["gate_up_proj.1"]}, {"skip": ["down_proj.0"]}):
        with pytest.raises(PareError, match="stored together: name all of"):
            source = ModelSource(folder("gpt_oss"), "m")
            resolve_job(source, Recipe.parse({"method": "svd_llm", "options": {"kept": 0.5}, "targets": targets}))


def test_an_expert_that_no_token_reaches_is_factored_without_data_and_named(folder, tmp_path, prune):
    for idle in ("data_free", "dense"):
        recipe = {"method": "paredown_lowrank", "options": {"kept": 0.7}, "idle": idle}
        text = type(tiny.TEXT)(tiny.IDS[:1, :3], "few", "all", "0")
        result, _ = prune(folder("gpt_oss"), tmp_path / idle, text=text, **recipe)
        told = [said for said in result.fallbacks if "no calibration token reached" in said]
        assert told and all("scored without data" in said for said in told)
        assert {said.partition(":")[0] for said in told} <= {layer["name"] for layer in result.layers}
        assert idle == "data_free" or all("beside factored ones" in said for said in told)
