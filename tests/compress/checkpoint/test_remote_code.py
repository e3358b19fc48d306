"""Code beside packed weights: they load by trust_remote_code in a process that did not import paredown."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from paredown.compress.checkpoint import remote_code, transformers_plugin
from paredown.compress.checkpoint.remote_code import CODE, add_code
from paredown.compress.errors import PareError
from paredown.compress.run.export import export
from paredown.compress.run.verify import verify

IDS = list(range(3, 19))
LOAD = f"""
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == 'paredown':
            raise ModuleNotFoundError("No module named 'paredown'")

sys.meta_path.insert(0, Missing())
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as fault:
    print(fault)
sys.meta_path.pop(0)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    save_file({{'logits': model(torch.tensor([{IDS}]), use_cache=False).logits}}, sys.argv[2])
model.save_pretrained(sys.argv[3])
"""


@pytest.fixture
def zeros(tiny_model, tmp_path, prune):
    """The folder of an ordinary checkpoint whose weights are pruned."""
    prune(tiny_model, tmp_path / "zeros", format="dense")
    return tmp_path / "zeros"


def test_packed_weights_load_by_their_code_and_without_paredown_it_is_named(zeros, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    export(zeros, out, "packed", remote_code=True)
    assert verify(out) == []
    command = [sys.executable, "-c", LOAD, str(out), str(tmp_path / "logits.safetensors"), str(again)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pip install paredown" in done.stdout
    with torch.no_grad():
        expected = transformers_plugin.load(out)(torch.tensor([IDS]), use_cache=False).logits
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)
    assert "auto_map" not in json.loads((again / "config.json").read_text())  # the code is not there


def test_the_code_is_checked_and_goes_where_the_weights_go(zeros, tmp_path, prune):
    export(zeros, tmp_path / "out", "packed", remote_code=True)
    (tmp_path / "out" / CODE).write_text("evil")
    assert any(CODE in fault for fault in verify(tmp_path / "out"))
    prune(tmp_path / "out", tmp_path / "further", sparsity=0.75)
    assert "evil" not in (tmp_path / "further" / CODE).read_text()
    assert "auto_map" in json.loads((tmp_path / "further/config.json").read_text())
    export(tmp_path / "out", tmp_path / "dense")
    assert not (tmp_path / "dense" / CODE).exists()


def test_an_ordinary_checkpoint_gets_none_and_another_format_is_refused(zeros, tmp_path):
    before = (zeros / "config.json").read_bytes()
    assert add_code(zeros) == [] and (zeros / "config.json").read_bytes() == before
    export(zeros, tmp_path / "out", "packed")
    with pytest.raises(PareError, match="dense ones do not load by it"):
        export(tmp_path / "out", tmp_path / "dense", remote_code=True)
    assert not (tmp_path / "dense").exists()


def test_vllm_that_cannot_find_the_plugin_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", sys)
    monkeypatch.setattr(remote_code, "entry_points", lambda **_: ())
    with pytest.raises(PareError, match="pip install --no-deps"):
        remote_code.Config.from_pretrained(tmp_path)
