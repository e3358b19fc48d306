"""The benchmarks' own parts; what they measure is in BENCHMARKS.md."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from paredown.evaluation.benchmarks import footprint, peers


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
