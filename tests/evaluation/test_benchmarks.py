"""The benchmarks' own parts; what they measure is in BENCHMARKS.md."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from paredown.compress.numerics.cholesky import inverse_cholesky
from paredown.compress.numerics.masks import parse_sparsity
from paredown.compress.numerics.sweep import adaptive_mask, block_columns, sparsegpt_sweep
from paredown.evaluation.benchmarks import footprint, peers, solvers
from paredown.evaluation.benchmarks.reference_sparsegpt import inverse_factor, reference_sweep


def test_the_made_model_has_exactly_the_tensors_of_a_llama_of_its_shape(tmp_path):
    folder = footprint.make_model(tmp_path / "model", shape="tiny", blocks=1)
    made = {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}
    assert json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].keys() == made.keys()
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    assert {name: weight.shape for name, weight in made.items()} == expected
    assert {weight.dtype for weight in made.values()} == {torch.bfloat16}


def test_without_a_peer_the_command_says_how_to_make_one():
    done = subprocess.run(
        [sys.executable, "-m", "paredown.evaluation.benchmarks.peers"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "pip install llmcompressor==" in done.stderr and "--peer-python" in done.stderr


def test_the_peers_side_imports_nothing_of_ours():
    tree = ast.parse(Path(peers.PEER).read_text())
    named = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    named += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert "llmcompressor" in named
    assert not [name for name in named if name.startswith("paredown")]


@pytest.mark.parametrize("sparsity", ["2:4", "4:8", 0.5, 0.7])
def test_ours_gives_the_weights_of_the_papers_algorithm(sparsity):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 320, generator=generator)
    data = torch.randn(640, 320, generator=generator) @ torch.randn(320, 320, generator=generator) / 18
    hessian, sparsity = data.T @ data / 640, parse_sparsity(sparsity)
    inverse = inverse_cholesky(hessian.double(), 1, 0.01)
    reference = reference_sweep(weight, inverse_factor(hessian, 0.01), sparsity)
    ours, keep = sparsegpt_sweep(
        weight, inverse, adaptive_mask(sparsity, weight, lambda: inverse), block_columns(sparsity)
    )
    assert int(((reference != 0) != keep).sum()) < 0.01 * keep.numel()
    losses = [float(((weight - pruned) @ hessian * (weight - pruned)).sum()) for pruned in (reference, ours)]
    assert losses[1] / losses[0] == pytest.approx(1, abs=0.001)


PEER = """
import torch
from paredown.compress.numerics.masks import NofM
from paredown.evaluation.benchmarks.reference_sparsegpt import inverse_factor, reference_sweep


def sparsify_weight(module, hessians, sparsity, removed, m, block, damping, preserve):
    pattern = NofM(m - removed, m) if m else sparsity
    return 0.0, reference_sweep(module.weight, inverse_factor(hessians.pop(module), damping), pattern)
"""


def test_a_peers_own_code_is_timed_beside_ours(tmp_path, monkeypatch, capsys):
    place = tmp_path / "llmcompressor" / "modifiers" / "pruning" / "sparsegpt" / "sgpt_sparsify.py"
    place.parent.mkdir(parents=True)
    place.write_text(PEER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    arguments = ["--against", "llmcompressor", "--peer-python", sys.executable, "--weights", "32x64", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["solvers", *arguments])
    with pytest.raises(SystemExit) as left:
        solvers.main()
    assert left.value.code == 0
    assert capsys.readouterr().out.count("llmcompressor / ours") == 2


def test_the_solvers_table_shows_both_sides_and_their_ratio(monkeypatch, capsys):
    arguments = ["--against", "reference", "--weights", "32x64", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["solvers", *arguments])
    with pytest.raises(SystemExit) as left:
        solvers.main()
    printed = capsys.readouterr().out
    assert left.value.code == 0
    assert printed.count("reference / ours") == 2 and "layer loss" in printed
