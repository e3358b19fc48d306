"""What layers that write to the residual stream make up for, and what is kept of a block meanwhile."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import transformers as t
from two_streams import FAMILIES, OPT, C, both, inputs_of, opened, opened_strong

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.methods import build
from paredown.compress.methods.lowrank.paredown_lowrank import ParedownLowRank
from paredown.compress.numerics.moments import PAIRED_NEEDS, Need
from paredown.compress.recipe import Recipe
from paredown.compress.run.pipeline import Run
from paredown.compress.survey import sides
from paredown.compress.survey.collect import groups, observe_both, shared_copy
from paredown.compress.survey.residual import ResidualLayers, silenced
from paredown.compress.survey.sides import KeptSide, Side, observe_paired, observe_residual

PARALLEL = t.GPTNeoXConfig(**C, use_parallel_residual=True)
WRITERS = {
    "llama": (FAMILIES["llama"][0], ["self_attn.o_proj", "mlp.down_proj"]),
    "qwen3": (FAMILIES["qwen3"][0], ["self_attn.o_proj", "mlp.down_proj"]),
    "phi3": (FAMILIES["phi3"][0], ["self_attn.o_proj", "mlp.down_proj"]),
    "opt": (FAMILIES["opt"][0], ["self_attn.out_proj", "fc2"]),
    "gpt2": (FAMILIES["gpt2"][0], ["attn.c_proj", "mlp.c_proj"]),
    "gpt_neox, one after the other": (
        t.GPTNeoXConfig(**C, use_parallel_residual=False),
        ["attention.dense", "mlp.dense_4h_to_h"],
    ),
    "gpt_neox, side by side": (PARALLEL, ["attention.dense", "mlp.dense_4h_to_h"]),
    "mamba": (FAMILIES["mamba"][0], ["mixer.out_proj"]),
    "falcon": (
        t.FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
        ["self_attention.dense", "mlp.dense_4h_to_h"],
    ),
    # a norm stands between the layer and the stream
    "gemma2": (t.Gemma2Config(**C, head_dim=16), []),
    "opt, norms last": (t.OPTConfig(**OPT, do_layer_norm_before=False), []),
    "wide queries": (t.LlamaConfig(**{**C, "num_key_value_heads": 4}), ["self_attn.o_proj", "mlp.down_proj"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", WRITERS)
def test_writers_are_the_layers_whose_output_is_added_to_the_stream(family, dtype, tmp_path, save_model, windows):
    config, wanted = WRITERS[family]
    _, block, walk = opened_strong(tmp_path / "m", config, save_model, windows.ids, 1, dtype)
    before = {name: p.clone() for name, p in block.module.named_parameters()}
    found = ResidualLayers.of(walk, block, groups(walk, block, block.views()))
    assert [v.name.removeprefix(block.prefix) for v in found.views] == wanted
    assert [[v.name for v in found.after(view)] for view in found.views] == [
        [v.name for v in found.views[i + 1 :]] for i in range(len(wanted))
    ]
    assert all(torch.equal(p, before[name]) for name, p in block.module.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox, side by side"])
def test_writers_of_a_block_are_those_of_an_earlier_one_of_its_kind(family, tmp_path, save_model, windows, monkeypatch):
    known, found, passes = {}, [], []
    for index in range(2):
        folder = tmp_path / str(index)
        _, block, walk = opened_strong(folder, WRITERS[family][0], save_model, windows.ids, index)
        in_order, output = groups(walk, block, block.views()), walk.output
        passes.append(0)
        monkeypatch.setattr(walk, "output", lambda *a, run=output: passes.append(passes.pop() + 1) or run(*a))
        layers = ResidualLayers.of(walk, block, in_order, known)
        assert layers == ResidualLayers.of(walk, block, in_order)
        found.append([v.name.removeprefix(block.prefix) for v in layers.views])
    assert found == [WRITERS[family][1]] * 2 and passes[1] < passes[0]
    # a kind of which less is known than is added to the stream
    known = {kind: set() for kind in known}
    assert ResidualLayers.of(walk, block, in_order, known) == layers and known == {next(iter(known)): set(found[0])}


def test_layers_that_only_feed_others_are_no_writers_though_they_are_as_wide(tmp_path, save_model, windows):
    _, block, walk = opened_strong(tmp_path / "m", WRITERS["wide queries"][0], save_model, windows.ids)
    for part in ("q_proj", "k_proj", "v_proj"):
        alone = [[v] for v in block.views() if v.name.endswith(part)]
        assert alone[0][0].shape == (64, 64) and not ResidualLayers.of(walk, block, alone).views


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-2, 1.0])
@pytest.mark.parametrize("family", ["llama", "gemma2", "wide queries"])
def test_writers_are_told_apart_where_the_stream_is_far_larger_than_what_they_add(
    family, scale, dtype, tmp_path, save_model, windows
):
    """As in the first blocks of real models, and after a few huge activations."""
    config, wanted = WRITERS[family]
    _, block, walk = opened_strong(tmp_path / "m", config, save_model, windows.ids, 0, dtype)
    for view in block.views():
        view.assign(view.weight * scale)
    walk.hidden = [hidden * 20 for hidden in walk.hidden]
    for hidden in walk.hidden:
        hidden[:, 0, 3] = 2000
    found = ResidualLayers.of(walk, block, groups(walk, block, block.views()))
    assert [v.name.removeprefix(block.prefix) for v in found.views] == wanted
    alone = [[v] for v in block.views() if v.name.endswith("v_proj")]
    assert not ResidualLayers.of(walk, block, alone).views


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_silent_layers_give_zeros_and_are_restored_to_the_bit(family, fails, tmp_path, save_model, windows):
    _, block, walk = opened_strong(tmp_path / "m", FAMILIES[family][0], save_model, windows.ids)
    before = {name: p.clone() for name, p in block.module.named_parameters()}
    layout = {name: p.stride() for name, p in block.module.named_parameters()}
    out = torch.cat(list(walk.outputs(block)))
    try:
        with silenced(block.views()):
            torch.testing.assert_close(torch.cat(list(walk.outputs(block))), torch.cat(walk.hidden), rtol=0, atol=0)
            if fails:
                raise InterruptedError
    except InterruptedError:
        assert fails
    after = dict(block.module.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name]) and parameter.stride() == layout[name], name
        assert isinstance(parameter, torch.nn.Parameter) and not parameter.requires_grad
    assert torch.equal(torch.cat(list(walk.outputs(block))), out)


def test_of_a_silent_layer_without_a_bias_none_is_made(tmp_path, save_model, windows):
    _, block, _ = opened_strong(tmp_path / "m", FAMILIES["llama"][0], save_model, windows.ids)
    with silenced(block.views()):
        assert all(v.module.bias is None for v in block.views())
    assert all(v.module.bias is None for v in block.views())


def streams_of(model, family, ids):
    """What stands in the residual stream of the second block before each of its two writers adds to it (tokens, width)."""
    found = {}
    layers = {"llama": "model.layers.1", "gpt2": "transformer.h.1", "gpt_neox": "gpt_neox.layers.1"}
    between = {"llama": "post_attention_layernorm", "gpt2": "ln_2"}
    block = model.get_submodule(layers[family.partition(",")[0]])
    hooks = [block.register_forward_pre_hook(lambda m, args: found.update(first=args[0]))]
    if family in between:
        norm = block.get_submodule(between[family])
        hooks.append(norm.register_forward_pre_hook(lambda m, args: found.update(second=args[0])))
    else:  # both read the block's input, and attention's output is added too
        hooks.append(
            block.attention.register_forward_hook(lambda m, args, out: found.update(second=found["first"] + out[0]))
        )
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [found[name].double().flatten(0, 1) for name in ("first", "second")]


@pytest.mark.parametrize("batch_tokens", [48, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox, side by side"])
def test_what_a_residual_stream_lost_is_that_of_hooks_on_two_whole_models(
    family, dtype, batch_tokens, tmp_path, save_model, windows
):
    config = WRITERS[family][0]
    model, twin, dense = opened_strong(tmp_path / "dense", config, save_model, windows.ids, 1, dtype, batch_tokens)
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter += (0.3 * torch.randn(parameter.shape, generator=draw) * parameter.float().std()).to(dtype)
    other.save_pretrained(tmp_path / "other")
    _, block, walk = opened(tmp_path / "other", windows.ids, 1, batch_tokens)
    writers = ResidualLayers.of(walk, block, groups(walk, block, block.views()))
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (1e-2, 1e-2)
    before = [streams_of(m, family, windows.ids) for m in (model, other)]
    assert len(writers.views) == 2
    for view, theirs, mine in zip(writers.views, *before, strict=True):
        stats = observe_residual(*both(walk, dense, block, twin, writers), view, PAIRED_NEEDS)
        x, y = inputs_of(model, view.name, windows.ids), inputs_of(other, view.name, windows.ids)
        lost = theirs - mine
        assert lost.norm() > 0.05 * theirs.norm() and stats.inputs.count == len(y)
        lost = lost + (x - y) @ view.weight.double().T
        wanted = {
            "missing": lost.T @ y / len(y), "missing_mean": lost.mean(0), "gram": y.T @ y / len(y), "mean": y.mean(0),
        }  # fmt: skip
        for name, value in wanted.items():
            found = getattr(stats.residual if name.startswith("missing") else stats.inputs, name)
            scale = float(value.abs().max())
            torch.testing.assert_close(found, value, rtol=rtol, atol=atol * scale, msg=f"{view.name} {name}")
            assert found.dtype == torch.float64


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox, side by side", "opt"])
def test_between_equal_blocks_nothing_is_lost(family, tmp_path, save_model, windows):
    _, block, walk = opened_strong(tmp_path / "m", WRITERS[family][0], save_model, windows.ids)
    twin, before = shared_copy(block), torch.cat(list(walk.outputs(block)))
    writers = ResidualLayers.of(walk, block, groups(walk, block, block.views()))
    for view in writers.views:
        stats = observe_residual(*both(walk, walk.copy(), block, twin, writers), view, PAIRED_NEEDS)
        assert not stats.residual.missing.any() and not stats.residual.missing_mean.any()
        paired = observe_paired(*both(walk, walk.copy(), block, twin), view, PAIRED_NEEDS)
        for name in PAIRED_NEEDS - {"cross"}:  # of which `missing` is all that a wide weight needs
            assert torch.equal(getattr(stats.inputs, name), getattr(paired.inputs, name)), name
    for one in (block, twin):
        assert torch.equal(torch.cat(list(walk.outputs(one))), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox, side by side", "opt"])
def test_what_is_kept_of_a_block_and_a_pass_for_each_layer_are_the_same(family, dtype, tmp_path, save_model, windows):
    _, block, walk = opened_strong(tmp_path / "m", WRITERS[family][0], save_model, windows.ids, 1, dtype, 48)
    in_order = groups(walk, block, block.views())
    writers = ResidualLayers.of(walk, block, in_order)
    assert writers.alone
    kept = KeptSide(walk.copy(), block, writers, [group[0].name for group in in_order])
    part, whole = Side(walk, block, writers), Side(walk, block, replace(writers, alone=False))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for i in range(len(walk.hidden)):
        for group in in_order:
            assert torch.equal(kept.input(group[0].name, i), part.input(group[0].name, i))
        for view in writers.views:
            found, again, other = (side.input_and_rest(view.name, i) for side in (kept, part, whole))
            assert all(map(torch.equal, found, again)) and torch.equal(found[0], other[0])
            torch.testing.assert_close(found[1], other[1], **tolerance)
    wanted = torch.cat(list(walk.outputs(block)))
    for side in (kept, Side(walk.copy(), block, writers)):
        side.advance()
        assert torch.equal(torch.cat(side.stream.hidden), wanted)


def test_up_to_a_writer_a_block_runs_no_further(tmp_path, save_model, windows):
    _, block, walk = opened_strong(tmp_path / "m", FAMILIES["llama"][0], save_model, windows.ids)
    writers = ResidualLayers.of(walk, block, groups(walk, block, block.views()))
    block.module.mlp.register_forward_pre_hook(lambda m, args: pytest.fail("the MLP was run"))
    x, rest = Side(walk, block, writers).input_and_rest(writers.views[0].name, 0)
    assert x is not None and torch.equal(rest, walk.hidden[0].float())


def test_a_block_that_adds_more_than_its_known_writers_do_is_run_whole(tmp_path, save_model, windows):
    """Of a layer that is no target nothing is known, and its output is in the stream."""
    _, block, walk = opened_strong(tmp_path / "m", FAMILIES["llama"][0], save_model, windows.ids)
    last = [v for v in block.views() if v.name.endswith("down_proj")]
    writers = ResidualLayers.of(walk, block, [last])
    assert writers.views == last and not writers.alone
    side = sides.dense_side(walk, block, writers, last, [], 2**30)
    assert type(side) is Side
    with silenced(last):
        wanted = walk.output(block, 0).float()
    torch.testing.assert_close(side.input_and_rest(last[0].name, 0)[1], wanted, rtol=1e-5, atol=1e-5)


def test_no_more_is_kept_than_may_be(tmp_path, save_model, windows):
    save_model(tmp_path / "m", t.LlamaConfig(**C))
    _, block, walk = opened(tmp_path / "m", windows.ids)
    firsts = [group[0] for group in groups(walk, block, block.views())]
    bytes_ = sides.kept_bytes(firsts, windows.tokens, 2)
    assert bytes_ == 2 * windows.tokens * (64 + 64 + 64 + 96)
    for most, kind in ((bytes_, KeptSide), (bytes_ - 1, Side)):
        assert type(sides.dense_side(walk.copy(), block, ResidualLayers([]), firsts, [], most)) is kind
        planned = [sides.held_bytes(firsts, windows.tokens, 2, torch.device(on), most) for on in ("cpu", "cuda")]
        assert planned == ([bytes_, bytes_] if kind is KeptSide else [2 * most, 0])


@pytest.mark.parametrize(("free", "room"), [(None, 2**29), (2**30, 2**29), (2**35, (2**35 - 2**30) // 6)])
def test_more_is_kept_where_more_memory_is_free(free, room, monkeypatch):
    monkeypatch.setattr(sides, "available_memory", lambda: free)
    assert sides.kept_room(torch.device("cpu"), 2**30) == room
    assert sides.kept_room(torch.device("cuda"), 2**30) == 2**29


def test_a_writer_whose_inputs_are_not_finite_is_named(tmp_path, save_model, windows):
    _, block, walk = opened_strong(tmp_path / "m", FAMILIES["llama"][0], save_model, windows.ids)
    twin = shared_copy(block)
    view = next(v for v in block.views() if v.name.endswith("down_proj"))
    block.module.mlp.gate_proj.weight = torch.nn.Parameter(torch.full((96, 64), torch.inf), requires_grad=False)
    with pytest.raises(PareError, match=r"layers.0.mlp.down_proj: its inputs hold NaN"):
        observe_residual(*both(walk, walk, block, twin, ResidualLayers([view])), view, PAIRED_NEEDS)


def disturbed(walk, seed=0):
    """The stream as a compressed model might hand it on: some of it lost, noise in it."""
    other, draw = walk.copy(), torch.Generator().manual_seed(seed)
    for i, hidden in enumerate(other.hidden):
        noise = torch.randn(hidden.shape, generator=draw) * hidden.std()
        other.hidden[i] = 0.8 * hidden + 0.3 * hidden.roll(1, -1) + 0.2 * noise
    return other


def block_error(walk, dense, block, twin):
    made, wanted = (torch.cat(list(s.outputs(b))).double() for s, b in ((walk, block), (dense, twin)))
    return float((made - wanted).square().mean() / wanted.var())


def edited(walk, dense, block, twin, method, chosen):
    """As the pipeline goes: group by group, each edit in place before the next is observed."""
    views = [v for v in block.views() if v.name.endswith(chosen)]
    needs, residual = method.needs & PAIRED_NEEDS, Need.RESIDUAL in method.needs
    for group, stats in observe_both(walk, dense.copy(), block, twin, views, needs, residual):
        for view in group:
            view.assign(method.compress(view.weight, stats[view.name]).dense())
    return block_error(walk, dense, block, twin)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox, side by side"])
@pytest.mark.parametrize("kept", [0.4, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_making_up_for_what_the_stream_lost_brings_the_block_nearer_to_the_dense_one(
    seed, kept, family, tmp_path, save_model, windows
):
    """Strictly for the last writer alone, of which the error is the block's; on these data for a whole block too."""
    _, block, dense = opened_strong(tmp_path / "m", WRITERS[family][0], save_model, windows.ids)
    twin, walk = shared_copy(block), disturbed(dense, seed)
    weights = {v.name: v.weight for v in block.views()}
    last = WRITERS[family][1][-1]
    for chosen in (last, ("proj", "dense", "h_to_4h", "4h_to_h", "query_key_value", "c_attn", "c_fc")):
        lost = []
        for residual in (True, False):
            options = {"kept": kept, "affine": False, "two_sided": False, "residual": residual, "damping": 1e-4}
            method = build("paredown_lowrank", options)
            lost.append(edited(walk, dense, block, twin, method, chosen))
            for view in block.views():
                view.assign(weights[view.name])
        assert lost[0] < 0.98 * lost[1], chosen


