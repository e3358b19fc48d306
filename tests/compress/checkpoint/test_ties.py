"""Tied weights are read, and written, as transformers reads them: by the config and by what the files hold."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def tied_model(tmp_path, save_model, tiny_config):
    """A tiny Llama with a tied head, of which only the embedding is stored."""
    tiny_config.tie_word_embeddings = True
    save_model(tmp_path / "model", tiny_config)
    return tmp_path / "model"


def rewrite(folder, edit):
    """Change the tensors of a single-file checkpoint in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def differ(tensors):
    tensors[HEAD] = tensors[EMBEDDING].flip(0).clone()


def repeat(tensors):
    tensors[HEAD] = tensors[EMBEDDING].clone()


def rename(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)


def weights_of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize("format", ["packed", "dense"])
@pytest.mark.parametrize("edit", [differ, repeat, rename])
def test_both_weights_are_those_that_transformers_reads_before_and_after(edit, format, tied_model, tmp_path, prune):
    rewrite(tied_model, edit)
    wanted = weights_of(tied_model)
    prune(tied_model, tmp_path / "out", format=format)
    for ours, theirs in zip(weights_of(tmp_path / "out"), wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_two_heads_that_differ_stay_apart_and_are_told_of(tied_model, tmp_path, prune):
    rewrite(tied_model, differ)
    source = ModelSource(tied_model, "m")
    assert not source.tied and HEAD in source.parameters and not source.verbatim
    assert any(HEAD in remark and "stay apart" in remark for remark in source.remarks)
    read = source.read([HEAD, EMBEDDING])
    assert torch.equal(read[HEAD], read[EMBEDDING].flip(0))
    prune(tied_model, tmp_path / "out", format="dense")
    assert not json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings")
    assert {HEAD, EMBEDDING} <= set(load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize("edit", [repeat, rename])
def test_one_tensor_under_either_name_or_both_is_tied(edit, tied_model):
    rewrite(tied_model, edit)
    source = ModelSource(tied_model, "m")
    assert source.tied == {HEAD: EMBEDDING} and HEAD not in source.parameters
    assert not source.verbatim and not source.remarks
    assert torch.equal(source.read([EMBEDDING])[EMBEDDING], load_file(tied_model / "model.safetensors")[HEAD])


def test_a_head_of_another_shape_or_dtype_is_not_the_embedding(tied_model, tmp_path):
    rewrite(tied_model, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].float()}))
    assert not ModelSource(tied_model, "m").tied
    rewrite(tied_model, lambda tensors: tensors.update({HEAD: tensors[HEAD][:300].clone()}))
    with pytest.raises(PareError, match=r"lm_head.weight' has shape \(300, 64\), config.json wants \(320, 64\)"):
        ModelSource(tied_model, "m")


def test_neither_name_is_a_missing_tensor(tied_model):
    rewrite(tied_model, lambda tensors: tensors.pop(EMBEDDING))
    with pytest.raises(PareError, match=r"1 tensors of a llama model are missing, first 'model.embed_tokens.weight'"):
        ModelSource(tied_model, "m")


def test_values_are_compared_only_where_both_names_are_stored(tied_model, monkeypatch):
    def read(*_, **__):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("paredown.compress.checkpoint.tensor_files.TensorFiles.read", read)
    assert ModelSource(tied_model, "m").tied


def test_ties_of_a_class_with_other_names_are_settled_too(tmp_path, save_model):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    save_model(tmp_path, config)
    rewrite(tmp_path, lambda tensors: tensors.update({HEAD: tensors["transformer.wte.weight"].flip(0).clone()}))
    source = ModelSource(tmp_path, "m")
    assert not source.tied and not source.config.tie_word_embeddings and HEAD in source.parameters


def test_an_untied_config_is_followed_although_the_heads_are_equal(tmp_path, save_model, tiny_config):
    assert isinstance(tiny_config, LlamaConfig) and not tiny_config.tie_word_embeddings
    save_model(tmp_path, tiny_config)
    rewrite(tmp_path, repeat)
    source = ModelSource(tmp_path, "m")
    assert not source.tied and {HEAD, EMBEDDING} <= set(source.parameters) and not source.remarks
