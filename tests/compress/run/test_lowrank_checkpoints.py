"""Checkpoints of factors, from every family that stores them in another way: written, loaded, converted, damaged."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import TensorFiles, sha256
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.model.blocks import blocks
from paredown.compress.numerics.perplexity import perplexity
from paredown.compress.recipe import Recipe
from paredown.compress.run.compress import compress
from paredown.compress.run.export import export_source
from paredown.compress.run.plan import make_plan
from paredown.compress.run.result import Result
from paredown.compress.run.verify import verify
from paredown.compress.storage.kinds import kind_of
from paredown.compress.storage.spec import Spec

C = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {"ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
FAMILIES = {
    "llama": t.LlamaConfig(**C),
    "llama tied": t.LlamaConfig(**C, tie_word_embeddings=True),
    "qwen2": t.Qwen2Config(**C),
    "opt": t.OPTConfig(vocab_size=128, hidden_size=32, word_embed_proj_dim=32, **OPT),
    "gpt2": t.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": t.GPTNeoXConfig(**C),
    "falcon": t.FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "mixtral": t.MixtralConfig(**C, num_local_experts=4),
    "mamba": t.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4),
}
BIASED = ("opt", "gpt2", "gpt_neox")  # every linear has a bias of its own; of Qwen2's only q, k and v
METHODS = {
    "svd_llm": {"method": "svd_llm", "options": {"kept": 0.6}},
    "svd_llm pifa": {"method": "svd_llm", "options": {"kept": 0.6, "storage": "pifa"}},
    "rom": {"method": "rom", "options": {"kept": 0.6}},
    "rom pifa": {"method": "rom", "options": {"kept": 0.6, "storage": "pifa"}},
    "cur": {"method": "cur", "options": {"blocks": None}},
    "sparse_low_rank": {"method": "sparse_low_rank", "options": {"sparsity": "2:4", "rank": 2, "rounds": 2}},
    "paredown_lowrank": {"method": "paredown_lowrank", "options": {"kept": 0.6, "affine": True}},
}
KIND = {
    "svd_llm": "lowrank", "svd_llm pifa": "pifa", "rom": "lowrank", "rom pifa": "pifa", "cur": "cur",
    "sparse_low_rank": "sparse24_lowrank", "paredown_lowrank": "pifa",
}  # fmt: skip

AFFINE = ["rom", "paredown_lowrank"]
# every method on a Linear and on a Conv1D; elsewhere what a family's biases, ties, experts or own products may upset
PAIRS = [
    *(("llama", method) for method in METHODS),
    *(("gpt2", method) for method in METHODS),
    *((family, method) for family in FAMILIES if family not in ("llama", "gpt2") for method in AFFINE),
    ("llama tied", "svd_llm pifa"), ("qwen2", "sparse_low_rank"), ("opt", "cur"), ("gpt_neox", "svd_llm"),
    ("falcon", "cur"), ("falcon", "svd_llm pifa"), ("mixtral", "svd_llm"), ("mixtral", "sparse_low_rank"),
    ("mamba", "svd_llm pifa"), ("mamba", "sparse_low_rank"),
]  # fmt: skip

pairs = pytest.mark.parametrize(("family", "method"), PAIRS)


@dataclass
class Made:
    """One run: the dense model's folder, the checkpoint's, and what was measured."""

    model: Path
    out: Path
    result: Result
    bytes: int

    @property
    def edited(self):
        return {layer["name"] for layer in self.result.layers}


@pytest.fixture(scope="module")
def made(tmp_path_factory, save_model, prune):
    """`made(family, method)`: a run through the pipeline, each done once."""
    root = tmp_path_factory.mktemp("lowrank")

    @cache
    def model(family, dtype):
        folder = root / f"{family} {dtype}"
        whole = save_model(folder, FAMILIES[family], dtype)
        for name, parameter in whole.named_parameters():  # all of which transformers begins with zeros
            if name.endswith("bias"):
                parameter.data.normal_(std=0.1)
        whole.save_pretrained(folder)
        return folder

    @cache
    def run(family, method, format, dtype):
        out = root / f"{family} {method} {format} {dtype}"
        result, writer = prune(model(family, dtype), out, format=format, **METHODS[method])
        return Made(model(family, dtype), out, result, writer.bytes)

    return lambda family, method, format="packed", dtype=torch.bfloat16: run(family, method, format, dtype)


@cache
def loaded(folder):
    return transformers_plugin.load(folder, experts_implementation="eager").eval()


@torch.no_grad()
def logits(folder, ids):
    return loaded(folder)(ids, use_cache=False).logits


def losses(folder, ids):
    """Per next token (windows, length - 1), by transformers' own forward."""
    found = logits(folder, ids)[:, :-1].float().flatten(0, 1)
    return cross_entropy(found, ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def numbers(folder):
    """How many floating-point numbers the files of a checkpoint hold."""
    return sum(prod(e.shape) for e in TensorFiles(folder).entries.values() if e.dtype.is_floating_point)


def specs(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]


def multiplied_out(folder):
    """Each packed layer's weight (out, in), from the tensors in the files."""
    tensors, weights = load_file(folder / "model.safetensors"), {}
    for name, raw in specs(folder).items():
        spec = Spec.from_json(name, raw)
        kind = kind_of(spec.kind)
        weights[name] = kind.unpack({part: tensors[f"{name}.{part}"] for part in kind.tensors}, spec.shape)
    return weights


def linears(folder):
    """Name -> (layer, its own bias or None) of every matrix that can be targeted."""
    source = ModelSource(folder, "m")
    return {v.name: (v.module, v.bias) for b in blocks(source) for v in b.views()}


def vectors(folder):
    """Biases, norms and the like by the skeleton's names."""
    source = ModelSource(folder, "m")
    return {name: w for name, w in source.read(source.parameters).items() if w.dim() == 1 and w.is_floating_point()}


def convert(folder, out, format):
    return export_source(ModelSource(folder, folder.name), out, format)


def nothing_left(out):
    return not out.exists() and not out.with_name(out.name + ".partial").exists()


@pairs
def test_what_is_loaded_loses_bit_for_bit_what_the_run_measured(family, method, made, windows):
    done = made(family, method)
    ids = torch.tensor([done.result.probe["ids"]])
    assert losses(done.out, ids)[0].tolist() == done.result.probe["nll"]
    measured = done.result.evaluation[0]
    assert perplexity(losses(done.out, windows.ids)) == measured["after"] != measured["before"]
    assert {spec["kind"] for spec in specs(done.out).values()} == {KIND[method]}


@pairs
def test_a_model_that_is_saved_again_is_the_same_and_generates(family, method, made, windows, tmp_path):
    done = made(family, method)
    model = loaded(done.out)
    model.save_pretrained(tmp_path / "again")
    assert specs(tmp_path / "again") == specs(done.out)
    assert torch.equal(logits(done.out, windows.ids), logits(tmp_path / "again", windows.ids))
    assert model.generate(windows.ids[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 27)


def products_of_two(shapes, run):
    """How many matrix products of two matrices of these shapes, or transposed ones, a call makes."""
    shapes = {size for shape in shapes for size in (tuple(shape), tuple(shape[::-1]))}
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile,
    ):
        run()
    factors = [e.input_shapes for e in profile.events() if e.name in ("aten::mm", "aten::addmm", "aten::matmul")]
    matrices = [[tuple(size) for size in sizes if len(size) == 2] for sizes in factors]
    return sum(len(sizes) == 2 and set(sizes) <= shapes for sizes in matrices)


@pairs
def test_factors_are_never_multiplied_out_while_the_model_runs(family, method, made, windows):
    done = made(family, method)
    model, entries = loaded(done.out), TensorFiles(done.out).entries
    stored = [
        entries[f"{name}.{part}"].shape
        for name, raw in specs(done.out).items()
        for part in kind_of(raw["kind"]).tensors
    ]
    stored = [shape for shape in stored if len(shape) == 2]
    tokens = next(n for n in range(5, 24) if not any(n in shape for shape in stored))
    assert not products_of_two(stored, lambda: model(windows.ids[:1, :tokens], use_cache=False))
    layers = [model.get_submodule(name) for name, raw in specs(done.out).items() if raw["layout"] != "experts"]
    assert products_of_two(stored, lambda: [layer.weight for layer in layers]) >= len(layers)


@pairs
def test_the_numbers_told_are_those_in_the_files_and_no_layer_is_left_out_untold(family, method, made):
    done = made(family, method)
    result, edited = done.result, done.edited
    assert numbers(done.out) == numbers(done.model) - result.targeted + result.numbers
    gone = set(ModelSource(done.model, "m").parameters) - set(TensorFiles(done.out).entries)
    views = {v.name: v for b in blocks(ModelSource(done.model, "m")) for v in b.views()}
    assert set(result.specs) == set(specs(done.out)) == {views[name].owner for name in edited}
    assert {views[name].stored_name for name in edited} == gone
    assert done.bytes == sum(e.bytes for e in TensorFiles(done.out).entries.values())
    told = {said.partition(":")[0] for said in result.fallbacks}
    assert edited | told == set(linears(done.model)) and not edited & told


@pairs
def test_what_was_written_is_sound(family, method, made):
    assert verify(made(family, method).out) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", AFFINE)
def test_a_bias_is_added_only_where_there_is_none_and_changed_where_there_is(family, method, made):
    done = made(family, method)
    own = {name: bias is not None for name, (_, bias) in linears(done.model).items()}
    before, after = vectors(done.model), vectors(done.out)
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert changed <= {f"{name}.bias" for name in done.edited}
    assert {name for name, spec in specs(done.out).items() if spec.get("bias")} == {
        name for name in done.edited if f"{name}.bias" in changed and not own[name]
    }
    if method == "rom":  # paredown_lowrank adds one where it pays, and experts cannot have one
        assert len(changed) == sum(".experts." not in name for name in done.edited)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "falcon"])
