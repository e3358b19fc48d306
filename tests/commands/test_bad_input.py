"""What users get wrong: each fault is named with its next step, and OUT is never left half-written."""

import json
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from paredown.compress.errors import PareError
from paredown.compress.run.compress import compress

SMALL = ("calibration.sequences=2", "calibration.length=16", "evaluate.length=16", "evaluate.windows=4")
WEIGHT = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def run(tiny_model, text_file, tmp_path):
    """Compress the tiny model with some changes, and see that a refusal leaves nothing behind."""

    def go(said, model=None, recipe="wanda-2of4", overrides=(), calibration=None, eval_text=None, **options):
        out = tmp_path / "out"
        with pytest.raises(PareError, match=said):
            compress(
                model or tiny_model, recipe, out, overrides=[*SMALL, *overrides],
                calibration=str(calibration or text_file), eval_text=[str(eval_text or text_file)], **options,
            )  # fmt: skip
        assert not out.exists() and not out.with_name("out.partial").exists()

    return go


def change(folder, name, edit):
    """Rewrite one tensor of a single-file checkpoint; None removes it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    made = edit(tensors.pop(name))
    if made is not None:
        tensors[name] = made
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def sharded(folder):
    model = t.AutoModelForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder / "model.safetensors", ignore_errors=True)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("method: wnda", "Did you mean 'wanda'"),
        ("method: wanda\noptions: {sparsty: 0.5}", "no option 'sparsty'. Did you mean 'sparsity'"),
        ("method: wanda\noptions: {sparsity: 2:4}", "Quote it"),
        ("method: wanda\noptions: {sparsity: 1.0}", r"\[0, 1\)"),
        ("method: wanda\noptions: {sparsity: -0.5}", r"\[0, 1\)"),
        ('method: wanda\noptions: {sparsity: "5:4"}', "n must lie between 1 and m"),
        ('method: wanda\noptions: {sparsity: "2:5"}', "q_proj: sparsity 2:5 needs an input width divisible by 5"),
        ("method: wanda\ntargets: {skip: [q_prj]}", "matches no linear layer. Did you mean 'q_proj'"),
        ("method: wanda\ntargets: {skip: ['*']}", "leave no layer to compress"),
        ("method: wanda\ncalibraton: {}", "Did you mean 'calibration'"),
        ("- wanda", "a recipe is a mapping"),
        ("method: [", "no valid YAML"),
    ],
)
def test_recipes(recipe, said, run, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    run(said, recipe=str(path))


def test_every_fault_of_a_recipe_is_listed_at_once(run, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: wanda\noptions: {sparsty: 1, sparsity: 7}\ncalibration: {seed: -1}\nextra: 1")
    run("(?s)seed.*extra.*sparsty.*sparsity", recipe=str(path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "wanda-2of5"}, "Did you mean 'wanda-2of4'"),
        ({"recipe": "nowhere.yaml"}, "does not exist"),
        ({"model": "./nowhere"}, "no such folder"),
        ({"model": "nobody/nothing"}, "not in the local cache"),
        ({"calibration": "wikitex2"}, "Did you mean 'wikitext2'"),
        ({"eval_text": "nobody/nothing"}, "Without a network"),
        ({"eval_text": "./nowhere.txt"}, "does not exist"),
        ({"overrides": ["calibration.length"]}, "must look like key=value"),
        ({"tasks": ["stdlib_line"]}, "stdlib_lines"),
        ({"device": "gpu"}, "none of auto, cpu"),
        ({"device": "cuda:7"}, "CUDA devices"),
        ({"dtype": "int4"}, "none of auto, bfloat16"),
    ],
)
def test_arguments(options, said, run):
    run(said, **options)


def test_calibration_text_too_short(run, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    run("--set calibration.length", calibration=short)
    run("--set evaluate.length", eval_text=short)


def test_pickle_only_checkpoint(run, tiny_model):
    (tiny_model / "model.safetensors").rename(tiny_model / "pytorch_model.bin")
    run("CVE-2025-32434", model=tiny_model)


@pytest.mark.parametrize("evil", ["../evil.safetensors", "/tmp/evil.safetensors", ".."])
def test_an_index_that_points_outside_the_folder(evil, run, tiny_model):
    index, content = sharded(tiny_model)
    content["weight_map"][WEIGHT] = evil
    index.write_text(json.dumps(content))
    run("plain file names", model=tiny_model)


def test_missing_and_truncated_shards(run, tiny_model):
    _, content = sharded(tiny_model)
    shard = tiny_model / content["weight_map"][WEIGHT]
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    run("truncated or damaged", model=tiny_model)
    shard.unlink()
    run("is missing. Fetch", model=tiny_model)


def test_wrong_shape_missing_tensor_and_nan(run, tiny_model):
    change(tiny_model, WEIGHT, lambda w: w[:, :32].contiguous())
    run("down_proj.weight' has shape", model=tiny_model)
    change(tiny_model, WEIGHT, lambda w: torch.full((64, 96), float("nan"), dtype=torch.bfloat16))
    run("down_proj.weight' holds NaN", model=tiny_model)
    change(tiny_model, WEIGHT, lambda w: None)
    run("1 tensors of a llama model are missing, first 'model.layers.0.mlp.down_proj.weight'", model=tiny_model)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", "64", "Field 'hidden_size' expected int, got str"),
        ("num_hidden_layers", 10**9, "num_hidden_layers: 1000000000, and the files hold tensors of 2 layers"),
        ("vocab_size", 10**12, "vocab_size: 1000000000000, and the largest dimension of a tensor in the files is 320"),
        ("architectures", ["LlamaForSequenceClassification"], "a classifier or reward model"),
    ],
)
def test_settings_that_are_wrong_or_contradict_the_files(key, value, said, run, tiny_model):
    path = tiny_model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    run(said, model=tiny_model)


def test_activations_that_overflow(run, tmp_path, save_model, tiny_config):
    save_model(tmp_path / "half", tiny_config, torch.float16)
    change(tmp_path / "half", WEIGHT, lambda w: torch.full_like(w, 60000.0))
    change(tmp_path / "half", "model.layers.0.mlp.up_proj.weight", lambda w: torch.full_like(w, 60000.0))
    run("non-finite activations|NaN or infinite values", model=tmp_path / "half")


def test_an_output_that_is_not_empty(tiny_model, text_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(PareError, match="not empty"):
        compress(tiny_model, "wanda-2of4", out, overrides=SMALL, calibration=str(text_file), eval_text=[str(text_file)])
    assert [p.name for p in out.iterdir()] == ["precious"]


def test_a_disk_that_is_too_small(run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    run("free .* GB, or name another output")


def test_a_memory_that_is_too_small(run, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    run("GB are missing")


def test_an_unknown_model_type(run, tiny_model):
    config = json.loads((tiny_model / "config.json").read_text())
    (tiny_model / "config.json").write_text(json.dumps({**config, "model_type": "llamma"}))
    run("not of a model type that this transformers knows", model=tiny_model)


def test_a_folder_without_a_tokenizer(run, tiny_model):
    for path in tiny_model.glob("tokenizer*"):
        path.unlink()
    run("has no tokenizer", model=tiny_model)


def test_a_checkpoint_quantised_by_others(run, tiny_model):
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tiny_model / "config.json").write_text(json.dumps(config))
    run("quantised .gptq.", model=tiny_model)
