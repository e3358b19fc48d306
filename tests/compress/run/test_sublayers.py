"""Attention and MLPs of single blocks: how they are found, which of them go, against the whole model, and what is written."""

import json
from contextlib import contextmanager

import pytest
import torch
import transformers as t

from paredown.compress import PareError, export, load, plan, verify
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.methods import build
from paredown.compress.model import stream as stream_module
from paredown.compress.model.blocks import blocks
from paredown.compress.model.stream import hidden_bytes, start
from paredown.compress.model.sublayers import find_sublayers, silent
from paredown.compress.recipe import Recipe
from paredown.compress.run.memory import smaller_parts
from paredown.compress.shape_job import resolve
from paredown.compress.survey.sublayers import chosen_sublayers

C = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 256,
    "eos_token_id": 256, "initializer_range": 0.2,
}  # fmt: skip
NEOX = {key: value for key, value in C.items() if key not in ("num_key_value_heads", "head_dim")}
OPT = {"vocab_size": 320, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GPT = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# by family: its config, the part of a block that mixes tokens, and the one that does not
FOUND = {
    "llama": (t.LlamaConfig(**C), "self_attn", "mlp"),
    "parallel": (t.GPTNeoXConfig(**NEOX), "attention", "mlp"),
    "one after the other": (t.GPTNeoXConfig(**NEOX, use_parallel_residual=False), "attention", "mlp"),
    "norm behind": (t.Olmo2Config(**C), "self_attn", "mlp"),
    "scaled": (t.GraniteConfig(**C, residual_multiplier=0.3), "self_attn", "mlp"),
    "mixture": (t.MixtralConfig(**C, num_local_experts=4), "self_attn", "mlp"),
    "gpt2": (t.GPT2Config(**GPT), "attn", "mlp"),
    "an MLP of layers of the block": (t.OPTConfig(**OPT, word_embed_proj_dim=32), "self_attn", None),
}
IDS = torch.randint(3, 250, (5, 14), generator=torch.Generator().manual_seed(0))
PRUNER = {"method": "block_pruner", "options": {"kept": 0.7, "windows": 2}}


@pytest.mark.parametrize("case", FOUND)
def test_attention_and_mlps_are_told_apart_in_any_family(case, tmp_path, save_model):
    config, mixing, other = FOUND[case]
    save_model(tmp_path / "m", config, torch.bfloat16)
    source = ModelSource(tmp_path / "m", "m")
    found = find_sublayers(source, blocks(source))
    layers = {name for s in found if (name := s.name.rpartition(".")[2])}
    assert layers == {mixing, other} - {None}
    assert all(s.mixes == (s.name.rpartition(".")[2] == mixing) for s in found)
    assert [s.block for s in found if s.mixes] == list(range(1, len(blocks(source))))  # not the first one's
    sizes = {name: tensor.numel() for name, tensor in source.parameters.items()}
    assert all(s.numbers == sum(n for name, n in sizes.items() if name.startswith(f"{s.name}.")) for s in found)


@pytest.mark.parametrize(
    "config",
    [
        t.BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4),  # its MLP adds the residual stream itself
        t.OpenAIGPTConfig(**GPT),  # norms lie on the residual stream
    ],
    ids=["bloom", "openai-gpt"],
)
def test_what_is_not_simply_added_is_refused_by_name(config, tmp_path, save_model):
    save_model(tmp_path / "m", config, torch.float32)
    source = ModelSource(tmp_path / "m", "m")
    with pytest.raises(
        PareError, match=f"no block of this {config.model_type} model has attention or an MLP that could"
    ):
        find_sublayers(source, blocks(source))


@contextmanager
def without(model, names):
    handles = []
    for name in names:
        hook = lambda m, args, y: (torch.zeros_like(y[0]), *y[1:]) if isinstance(y, tuple) else torch.zeros_like(y)  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(hook))
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def loss_of(model, gone, ids):
    with without(model, gone):
        logits = model(ids, use_cache=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("options", [{}, {"per_parameter": True}, {"which": "attention"}, {"which": "mlp"}])
def test_each_choice_is_the_best_one_left_by_the_loss_of_the_whole_model(options, tmp_path, save_model, monkeypatch):
    monkeypatch.setitem(stream_module.BATCH_TOKENS, "cpu", 28)
    model = save_model(tmp_path / "m", t.LlamaConfig(**C), torch.float64)
    recipe = Recipe.parse({"method": "block_pruner", "options": {"drop": 3, "windows": 4, **options}})
    job = resolve(ModelSource(tmp_path / "m", "m"), recipe)
    found = chosen_sublayers(job.source, job.blocks, IDS, job.method, job.sublayers, job.goes)
    names = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if name.endswith(("self_attn", "mlp")) and name != "model.layers.0.self_attn"
        and options.get("which", "any") in ("any", {"self_attn": "attention"}.get(name.rpartition(".")[2], "mlp"))
    }  # fmt: skip
    assert {s.name for s in job.sublayers} == set(names)
    gone = []
    for sublayer in found:
        before = loss_of(model, gone, IDS[:4])
        tried = {name: loss_of(model, [*gone, name], IDS[:4]) for name in names if name not in gone}
        if options.get("per_parameter"):
            tried = {name: (loss - before) / names[name] for name, loss in tried.items()}
        assert sublayer.name == min(tried, key=tried.get)
        gone.append(sublayer.name)
    assert len(gone) == 3