@pytest.mark.parametrize("method", ["rom", "rom pifa"])
def test_with_its_bias_a_layers_mean_output_is_the_dense_ones(family, method, made, windows):
    """Of the first layers, whose input no compression has changed."""
    done = made(family, method, dtype=torch.float32)
    first = {"falcon": "query_key_value", "gpt2": "c_attn"}
    name = next(name for name in linears(done.model) if name.endswith(first.get(family, "q_proj")))
    means = []
    for folder in (done.model, done.out):
        hook = loaded(folder).get_submodule(name).register_forward_hook(lambda m, x, y: means.append(y.mean((0, 1))))
        logits(folder, windows.ids)
        hook.remove()
    assert name in done.edited
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [method for family, method in PAIRS if family == "mixtral"])
def test_fused_experts_are_factored_with_one_rank_for_all_of_a_weight(method, made):
    done = made("mixtral", method)
    experts = {name for name in linears(done.model) if ".experts." in name}
    ranks = {}
    for layer in done.result.layers:
        if layer["name"] in experts:
            ranks.setdefault(layer["name"].rpartition(".")[0], []).append(layer["rank"])
    assert len(ranks) == 4 and all(len(own) == 4 and len(set(own)) == 1 for own in ranks.values())
    for name, own in ranks.items():
        spec = specs(done.out)[name]
        assert (spec["layout"], spec["shape"][0], spec["rank"]) == ("experts", 4, own[0])
    dense = load_file(done.model / "model.safetensors")
    assert not any(".experts." in name and name in dense for name in load_file(done.out / "model.safetensors"))


