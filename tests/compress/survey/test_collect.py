"""Two streams side by side: whose inputs are shared, what they are, and that the twin stays dense."""

from functools import partial

import pytest
import torch
import transformers as t
from two_streams import FAMILIES, C, altered, both, inputs_of, opened

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.stream import start
from paredown.compress.numerics.moments import PAIRED_NEEDS
from paredown.compress.survey.collect import groups, observe, shared_copy
from paredown.compress.survey.sides import observe_paired


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_with_one_input_are_one_group_in_the_order_of_the_calls(family, tmp_path, save_model, windows):
    config, wanted = FAMILIES[family]
    model = save_model(tmp_path / "m", config)
    _, block, walk = opened(tmp_path / "m", windows.ids)
    found = groups(walk, block, block.views()[::-1])  # whatever order they are asked in
    assert [sorted(v.name.rpartition(".")[2] for v in group) for group in found] == [sorted(part) for part in wanted]
    called = []
    for view in block.views():
        model.get_submodule(view.name).register_forward_hook(lambda m, args, out, name=view.name: called.append(name))
    with torch.no_grad():
        model(windows.ids[:1], use_cache=False)
    assert [v.name for group in found for v in group] == called
    assert torch.equal(torch.cat(walk.hidden), torch.cat(start(ModelSource(tmp_path / "m", "m"), windows.ids).hidden))


def test_groups_hold_only_what_is_asked_for_and_what_is_never_called_comes_last(tmp_path, save_model, windows):
    save_model(tmp_path / "m", t.LlamaConfig(**C))
    _, block, walk = opened(tmp_path / "m", windows.ids)
    some = [v for v in block.views() if v.name.endswith(("down_proj", "k_proj", "v_proj"))]
    assert [[v.name.rpartition(".")[2] for v in g] for g in groups(walk, block, some)] == [
        ["k_proj", "v_proj"],
        ["down_proj"],
    ]
    attention = block.module.self_attn
    attention.k_proj.forward = partial(by_hand, attention.k_proj)  # multiplies in a way that is no product
    found = [[v.name.rpartition(".")[2] for v in g] for g in groups(walk, block, some)]
    assert found == [["v_proj"], ["down_proj"], ["k_proj"]]


def by_hand(linear, x):
    return (x.unsqueeze(-2) * linear.weight).sum(-1)


def test_each_expert_is_a_group_of_its_own(tmp_path, save_model, windows):
    save_model(tmp_path / "m", t.MixtralConfig(**C, num_local_experts=4))
    _, block, walk = opened(tmp_path / "m", windows.ids)
    found = [[v.name.removeprefix(block.prefix) for v in g] for g in groups(walk, block, block.views())]
    assert found[:2] == [[f"self_attn.{part}_proj" for part in "qkv"], ["self_attn.o_proj"]]
    assert found[2:] == [[f"mlp.experts.{part}.{e}"] for e in range(4) for part in ("gate_up_proj", "down_proj")]


