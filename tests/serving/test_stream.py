"""A packed checkpoint read as an engine reads an ordinary one."""

import subprocess
import sys

import pytest
import torch
import transformers as t
from packing import pack_folder
from safetensors.torch import load_file

from paredown.compress import PareError
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.transformers_plugin import dense_config
from paredown.compress.serving.stream import Names, Unpacking
from paredown.compress.storage.kinds import KINDS


def read(folder, hold=lambda name, tensors, bias: None):
    source = ModelSource(folder, "packed")
    names = Names.read(str(folder))
    unpacking = Unpacking(source.modules, frozenset(source.verbatim), names, dense_config(source.config), hold)
    return dict(unpacking(load_file(folder / "model.safetensors").items()))


@pytest.fixture
def packed(tmp_path, tiny_config):
    def make(kind="bitmap", config=tiny_config):
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
        return tmp_path / "packed", pack_folder(model, tmp_path / "packed", kind)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_handed_on_as_the_dense_weight(kind, packed):
    folder, dense = packed(kind)
    found = read(folder)
    wanted = {n: w for n, w in dense.state_dict().items() if n in found or n != "lm_head.weight"}
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-6)


def test_a_weight_that_is_held_is_replaced_by_what_is_loaded_in_its_place(packed):
    folder, _ = packed("lowrank")
    held = {}

    def hold(name, tensors, bias):
        if name.endswith("q_proj"):
            held[name] = set(tensors)
            return torch.zeros(1)
        return None

    found = read(folder, hold)
    assert held == {f"model.layers.{i}.self_attn.q_proj": {"left", "right"} for i in (0, 1)}
    assert found["model.layers.0.self_attn.q_proj.weight"].shape == (1,)


def damaged(tensors, key, change):
    tensors[key] = change(tensors[key])
    return tensors


KEY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: {k: v for k, v in s.items() if k != f"{KEY}.values"}, f"lacks tensors of {KEY}"),
        (lambda s: s | {f"{KEY}.left": torch.zeros(2)}, "a weight of kind bitmap has no such tensor"),
        (lambda s: damaged(s, f"{KEY}.bitmap", lambda b: b ^ 1), "marks"),
        (lambda s: damaged(s, f"{KEY}.values", lambda v: v[1:]), "has shape"),
        (lambda s: damaged(s, "model.norm.weight", lambda v: v * torch.nan), "holds NaN"),
    ],
)
def test_missing_extra_and_damaged_tensors_are_errors(change, told, packed):
    folder, _ = packed("bitmap")
    source = ModelSource(folder, "packed")
    tensors = change(load_file(folder / "model.safetensors"))
    unpacking = Unpacking(source.modules, frozenset(), Names(), dense_config(source.config), lambda *_: None)
    with pytest.raises(PareError, match=told):
        list(unpacking(tensors.items()))


def test_packed_experts_are_handed_on_as_files_of_the_family_hold_them(tmp_path, prune, save_model):
    config = t.MixtralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    save_model(tmp_path / "model", config, torch.float32)
    prune(tmp_path / "model", tmp_path / "packed", method="magnitude")
    prune(tmp_path / "model", tmp_path / "dense", method="magnitude", format="dense")
    found, wanted = read(tmp_path / "packed"), load_file(tmp_path / "dense" / "model.safetensors")
    assert found.keys() == wanted.keys() and any("experts.3" in name for name in found)
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_serving_needs_no_harness():
    """What a serving process imports of paredown works without lm-eval, datasets and accelerate."""
    code = (
        "import sys\n"
        "for name in ('lm_eval', 'datasets', 'accelerate'): sys.modules[name] = None\n"
        "import paredown.compress, paredown.compress.serving.stream, paredown.compress.serving.cutting\n"
        "import paredown.compress.run.export, paredown.compress.run.verify\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