def test_a_weight_of_which_both_parts_would_store_no_less_stays_dense_and_is_named(made, prune, tmp_path):
    model = made("llama", "svd_llm").model
    options = {"sparsity": "2:4", "rank": 16}  # of weights with 32 rows or columns
    result, writer = prune(model, tmp_path / "out", method="sparse_low_rank", options=options)
    assert not result.layers and result.numbers == result.targeted and verify(tmp_path / "out") == []
    assert {said.partition(":")[0] for said in result.fallbacks if "left dense" in said} == set(linears(model))
    before, after = (load_file(folder / "model.safetensors") for folder in (model, writer.out))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


EXPORTED = [
    ("llama", "svd_llm"), ("llama tied", "svd_llm pifa"), ("qwen2", "sparse_low_rank"), ("opt", "paredown_lowrank"),
    ("gpt2", "rom"), ("gpt2", "cur"), ("gpt_neox", "rom"), ("falcon", "cur"), ("mixtral", "svd_llm"),
    ("mamba", "svd_llm pifa"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "method", "dtype"),
    [*((*pair, torch.bfloat16) for pair in EXPORTED), *((*pair, torch.float32) for pair in EXPORTED[1::2])],
    ids=str,
)
def test_export_multiplies_the_factors_back(family, method, dtype, made, windows, tmp_path):
    done = made(family, method, dtype=dtype)
    told = convert(done.out, tmp_path / "dense", "dense")
    assert told["bytes"]["after"] == sum(e.bytes for e in TensorFiles(done.model).entries.values())
    plain = t.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto", experts_implementation="eager")
    assert type(plain) is type(loaded(done.model))
    for name, weight in multiplied_out(done.out).items():
        module = getattr(plain.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        found = getattr(module, "weight", module)  # of experts it is the parameter itself
        assert torch.equal(found.T if type(module).__name__ == "Conv1D" else found, weight), name
    kept = loaded(done.out).state_dict()
    others = {n: w for n, w in plain.state_dict().items() if n.removesuffix(".weight") not in specs(done.out)}
    assert all(torch.equal(w, kept[name]) for name, w in others.items())
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(logits(tmp_path / "dense", windows.ids), logits(done.out, windows.ids), **close)
    assert verify(tmp_path / "dense") == []
    assert json.loads((tmp_path / "dense" / "paredown.json").read_text())["format"] == "dense"
    assert TensorFiles(tmp_path / "dense").entries.keys() == TensorFiles(done.model).entries.keys()


def test_export_refuses_biases_that_the_family_has_no_place_for(made, tmp_path):
    added = [name for name, spec in specs(made("qwen2", "rom").out).items() if spec.get("bias")]
    with pytest.raises(PareError, match=r"carries a bias that an ordinary qwen2 checkpoint cannot hold .*affine=false"):
        convert(made("qwen2", "rom").out, tmp_path / "dense", "dense")
    assert added and nothing_left(tmp_path / "dense")


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_export_switches_a_setting_on_that_gives_the_family_biases(family, made, windows, tmp_path):
    done = made(family, "rom", dtype=torch.float32)
    assert any(spec.get("bias") for spec in specs(done.out).values())
    convert(done.out, tmp_path / "dense", "dense")
    torch.testing.assert_close(
        logits(tmp_path / "dense", windows.ids), logits(done.out, windows.ids), rtol=1e-4, atol=1e-5
    )
    assert verify(tmp_path / "dense") == []


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(BIASED)))
def test_the_affine_form_is_refused_where_an_ordinary_checkpoint_has_no_bias(family, save_model, prune, tmp_path):
    save_model(tmp_path / "model", FAMILIES[family])
    with pytest.raises(PareError, match=r"has no bias, and the affine form needs one.*--set affine=false"):
        prune(tmp_path / "model", tmp_path / "out", format="dense", **METHODS["rom"])
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize("family", BIASED)
@pytest.mark.parametrize("method", AFFINE)
def test_the_affine_form_is_written_dense_where_every_linear_has_a_bias(family, method, made):
    done = made(family, method, format="dense")
    before, after = load_file(done.model / "model.safetensors"), load_file(done.out / "model.safetensors")
    assert before.keys() == after.keys() and verify(done.out) == []
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    parts = [name.rpartition(".")[2] for name in changed]
    assert parts.count("weight") == len(done.edited) and set(parts) <= {"weight", "bias"}
    assert parts.count("bias") == len(done.edited) or method != "rom"
    ids = torch.tensor([done.result.probe["ids"]])
    assert losses(done.out, ids)[0].tolist() == done.result.probe["nll"]


