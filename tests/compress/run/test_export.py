"""Packed to dense and back without the original model, and anybody's zeros packed."""

import json

import pytest
import torch
import transformers as t
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import TensorFiles
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.numerics.masks import NofM, keep_mask
from paredown.compress.recipe import Recipe
from paredown.compress.run.export import export_source
from paredown.compress.run.pipeline import Run
from paredown.compress.run.plan import plan
from paredown.compress.run.record import write_record
from paredown.compress.run.verify import verify

C = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama tied": t.LlamaConfig(**C, tie_word_embeddings=True),
    "gpt2": t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "mixtral": t.MixtralConfig(**C, num_local_experts=4),
    "mamba": t.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8),
}


def convert(folder, out, format):
    return export_source(ModelSource(folder, folder.name), out, format)


@pytest.mark.parametrize("sparsity", ["2:4", 0.6])
@pytest.mark.parametrize("family", CONFIGS)
def test_there_and_back_changes_no_bit(family, sparsity, tmp_path, save_model, prune, logits_of):
    save_model(tmp_path / "model", CONFIGS[family])
    prune(tmp_path / "model", tmp_path / "packed", sparsity=sparsity)
    told = convert(tmp_path / "packed", tmp_path / "dense", "dense")
    assert told["bytes"]["after"] > told["bytes"]["before"]
    convert(tmp_path / "dense", tmp_path / "again", "packed")
    wanted = logits_of(tmp_path / "packed")
    assert torch.equal(wanted, logits_of(tmp_path / "dense")) and torch.equal(wanted, logits_of(tmp_path / "again"))
    plain = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not plain["model_type"].startswith("paredown") and "quantization_config" not in plain
    names = set(TensorFiles(tmp_path / "model").entries)
    assert set(TensorFiles(tmp_path / "dense").entries) == names  # what other tools look for
    packed, again = TensorFiles(tmp_path / "packed"), TensorFiles(tmp_path / "again")
    assert {n: e.shape for n, e in packed.entries.items()} == {n: e.shape for n, e in again.entries.items()}
    for folder in ("dense", "again"):
        assert verify(tmp_path / folder) == []


def test_exported_dense_is_what_compress_writes_as_dense(tiny_model, tmp_path, prune):
    prune(tiny_model, tmp_path / "packed")
    prune(tiny_model, tmp_path / "dense", format="dense")
    convert(tmp_path / "packed", tmp_path / "exported", "dense")
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "exported"))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_zeros_that_others_made_are_packed(tmp_path, save_model, logits_of, tiny_config):
    """2:4 with too many zeros in places, half-sparse, and a weight without zeros: each in its smallest exact form."""
    model = save_model(tmp_path / "model", tiny_config)
    with torch.no_grad():
        first, second = model.model.layers
        up = first.mlp.up_proj.weight
        up.mul_(keep_mask(up.abs().float(), NofM(2, 4)))
        up[3] = 0
        up[4, :4] = torch.tensor([0, 0, 0, 1.5])
        gate = first.mlp.gate_proj.weight
        gate.mul_(keep_mask(gate.abs().float(), 0.5))
        second.mlp.up_proj.weight.fill_(-0.5)
    model.save_pretrained(tmp_path / "foreign")
    told = convert(tmp_path / "foreign", tmp_path / "packed", "packed")
    assert told["bytes"]["after"] < told["bytes"]["before"]
    modules = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["modules"]
    assert {name: spec["kind"] for name, spec in modules.items()} == {
        "model.layers.0.mlp.up_proj": "sparse24",
        "model.layers.0.mlp.gate_proj": "bitmap",
    }
    with torch.no_grad():
        ids = torch.arange(48).view(2, 24)
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto").eval()
        assert torch.equal(packed(ids).logits, model(ids).logits)
    assert verify(tmp_path / "packed") == []


def test_the_record_names_the_first_model_of_all(tiny_model, tmp_path, prune):
    def named(folder):
        return json.loads((tmp_path / folder / "paredown.json").read_text())["model"]

    prune(tiny_model, tmp_path / "ours", format="dense")
    export_source(ModelSource(tmp_path / "ours", "b/model"), tmp_path / "packed", "packed")
    assert named("packed") == named("ours")
    (tmp_path / "ours" / "paredown.json").unlink()  # as others write it
    export_source(ModelSource(tmp_path / "ours", "b/model"), tmp_path / "theirs", "packed")
    assert named("theirs") == {**named("packed"), "id": "b/model"}


def test_packing_twice_is_refused_and_leaves_nothing(tiny_model, tmp_path, prune):
    prune(tiny_model, tmp_path / "packed")
    with pytest.raises(PareError, match="is packed already"):
        convert(tmp_path / "packed", tmp_path / "out", "packed")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


AFFINE = {"method": "rom", "options": {"kept": 0.5}}


@pytest.fixture
def factor(windows):
    """`factor(folder, out, skip)`: low rank with biases."""

    def run(folder, out, skip=()):
        recipe = Recipe.parse({**AFFINE, "targets": {"skip": ["lm_head", *skip]}})
        job = resolve_job(ModelSource(folder, folder.name), recipe)
        with CheckpointWriter(out) as writer:
            result = Run(job, windows, [windows], writer).run()
            write_record(writer, job, result, windows)
            writer.commit()

    return run


@pytest.mark.parametrize(
    ("skip", "flags"),
    [((), {"mlp_bias", "attention_bias"}), (("self_attn", "up_proj"), {"mlp_bias"})],
)
def test_added_biases_are_exported_where_the_family_has_settings_for_them(
    skip, flags, tmp_path, tiny_model, factor, logits_of
):
    factor(tiny_model, tmp_path / "packed", skip)
    convert(tmp_path / "packed", tmp_path / "dense", "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert {flag for flag in ("mlp_bias", "attention_bias") if config[flag]} == flags
    assert verify(tmp_path / "dense") == []
    model = t.LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")  # the family's own class
    assert torch.count_nonzero(
        model.model.layers[1].self_attn.o_proj.bias if "self_attn" not in skip else torch.ones(1)
    )
    wanted, found = (logits_of(tmp_path / name).float() for name in ("packed", "dense"))
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0.03)


def test_added_biases_without_a_place_are_refused_and_the_plan_says_so(tmp_path, save_model, factor):
    save_model(tmp_path / "mistral", t.MistralConfig(**C))
    factor(tmp_path / "mistral", tmp_path / "packed")
    with pytest.raises(PareError, match="carries a bias that an ordinary mistral checkpoint cannot hold"):
        convert(tmp_path / "packed", tmp_path / "dense", "dense")
    assert not (tmp_path / "dense").exists()
    recipe = Recipe.parse(AFFINE)
    assert plan(tmp_path / "mistral", recipe).dense_export.startswith(
        "does not work: model.layers.0.self_attn.q_proj gets a bias"
    )
    assert (
        plan(tmp_path / "mistral", recipe.model_copy(update={"options": {"kept": 0.5, "affine": False}})).dense_export
        == "works"
    )


def test_the_plan_says_which_settings_an_export_needs(tiny_model):
    assert plan(tiny_model, Recipe.parse(AFFINE)).dense_export.startswith("works: the config's settings")
    assert plan(tiny_model, "wanda-50").dense_export == "works"
    assert plan(tiny_model, "wanda-50", format="dense").dense_export == ""
