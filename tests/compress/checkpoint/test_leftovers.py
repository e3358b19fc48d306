"""Tensors that the model class does not know: those of layers that were cut go, all others are copied, and both are told."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import SINGLE
from paredown.compress.errors import PareError


@pytest.fixture
def three_layers(tmp_path, save_model, tiny_config):
    """The folder of a tiny Llama with three layers, of which config.json names two."""
    tiny_config.num_hidden_layers = 3
    save_model(tmp_path / "model", tiny_config)
    edit_config(tmp_path / "model", num_hidden_layers=2, layer_types=None)
    return tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def add(folder, **tensors):
    path = folder / SINGLE
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_a_layer_that_config_leaves_out_is_not_copied_and_told_of(format, three_layers, tmp_path, prune):
    source = ModelSource(three_layers, "m")
    assert source.remarks == [
        "9 tensors of layers that config.json leaves out (model.layers.2) are not part of the model and are not copied"
    ]
    assert not source.verbatim and source.bytes_left == sum(
        entry.bytes for name, entry in source.files.entries.items() if ".layers.2." in name
    )
    prune(three_layers, tmp_path / "out", format=format)
    assert not [name for name in load_file(tmp_path / "out" / SINGLE) if ".layers.2." in name]


def test_a_layer_with_tensors_of_its_own_is_copied(three_layers, tmp_path, prune):
    extra = torch.arange(6.0)
    add(three_layers, **{"model.layers.2.eh_proj.weight": extra})
    source = ModelSource(three_layers, "m")
    assert len(source.verbatim) == 10 and source.bytes_left == 0
    assert source.remarks == [
        "10 tensors that LlamaForCausalLM does not know are copied as they are (model.layers.2.eh_proj.weight, ...)"
    ]
    prune(three_layers, tmp_path / "out", format="dense")
    written, stored = load_file(tmp_path / "out" / SINGLE), load_file(three_layers / SINGLE)
    assert all(torch.equal(written[name], stored[name]) for name in source.verbatim)


def test_layers_that_the_config_counts_apart_are_copied(three_layers):
    edit_config(three_layers, num_nextn_predict_layers=1)
    assert len(ModelSource(three_layers, "m").verbatim) == 9


def test_old_buffers_of_ordinary_layers_do_not_make_a_layer_that_was_cut_special(three_layers):
    add(three_layers, **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)})
    source = ModelSource(three_layers, "m")
    assert source.verbatim == [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    assert "10 tensors of layers" in source.remarks[0]


@pytest.mark.parametrize("format", ["packed", "dense"])
@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_values_that_are_not_finite_matter_only_where_the_class_uses_them(format, value, tiny_model, tmp_path, prune):
    from paredown.compress.run.verify import verify

    old = torch.full((4,), value)
    add(tiny_model, **{"model.layers.0.attention.masked_bias": old})
    prune(tiny_model, tmp_path / "out", format=format)
    written = load_file(tmp_path / "out" / SINGLE)["model.layers.0.attention.masked_bias"]
    assert torch.equal(written.view(torch.int32), old.view(torch.int32))
    assert not verify(tmp_path / "out")


def test_a_plan_tells_of_them_and_counts_them_out(three_layers):
    from paredown.compress import plan

    made = plan(three_layers, "magnitude-50", format="dense")
    assert "model.layers.2" in made.remarks[0]
    assert made.bytes_after == made.bytes_before - ModelSource(three_layers, "m").bytes_left


@pytest.mark.parametrize(
    ("named", "head"), [("LlamaForSequenceClassification", "score"), ("LlamaModel", "v_head"), ("Scorer", "classifier")]
)
def test_a_model_of_another_task_is_not_taken_for_a_causal_one(named, head, tmp_path, save_model, tiny_config):
    tiny_config.tie_word_embeddings = True
    save_model(tmp_path, tiny_config)
    add(tmp_path, **{f"{head}.weight": torch.randn(1, 64)})
    edit_config(tmp_path, architectures=[named])
    with pytest.raises(PareError, match=named):
        ModelSource(tmp_path, "m")


def test_a_base_model_whose_embedding_serves_as_head_is_told_of(tmp_path, save_model):
    save_model(tmp_path, LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=48, tie_word_embeddings=True))  # fmt: skip
    edit_config(tmp_path, architectures=["LlamaModel"])
    assert "LlamaModel, which has no output head" in ModelSource(tmp_path, "m").remarks[0]


def test_value_heads_of_a_causal_model_are_copied(tiny_model):
    add(tiny_model, **{"v_head.weight": torch.randn(1, 64)})
    assert ModelSource(tiny_model, "m").verbatim == ["v_head.weight"]