def planned(folder, format="packed", **changes):
    job = resolve_job(ModelSource(folder, "m"), Recipe.parse(changes), format)
    return make_plan(job, 144, [144])


UNIFORM = [
    *((*pair, "packed") for pair in PAIRS if pair[1] != "paredown_lowrank"),
    *(("opt", method, "dense") for method in METHODS if method != "paredown_lowrank"),
]


@pytest.mark.parametrize(("family", "method", "format"), UNIFORM)
def test_the_plan_of_uniform_ranks_is_what_is_written(family, method, format, made):
    done = made(family, method, format)
    plan = planned(done.model, format, **METHODS[method])
    assert (plan.targeted_parameters, plan.kept_parameters) == (done.result.targeted, done.result.numbers)
    assert plan.bytes_after == done.bytes and plan.shrinks == (format == "packed")


def test_the_plan_knows_the_blocks_that_laser_chooses(made, prune, tmp_path):
    recipe = {"method": "laser", "options": {"rho": 0.2, "last": 0.5}}
    model = made("llama", "svd_llm").model
    plan, (result, writer) = planned(model, **recipe), prune(model, tmp_path / "out", **recipe)
    assert plan.targeted == [layer["name"] for layer in result.layers] and len(plan.targeted) == 7
    assert set(plan.left_out) == set(linears(model)) - set(plan.targeted)
    assert (plan.targeted_parameters, plan.kept_parameters) == (result.targeted, result.numbers)
    assert plan.bytes_after == writer.bytes


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "paredown_lowrank"), ("opt", "svd_llm pifa"), ("gpt2", "rom"), ("mixtral", "sparse_low_rank"), ("llama", "cur")],
)  # fmt: skip
def test_what_reconstruction_tuned_is_what_is_written(family, method, made, prune, tmp_path):
    done, out = made(family, method), tmp_path / "out"
    result, _ = prune(done.model, out, **METHODS[method], reconstruct={"steps": 3, "batch": 6})
    ids = torch.tensor([result.probe["ids"]])
    assert losses(out, ids)[0].tolist() == result.probe["nll"] != done.result.probe["nll"]
    assert verify(out) == [] and specs(out) == specs(done.out)
    assert numbers(out) == numbers(done.model) - result.targeted + result.numbers
    plain, tuned = load_file(done.out / "model.safetensors"), load_file(out / "model.safetensors")
    factors = [f"{name}.{part}" for name in specs(out) for part in ("left", "right", "pivots", "link")]
    assert any(not torch.equal(plain[name], tuned[name]) for name in factors if name in plain)