def test_what_the_stream_lost_is_asked_of_writers_alone_with_the_later_ones_silent(tmp_path, save_model, windows):
    _, block, dense = opened_strong(tmp_path / "m", FAMILIES["llama"][0], save_model, windows.ids)
    twin, walk = shared_copy(block), disturbed(dense)
    views = {v.name.removeprefix(block.prefix): v for v in block.views()}
    writers = ResidualLayers([views["self_attn.o_proj"], views["mlp.down_proj"]], alone=True)
    wanted = {
        view.name: observe_residual(*both(walk, dense, block, twin, writers), view, PAIRED_NEEDS).residual
        for view in writers.views
    }
    for residual in (True, False):
        found = {}
        for _, stats in observe_both(walk, dense.copy(), block, twin, list(views.values()), PAIRED_NEEDS, residual):
            found |= stats
        assert found.keys() == {v.name for v in views.values()}
        assert {name for name, s in found.items() if s.residual is not None} == (wanted.keys() if residual else set())
        for name in wanted if residual else ():
            assert torch.equal(found[name].residual.missing, wanted[name].missing)
            assert torch.equal(found[name].residual.missing_mean, wanted[name].missing_mean)


@dataclass(frozen=True)
class Watching(ParedownLowRank):
    """Keeps of each layer, in the order in which they are compressed, whether it is told what the stream lost."""

    told: ClassVar[list[bool]] = []

    def compress(self, weight, stats):
        self.told.append(stats.residual is not None)
        return super().compress(weight, stats)


@pytest.mark.parametrize("options", [{}, {"residual": False}, {"regression": False}])
def test_a_run_asks_what_the_stream_lost_of_writers_alone_and_where_the_method_needs_it(
    options, tmp_path, save_model, windows
):
    save_model(tmp_path / "m", FAMILIES["llama"][0], torch.float32)
    options, Watching.told = {"kept": 0.6, **options}, []
    recipe = Recipe.parse({"method": "paredown_lowrank", "options": options, "allocation": {"strategy": "uniform"}})
    job = replace(resolve_job(ModelSource(tmp_path / "m", "m"), recipe), method=Watching(**options))
    with CheckpointWriter(tmp_path / "out") as writer:
        result = Run(job, windows, [windows], writer).run()
    assert len(Watching.told) == len(result.layers) == 14
    writers = [layer["name"] for layer, told in zip(result.layers, Watching.told, strict=True) if told]
    o, down = ([f"model.layers.{i}.{part}" for i in range(2)] for part in ("self_attn.o_proj", "mlp.down_proj"))
    assert writers == ([] if "residual" in options or "regression" in options else [o[0], down[0], o[1], down[1]])
