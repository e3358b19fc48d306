"""Every family we name: streamed like transformers runs it, compressed, written, reloaded, equal to the last bit.

Some eighty of all kinds are run every day; `pytest -m all_families` runs the others, and takes some minutes.
"""

import os
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
import transformers as t

from paredown.compress import PareError, plan
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.job import resolve_job
from paredown.compress.model import blocks as model_blocks
from paredown.compress.model.blocks import blocks
from paredown.compress.model.families import FAMILIES, listed
from paredown.compress.recipe import Recipe
from paredown.compress.run.pipeline import Run
from paredown.compress.run.record import write_record

README = Path(__file__).parents[3] / "README.md"
RARE = [
    pytest.param(family, marks=pytest.mark.all_families)
    for family in sorted({*FAMILIES, *families.VARIANTS} - set(families.EVERY_DAY))
]


@pytest.mark.parametrize("family", [*families.EVERY_DAY, *RARE])
def test_a_family_keeps_every_promise(family, tmp_path):
    faults = {promise: fault for promise, fault in families.check(family, tmp_path) if fault}
    assert not faults


@pytest.mark.parametrize("family", families.REFUSED)
def test_a_family_that_cannot_be_walked_is_refused_before_any_work(family, tmp_path):
    families.build(family).save_pretrained(tmp_path / "model")
    with pytest.raises(PareError, match=families.REFUSED[family]):
        plan(tmp_path / "model", "magnitude-50")


def test_the_list_of_families_is_what_these_tests_run():
    run = {families.VARIANTS.get(name, (name,))[0] for name in families.EVERY_DAY}
    assert len(run) >= 60 and run <= FAMILIES
    assert set(families.CAUSAL) - FAMILIES == families.NOT_BUILT.keys() | families.REFUSED.keys()


def test_the_readme_lists_these_families():
    assert listed() in README.read_text(encoding="utf-8"), "python -m paredown.compress.model.families prints the list"


def compress(folder, out, format="packed", method="wanda", sparsity="2:4", **changes):
    recipe = Recipe.parse({"method": method, "options": {"sparsity": sparsity}, **changes})
    job = resolve_job(ModelSource(folder, folder.name), recipe, format)
    with CheckpointWriter(out) as writer:
        result = Run(job, families.TEXT, [families.TEXT], writer).run()
        write_record(writer, job, result, families.TEXT)
        writer.commit()
    return result, writer


def logits_of(folder):
    return families.logits_of(families.load(folder))


def save(folder, config, dtype=torch.bfloat16):
    torch.manual_seed(0)
    t.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    families.save_tokenizer(config.model_type, folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_unstructured_halves_are_stored_in_57_5_percent(family, tmp_path):
    save(tmp_path / "model", families.tiny_config(family))
    result, writer = compress(tmp_path / "model", tmp_path / "packed", sparsity=0.5)
    compress(tmp_path / "model", tmp_path / "dense", "dense", sparsity=0.5)
    assert torch.equal(logits_of(tmp_path / "packed"), logits_of(tmp_path / "dense"))
    stored = sum(e["bytes"] for e in writer.tensors.values() if e["kind"] == "bitmap")
    assert stored <= 0.575 * 2 * result.targeted


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_stay_what_they_are(dtype, tmp_path):
    save(tmp_path / "model", families.tiny_config("llama"), dtype)
    compress(tmp_path / "model", tmp_path / "packed", method="sparsegpt")
    compress(tmp_path / "model", tmp_path / "dense", "dense", method="sparsegpt")
    model = families.load(tmp_path / "packed")
    assert model.dtype == dtype and families.logits_of(model).dtype == dtype
    assert torch.equal(families.logits_of(model), logits_of(tmp_path / "dense"))


def test_a_family_that_we_do_not_test_is_tried_by_structure_and_says_so(tmp_path, monkeypatch):
    save(tmp_path / "model", families.tiny_config("llama"))
    result, _ = compress(tmp_path / "model", tmp_path / "known")
    assert not any("by structure" in told for told in result.fallbacks)
    monkeypatch.setattr(model_blocks, "FAMILIES", frozenset())
    result, _ = compress(tmp_path / "model", tmp_path / "unknown")
    assert "by structure" in result.fallbacks[0]


@pytest.mark.parametrize(("policy", "kept"), [("data_free", 0.5), ("dense", 1.0)])
def test_idle_experts_follow_the_policy_and_are_reported(policy, kept, tmp_path):
    save(tmp_path / "model", families.tiny_config("qwen3_moe", num_experts=64, num_experts_per_tok=1))
    result, _ = compress(tmp_path / "model", tmp_path / "dense", "dense", idle=policy)
    idle = [line.split(":")[0] for line in result.fallbacks if "no calibration token reached" in line]
    assert idle
    source = ModelSource(tmp_path / "dense", "dense")
    block = blocks(source)[0]
    with source.loaded(block):
        weights = {v.name: v.weight for v in block.views()}
    for name in [n for n in idle if n in weights][:4]:
        share = float((weights[name] != 0).float().mean())
        assert share == pytest.approx(kept, abs=1e-2)


FRESH = """
import sys, torch
{our_import}
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = torch.load(folder + ".ids", weights_only=True)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, torch.load(folder + ".logits", weights_only=True)), folder
    assert type(AutoConfig.from_pretrained(folder)).__name__.startswith("Packed")
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids
    print(type(model).__name__)
"""


def test_a_fresh_process_loads_with_our_import_and_fails_closed_without(tmp_path):
    folders = []
    for name in ("llama tied", "gpt2", "mixtral"):
        out = tmp_path / f"{name}-packed"
        save(tmp_path / name, families.tiny_config(name))
        compress(tmp_path / name, out)
        torch.save(families.IDS, f"{out}.ids")
        torch.save(logits_of(out), f"{out}.logits")
        folders.append(str(out))
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def run(our_import):
        code = FRESH.format(our_import=our_import)
        return subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, env=env)

    done = run("import paredown.compress")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["PackedLlamaForCausalLM", "PackedGPT2LMHeadModel", "PackedMixtralForCausalLM"]
    failed = run("")
    assert failed.returncode != 0 and "ValueError" in failed.stderr and "paredown_llama" in failed.stderr