@pytest.fixture
def damage(made, tmp_path):
    """`damage(tensors=..., config=...)`: a damaged copy of a checkpoint of PIFA and biases; `rehash` makes the record
    agree with the tensors."""
    sound = made("llama", "rom pifa").out

    def run(tensors=lambda found: None, config=lambda modules: None, rehash=False):
        folder = shutil.copytree(sound, tmp_path / "copy")
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file(
            {k: v.contiguous() for k, v in found.items()}, folder / "model.safetensors", metadata={"format": "pt"}
        )
        settings, record = (json.loads((folder / name).read_text()) for name in ("config.json", "paredown.json"))
        config(settings["quantization_config"]["modules"])
        (folder / "config.json").write_text(json.dumps(settings))
        del record["files"]["config.json"]  # whose digest would tell it all
        for name, tensor in found.items() if rehash else ():
            record["tensors"][name].update(sha256=sha256(tensor), shape=list(tensor.shape))
        (folder / "paredown.json").write_text(json.dumps(record))
        return folder

    return run


DOWN = "model.layers.1.mlp.down_proj"


def reorder(tensors):
    for name in [name for name in tensors if name.endswith(".order")]:
        tensors[name] = tensors[name].flip(0)


def swap(tensors):
    tensors[f"{DOWN}.order"][[0, 1]] = tensors[f"{DOWN}.order"][[1, 0]]


def repeat(tensors):
    tensors[f"{DOWN}.order"][0] = tensors[f"{DOWN}.order"][1]


def truncate(tensors):
    tensors[f"{DOWN}.coefficients"] = tensors[f"{DOWN}.coefficients"][:, 1:]


def less_rank(modules):
    modules[DOWN]["rank"] -= 1