@pytest.mark.parametrize("batch_tokens", [48, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_paired_moments_are_those_of_hooks_on_two_whole_models(dtype, batch_tokens, tmp_path, save_model, windows):
    """In the second block: both what comes from the first one and the block's own edits differ."""
    model = save_model(tmp_path / "dense", t.LlamaConfig(**C), dtype)
    other = altered(model)
    other.save_pretrained(tmp_path / "other")
    _, twin, dense = opened(tmp_path / "dense", windows.ids, 1, batch_tokens)
    _, block, walk = opened(tmp_path / "other", windows.ids, 1, batch_tokens)
    rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (1e-2, 1e-3)
    for group in groups(walk, block, block.views()):
        stats = observe_paired(*both(walk, dense, block, twin), group[0], PAIRED_NEEDS).inputs
        assert stats.count == windows.tokens
        for view in group:
            x, y = inputs_of(model, view.name, windows.ids), inputs_of(other, view.name, windows.ids)
            assert (x - y).norm() > 0.05 * x.norm()
            wanted = {
                "gram": y.T @ y / len(y), "cross": x.T @ y / len(y), "mean": y.mean(0), "dense_mean": x.mean(0),
                "absolute_mean": y.abs().mean(0), "second_moment_diagonal": y.square().mean(0),
            }  # fmt: skip
            for name, value in wanted.items():
                scale = float(value.abs().max())
                torch.testing.assert_close(
                    getattr(stats, name), value, rtol=rtol, atol=atol * scale, msg=f"{view.name} {name}"
                )


def test_paired_moments_of_two_equal_streams_are_those_of_one(tmp_path, save_model, windows):
    save_model(tmp_path / "m", t.LlamaConfig(**C))
    _, block, walk = opened(tmp_path / "m", windows.ids)
    alone = observe(walk, block, block.views(), frozenset({"gram", "mean"}))
    for group in groups(walk, block, block.views()):
        stats = observe_paired(*both(walk, walk.copy(), block, shared_copy(block)), group[0], PAIRED_NEEDS).inputs
        assert torch.equal(stats.gram, alone[group[0].name].inputs.gram) and torch.equal(stats.dense_mean, stats.mean)
        torch.testing.assert_close(stats.cross, stats.gram, rtol=1e-6, atol=1e-9)


def test_a_block_runs_only_as_far_as_the_input_that_is_wanted(tmp_path, save_model, windows):
    save_model(tmp_path / "m", t.LlamaConfig(**C))
    _, block, walk = opened(tmp_path / "m", windows.ids)
    block.module.mlp.register_forward_pre_hook(lambda m, args: pytest.fail("the MLP was run"))
    group = [v for v in block.views() if v.name.endswith("o_proj")]
    sides_of = both(walk, walk, block, shared_copy(block))
    assert observe_paired(*sides_of, group[0], PAIRED_NEEDS).inputs.count == windows.tokens


def test_a_layer_that_no_token_reaches_has_no_paired_moments(tmp_path, save_model, windows):
    save_model(tmp_path / "m", t.LlamaConfig(**C))
    _, block, walk = opened(tmp_path / "m", windows.ids)
    twin, attention = shared_copy(block), block.module.self_attn
    attention.k_proj.forward = partial(by_hand, attention.k_proj)
    group = [v for v in block.views() if v.name.endswith("k_proj")]
    assert observe_paired(*both(walk, walk, block, twin), group[0], PAIRED_NEEDS) is None


def test_inputs_that_are_not_finite_name_the_layer(tmp_path, save_model, windows):
    save_model(tmp_path / "m", t.LlamaConfig(**C))
    _, block, walk = opened(tmp_path / "m", windows.ids)
    block.module.mlp.gate_proj.weight = torch.nn.Parameter(
        torch.full((96, 64), torch.inf).bfloat16(), requires_grad=False
    )
    group = [v for v in block.views() if v.name.endswith("down_proj")]
    with pytest.raises(PareError, match=r"layers.0.mlp.down_proj: its inputs hold NaN"):
        observe_paired(*both(walk, walk, block, shared_copy(block)), group[0], PAIRED_NEEDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_twin_shares_memory_and_stays_dense_while_the_block_is_edited(family, tmp_path, save_model, windows):
    save_model(tmp_path / "m", FAMILIES[family][0])
    _, block, walk = opened(tmp_path / "m", windows.ids)
    before = torch.cat(list(walk.outputs(block)))
    twin = shared_copy(block)
    tensors = dict(block.module.named_parameters()) | dict(block.module.named_buffers())
    theirs = dict(twin.module.named_parameters()) | dict(twin.module.named_buffers())
    assert tensors.keys() == theirs.keys() and twin.prefix == block.prefix and twin.index == block.index
    assert all(theirs[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    assert all(a is not b for a, b in zip(block.module.modules(), twin.module.modules(), strict=True))
    for view in block.views():
        view.assign(torch.zeros_like(view.weight))
    assert not torch.equal(torch.cat(list(walk.outputs(block))), before)
    assert torch.equal(torch.cat(list(walk.outputs(twin))), before)


def test_the_twin_of_a_mixture_stays_dense_too(tmp_path, save_model, windows):
    save_model(tmp_path / "m", t.MixtralConfig(**C, num_local_experts=4))
    _, block, walk = opened(tmp_path / "m", windows.ids)
    before, twin = torch.cat(list(walk.outputs(block))), shared_copy(block)
    for view in block.views():
        view.assign(torch.zeros_like(view.weight))
    assert torch.equal(torch.cat(list(walk.outputs(twin))), before)
