"""Runs on another device than the CPU's: nothing that lies on one meets what lies on the other, and the results agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as t

SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {
    **SIZES,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": t.LlamaConfig(**LLAMA),
    "gpt2": t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "mixtral": t.MixtralConfig(**LLAMA, num_local_experts=4),
}
OURS = {"method": "paredown_lowrank", "options": {"kept": 0.6}}
SPARSE24 = {"options": {"sparsity": "2:4"}}
EVERYWHERE = [{"method": "sparsegpt", "options": {"sparsity": 0.5}}, OURS]
LLAMA_TOO = [
    *({"method": method, **SPARSE24} for method in ("magnitude", "wanda", "sparsegpt")),
    *({"method": name, "options": {"kept": 0.7}} for name in ("asvd", "fwsvd", "rom", "svd_llm", "lorap")),
    {"method": "asvd", "options": {"kept": 0.7}, "allocation": {"strategy": "sensitivity"}},
    {"method": "cur", "options": {"blocks": None}},
    {"method": "sparse_low_rank", "options": {"sparsity": "2:4", "rank": 4}},
    {**OURS, "reconstruct": {"steps": 3}},
    {"method": "wanda", **SPARSE24, "reconstruct": {"steps": 3}},
]


@pytest.mark.slow
def test_every_method_runs_on_another_device_and_finds_the_same(tmp_path, save_model):
    """In a process of its own: a device that was made known stays so."""
    pytest.importorskip("torch.utils.backend_registration", reason="this torch takes no device from Python")
    ids = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(0)).tolist()
    jobs = []
    for family, config in FAMILIES.items():
        save_model(tmp_path / family, config, dtype=torch.float32)
        for recipe in EVERYWHERE + (LLAMA_TOO if family == "llama" else []):
            out = f"{tmp_path / f'out-{len(jobs)}'}"
            jobs.append({"model": f"{tmp_path / family}", "recipe": recipe, "ids": ids, "out": out})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    program = Path(__file__).with_name("elsewhere.py")
    done = subprocess.run([sys.executable, program, tmp_path / "jobs.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for job, (here, there) in zip(jobs, found, strict=True):
        assert there == pytest.approx(here, rel=1e-3), job