CASES = {
    "a changed order": ({"tensors": swap}, f"tensor '{DOWN}.order' has changed since it was written"),
    "an order that names a row twice": ({"tensors": repeat, "rehash": True}, f"{DOWN}.order: is no permutation"),
    "rows in another order": ({"tensors": reorder, "rehash": True}, "on the probe window the loss differs by"),
    "a truncated factor": ({"tensors": truncate}, f"tensor '{DOWN}.coefficients' is bfloat16 ["),
    "a truncated factor that is recorded": ({"tensors": truncate, "rehash": True}, f"tensor '{DOWN}.coefficients' has shape"),
    "a lost factor": ({"tensors": lambda found: found.pop(f"{DOWN}.pivots")}, f"tensor '{DOWN}.pivots' is missing"),
    "a lost bias": ({"tensors": lambda found: found.pop(f"{DOWN}.bias")}, f"tensor '{DOWN}.bias' is missing"),
    "not a number": ({"tensors": lambda found: found[f"{DOWN}.pivots"][0].fill_(torch.nan)}, f"'{DOWN}.pivots' holds NaN"),
    "a wrong rank": ({"config": less_rank}, f"tensor '{DOWN}."),
    "an impossible rank": ({"config": lambda modules: modules[DOWN].update(rank=999)}, "cannot have rank 999"),
    "another kind": ({"config": lambda modules: modules[DOWN].update(kind="lowrank")}, f"first '{DOWN}.left'"),
    "a forgotten layer": ({"config": lambda modules: modules.pop(DOWN)}, f"first '{DOWN}.weight'"),
    "a forgotten bias": ({"config": lambda modules: modules[DOWN].pop("bias")}, f"{DOWN} stores "),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_damage_is_found_and_named(case, damage):
    changes, said = CASES[case]
    faults = verify(damage(**changes))
    assert faults and any(said in fault for fault in faults), faults


@pytest.mark.parametrize("case", sorted(set(CASES) - {"a changed order", "rows in another order"}))
def test_damage_that_shows_without_the_record_is_refused_at_loading(case, damage):
    """Wrong shapes transformers refuses itself."""
    with pytest.raises((PareError, RuntimeError)):
        transformers_plugin.load(damage(**CASES[case][0]))


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as fault:
        assert "paredown_" in str(fault), fault
    else:
        sys.exit(f"{folder} was loaded without paredown")
import paredown.compress
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids, logits, text = torch.load(folder + ".wanted", weights_only=True)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, logits), folder
    assert torch.equal(model.generate(ids[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False), text), folder
    print(type(model).__name__)
"""
NAMES = {"llama tied": "Llama", "gpt2": "GPT2", "mixtral": "Mixtral", "opt": "OPT", "falcon": "Falcon"}


def test_a_fresh_process_loads_and_generates_with_our_import_and_refuses_without(made, windows, tmp_path):
    folders = []
    for family, method in zip(
        NAMES, ["paredown_lowrank", "rom", "sparse_low_rank", "cur", "svd_llm pifa"], strict=True
    ):
        folder = shutil.copytree(made(family, method).out, tmp_path / family)
        text = loaded(folder).generate(windows.ids[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False)
        torch.save((windows.ids, logits(folder, windows.ids), text), f"{folder}.wanted")
        folders.append(str(folder))
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", FRESH, *folders], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [
        line.removeprefix("Packed").partition("For")[0].removesuffix("LMHeadModel") for line in done.stdout.split()
    ] == [*NAMES.values()]


SMALL = ("calibration.sequences=2", "calibration.length=16", "evaluate.length=16", "evaluate.windows=4")


def test_the_report_counts_what_lies_in_the_files(save_model, text_file, tmp_path):
    save_model(tmp_path / "model", t.Qwen2Config(**{**C, "vocab_size": 320}))
    report = compress(
        tmp_path / "model", "paredown-lowrank-60", tmp_path / "out", overrides=SMALL, calibration=str(text_file),
        eval_text=[str(text_file)],
    )  # fmt: skip
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    counts, matrices = report["parameters"], linears(tmp_path / "model")
    assert counts["total"] == numbers(tmp_path / "model")
    assert counts["targeted"] == sum(module.weight.numel() for module, _ in matrices.values())
    assert counts["kept"] == numbers(tmp_path / "out") - (counts["total"] - counts["targeted"])
    assert 0.5 < counts["kept"] / counts["targeted"] <= 0.6
    entries = TensorFiles(tmp_path / "out").entries
    assert report["bytes"]["after"] == sum(e.bytes for e in entries.values()) < report["bytes"]["before"]
    for layer in report["layers"]:
        assert (
            layer["rank"]
            == entries[f"{layer['name']}.pivots"].shape[0]
            == specs(tmp_path / "out")[layer["name"]]["rank"]
        )
        assert 0 <= layer["predicted_loss"] < 1 and 0 < layer["measured_loss"] < 1