def test_a_share_is_met_as_nearly_as_whole_sublayers_can(tmp_path, save_model):
    save_model(tmp_path / "m", t.LlamaConfig(**C), torch.float32)
    source = ModelSource(tmp_path / "m", "m")
    for kept in (0.9, 0.6):
        job = resolve(source, Recipe.parse({"method": "block_pruner", "options": {"kept": kept}}))
        gone = chosen_sublayers(source, job.blocks, IDS[:1], job.method, job.sublayers, job.goes)
        sizes = [s.numbers for s in gone]
        assert abs(sum(sizes) - job.goes) <= max(s.numbers for s in job.sublayers) / 2
        assert job.goes == round(job.numbers * (1 - kept))
    parts = smaller_parts(job, 128, [])
    assert parts["activations"] == max(hidden_bytes(source, 128), 9 * hidden_bytes(source, 8))


@torch.no_grad()
def test_a_run_writes_a_packed_model_without_them_that_computes_so(tmp_path, save_model, run_raw):
    model = save_model(tmp_path / "model", t.LlamaConfig(**C), torch.float32)
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(PRUNER))
    planned = plan(tmp_path / "model", str(path))
    report = run_raw(tmp_path / "model", PRUNER)
    absent = report["structure"]["absent"]
    assert absent and verify(tmp_path / "out") == [] and report["format"] == "packed"
    assert abs(planned.kept_parameters - report["parameters"]["kept"]) <= 48 * 32 * 3 / 2
    assert any("no attention or no MLP" in remark for remark in planned.remarks)
    with without(model, absent):
        wanted = model(IDS).logits
    small = load(tmp_path / "out")
    torch.testing.assert_close(small(IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    text = small.generate(IDS[:1, :4], max_new_tokens=6, do_sample=False)  # with a cache, as without
    again = small.generate(IDS[:1, :4], max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(text, again)
    export(tmp_path / "out", tmp_path / "deci", "deci")
    settings = json.loads((tmp_path / "deci" / "config.json").read_text())["block_configs"]
    gone = [f"model.layers.{i}.{name}" for i, block in enumerate(settings) for name, kind in (("self_attn", "attention"), ("mlp", "ffn")) if block[kind]["no_op"]]  # fmt: skip
    assert sorted(gone) == sorted(absent)


def test_a_stopped_run_goes_on_to_the_same_bytes_and_blocks_are_tuned(tmp_path, save_model, run_raw):
    save_model(tmp_path / "model", t.LlamaConfig(**C), torch.float32)
    raw = {**PRUNER, "reconstruct": {"steps": 1, "batch": 2}}
    run_raw(tmp_path / "model", raw, "whole")

    class Stopped(Exception):
        pass

    def stop(done):
        if done.index == 1:
            raise Stopped

    with pytest.raises(Stopped):
        run_raw(tmp_path / "model", raw, progress=stop, save_every=0.0)
    run_raw(tmp_path / "model", raw, save_every=0.0)
    whole, again = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "out"))
    assert whole == again


def test_attention_goes_behind_a_stage_that_made_mlps_narrower(tmp_path, save_model, run_raw):
    """Both stages of 2SSP."""
    save_model(tmp_path / "model", t.LlamaConfig(**C), torch.float32)
    width = {"method": "two_ssp_width", "options": {"units": 40, "multiple": 8}}
    second = {"method": "block_pruner", "options": {"drop": 1, "which": "attention", "windows": 1}}
    structure = run_raw(tmp_path / "model", {"stages": [width, second]})["structure"]
    assert structure["units"] == {"intermediate_size": [48, 40]} and verify(tmp_path / "out") == []
    assert [name.rpartition(".")[2] for name in structure["absent"]] == ["self_attn"]


def test_how_much_goes_is_said_once_and_can_go(tmp_path, save_model):
    with pytest.raises(PareError, match="how much stays is not said: give kept"):
        build("block_pruner", {})
    with pytest.raises(PareError, match="kept and drop say how much stays in different ways"):
        build("block_pruner", {"kept": 0.5, "drop": 1})
    save_model(tmp_path / "m", t.LlamaConfig(**C), torch.float32)
    source = ModelSource(tmp_path / "m", "m")
    for options in ({"drop": 4, "which": "attention"}, {"kept": 0.5, "which": "attention"}):
        with pytest.raises(PareError, match=r"3 sublayers of m may go \(attention\)"):
            resolve(source, Recipe.parse({"method": "block_pruner", "options": options}))


def test_silence_ends(tmp_path, save_model):
    save_model(tmp_path / "m", t.LlamaConfig(**C), torch.float32)
    source = ModelSource(tmp_path / "m", "m")
    block, stream = blocks(source)[1], start(source, IDS)
    with source.loaded(block):
        before = stream.output(block, 0)
        with silent(block, ["model.layers.1.self_attn", "model.layers.1.mlp"]):
            assert torch.equal(stream.output(block, 0), stream.hidden[0])
        assert torch.equal(stream.output(block, 0), before)
