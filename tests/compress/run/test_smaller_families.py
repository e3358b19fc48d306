"""Families whose smaller models are ordinary checkpoints: loaded without us in a new process they score what the run saw."""

import json
import subprocess
import sys

import families
import pytest

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.recipe import Recipe
from paredown.compress.run.record import write_record
from paredown.compress.run.smaller import SmallerRun
from paredown.compress.shape_job import resolve

DEPTH = {"method": "paredown_depth", "options": {"blocks": 1, "windows": 2}}
WIDTH = {"method": "paredown_width", "options": {"kept": 0.9, "multiple": 1}}
DAILY = ["llama tied", "phi3", "gpt2", "deepseek_v3"]
BOTH = [
    "gemma2", "opt", "falcon", "qwen2_moe", "llama", "mistral", "qwen2", "qwen3", "gemma3_text", "opt post-norm", "gpt_neox", "gptj", "codegen", "gpt_bigcode",
    "falcon new decoder", "olmo2", "stablelm", "cohere2", "smollm3", "glm4", "granite", "ernie4_5_moe", "llama4_text",
    "deepseek_v2", "kimi_linear", "qwen3_next", "qwen3_5_text", "bamba", "nemotron_h", "lfm2_moe", "bert", "bart",
]  # fmt: skip
DEPTH_ALONE = [
    "bloom", "mixtral", "qwen3_moe", "gpt_oss", "phimoe", "hunyuan_v1_moe", "dbrx", "jetmoe", "granitemoe", "mamba",
    "falcon_mamba", "jamba", "zamba2", "recurrent_gemma",
]  # fmt: skip
# the cache of transformers wants blocks of both kinds, and one of two is left
HYBRID = ["kimi_linear", "qwen3_next", "qwen3_5_text", "bamba", "nemotron_h", "lfm2_moe", "jamba", "zamba2"]
ALONE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
errors = {}
for folder, generates in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    probe = json.load(open(folder + "/paredown.json"))["probe"]
    ids = torch.tensor([probe["ids"]])
    nll = -model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    errors[folder] = float((nll - torch.tensor(probe["nll"])).abs().max())
    assert not generates or model.generate(ids[:, :4], max_new_tokens=2, do_sample=False).shape[1] == 6
assert not [name for name in sys.modules if name.startswith("paredown")]
print(json.dumps(errors))
"""


def rare(names):
    return [pytest.param(name, marks=pytest.mark.all_families) for name in names]


def write(folder, out, raw):
    job = resolve(ModelSource(folder, folder.name), Recipe.parse(raw))
    with CheckpointWriter(out) as writer:
        result = SmallerRun(job, families.TEXT, [families.TEXT], writer).run()
        write_record(writer, job, result, families.TEXT)
        writer.commit()
    assert result.numbers < result.targeted


@pytest.mark.parametrize("family", [*DAILY, *rare(BOTH), *rare(DEPTH_ALONE)])
def test_a_smaller_model_loads_without_us_and_scores_what_the_run_saw(family, tmp_path):
    families.save(family, tmp_path)
    outs = {}  # and whether they generate
    for name, raw in {"depth": DEPTH, "width": WIDTH}.items():
        if name == "depth" or family not in DEPTH_ALONE:
            write(tmp_path / "float32", tmp_path / name, raw)
            outs[str(tmp_path / name)] = name == "width" or family not in HYBRID
    done = subprocess.run([sys.executable, "-c", ALONE, json.dumps(outs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert max(json.loads(done.stdout.splitlines()[-1]).values()) < 1e-4
