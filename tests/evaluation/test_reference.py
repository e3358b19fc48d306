"""The bundled reference model: what its README says of it, and that pruning hurts it as it hurts models that matter."""

import itertools
import json
import math
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from paredown.compress.errors import PareError
from paredown.compress.text import stdlib_text
from paredown.evaluation.reference import model_path
from paredown.evaluation.reference import train as training

README = Path(str(files("paredown.evaluation.reference"))) / "README.md"
SAMPLES = ["", "def f(x):\n\treturn  x\n", "Ünïcödé — 数字 🐍 1234567890\r\n", "<|endo", "\x00\x7f  trailing   "]


@pytest.fixture(scope="module")
def bundled():
    return AutoTokenizer.from_pretrained(model_path()), AutoModelForCausalLM.from_pretrained(
        model_path(), dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def windows(bundled):
    """12 windows of the evaluation side, spread over all of it, (12, 512)."""
    ids = torch.tensor(bundled[0](stdlib_text.text("evaluation"), verbose=False).input_ids)
    return ids[: len(ids) // 512 * 512].view(-1, 512)[:: len(ids) // 512 // 12][:12]


@torch.no_grad()
def perplexity(model, ids):
    logits = model(ids).logits[:, :-1].float()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())


def test_the_bundled_files_are_a_whole_hugging_face_folder_of_at_most_16_mb():
    present = {path.name: path.stat().st_size for path in model_path().iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(present) == wanted
    assert sum(present.values()) <= 16e6


def test_every_stored_tensor_is_a_finite_bfloat16_parameter(bundled):
    with safe_open(model_path() / "model.safetensors", "pt") as store:
        assert set(store.keys()) == {n for n, _ in bundled[1].named_parameters()}
        for name in store.keys():  # noqa: SIM118 — not a dict
            assert store.get_tensor(name).dtype == torch.bfloat16
            assert store.get_tensor(name).isfinite().all()
    assert json.loads((model_path() / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_readme_gives_the_parameters_and_shape_that_the_model_has(bundled):
    parameters = sum(parameter.numel() for parameter in bundled[1].parameters())
    assert f"{parameters:,} parameters" in README.read_text()
    config = bundled[1].config
    assert (config.num_attention_heads, config.num_key_value_heads, config.tie_word_embeddings) == (8, 4, True)


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_tokenizer_gives_every_string_back_and_adds_nothing(bundled, sample):
    ids = bundled[0](sample).input_ids
    assert bundled[0].decode(ids) == sample
    assert bundled[0].bos_token_id not in ids


def test_the_tokenizer_gives_a_whole_module_back_at_over_three_bytes_a_token(bundled):
    source = next(d.text for d in stdlib_text.documents("evaluation") if d.module == "argparse")
    ids = bundled[0](source, verbose=False).input_ids
    assert bundled[0].decode(ids) == source
    assert len(source.encode()) / len(ids) > 3
    assert len(bundled[0]) == bundled[1].config.vocab_size == 4096
    assert bundled[0].bos_token == bundled[0].eos_token == "<|endoftext|>"


def test_the_model_reads_unseen_modules_nearly_as_well_as_its_readme_says(bundled, windows):
    stated = float(re.search(r"\| evaluation \|[^\n]*\| ([0-9.]+) \|\n", README.read_text()).group(1))
    # A dozen windows, and perhaps another Python's text: the README's figure within a third.
    assert stated / 1.33 < perplexity(bundled[1], windows) < stated * 1.33


def test_magnitude_2of4_raises_the_perplexity_by_a_quarter_or_more(bundled, windows):
    pruned = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    for name, parameter in pruned.model.layers.named_parameters():
        if parameter.ndim == 2:
            groups = parameter.data.unflatten(-1, (-1, 4))  # (out, groups, 4)
            drop = groups.abs().topk(2, dim=-1, largest=False).indices
            assert parameter.shape[1] % 4 == 0, name
            groups.scatter_(-1, drop, 0.0)
    assert perplexity(pruned, windows) > 1.25 * perplexity(bundled[1], windows)


def test_a_missing_model_is_told_how_to_get_it_again(tmp_path):
    with pytest.raises(PareError, match=r"found no model\.safetensors in .*reference\.train -o"):
        model_path(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("goes_on", [False, True])
def test_training_learns_and_writes_what_loads_again(tmp_path, goes_on):
    words = ["def spam(eggs):\n    return eggs + 1\n" * 60, "class Ham:\n    '''A ham.'''\n" * 60]
    few = [stdlib_text.Document(f"m{i}", word) for i, word in enumerate(words)]
    small = {"vocabulary": 280, "context": 32}
    start = None
    if goes_on:
        start = tmp_path / "first"
        plan = training.Plan(start, **small)
        tokenizer, _ = training.prepare(plan, lambda split: few)
        model = training.build_model(plan, tokenizer.bos_token_id)
        training.save(model, dict(model.named_parameters()), tokenizer, start)
    ticks = itertools.count(step=0.02)  # the budget is wall time: here each look at the clock takes so many seconds
    plan = training.Plan(tmp_path / "out", minutes=0.03, batch=2, start=start, average=0.5, **small)
    facts = training.train(plan, lambda split: few, lambda: next(ticks))
    assert facts["steps"] >= 10 and facts["tokens_seen"] == facts["steps"] * 2 * 32
    assert facts["loss"]["library"] < math.log(280) - 0.5
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.decode(again(words[0]).input_ids) == words[0]


def test_the_rate_rises_falls_and_ends_at_zero():
    rates = [training.rate_at(spent / 100, 0.02) for spent in range(101)]
    assert max(rates) == rates[2] == 1.0
    assert rates[0] < 0.1 and rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates[2:] == sorted(rates[2:], reverse=True)
