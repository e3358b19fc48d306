"""A model as a skeleton: weights come by the class's names, whatever the checkpoint calls and splits them."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from paredown.compress.checkpoint.origins import natural
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import INDEX, TensorFiles
from paredown.compress.errors import PareError

C = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": t.LlamaConfig(**C),
    "llama tied": t.LlamaConfig(**C, tie_word_embeddings=True),
    "gpt2": t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "mixtral": t.MixtralConfig(**C, num_local_experts=12),  # 12: `experts.10` must follow `experts.9`
    "qwen3_moe": t.Qwen3MoeConfig(**C, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_those_that_from_pretrained_gives(family, tmp_path, save_model):
    model = save_model(tmp_path, CONFIGS[family])
    source = ModelSource(tmp_path, family)
    assert all(p.is_meta for p in source.model.parameters())
    read = source.read(source.parameters)
    assert set(read) == set(source.parameters) and not source.verbatim
    for name, tensor in model.state_dict().items():
        assert torch.equal(read[source.tied.get(name, name)], tensor), name


@pytest.mark.parametrize("family", CONFIGS)
def test_names_and_layouts_go_back_to_those_of_the_checkpoint(family, tmp_path, save_model):
    save_model(tmp_path, CONFIGS[family])
    source = ModelSource(tmp_path, family)
    stored, back = TensorFiles(tmp_path), dict(source.as_stored(source.parameters, source.read(source.parameters)))
    assert set(back) == set(stored.entries)
    for name, tensor in stored.read(stored.entries).items():
        assert torch.equal(back[name], tensor), name


def test_tied_weights_are_one_and_materialising_them_is_undone(tmp_path, save_model):
    save_model(tmp_path, CONFIGS["llama tied"])
    source = ModelSource(tmp_path, "tied")
    assert source.tied == {"lm_head.weight": "model.embed_tokens.weight"} and "lm_head.weight" not in source.parameters
    prefix = "model.layers.0."
    names = ["mlp.up_proj.weight", "input_layernorm.weight"]
    source.materialise(prefix, names)
    layer = source.model.model.layers[0]
    assert not layer.mlp.up_proj.weight.is_meta and layer.mlp.down_proj.weight.is_meta
    source.release(prefix, names)
    assert all(p.is_meta for p in source.model.parameters())


@pytest.mark.parametrize("fault", [None, RuntimeError, KeyboardInterrupt])
def test_a_loaded_block_is_released_whatever_happens(fault, tiny_model):
    source = ModelSource(tiny_model, "x")
    block = SimpleNamespace(prefix="model.layers.0.", names=["mlp.up_proj.weight", "input_layernorm.weight"])
    layer = source.model.model.layers[0]
    with pytest.raises(fault) if fault else nullcontext(), source.loaded(block):
        stored = source.read(block.prefix + name for name in block.names)
        assert all(torch.equal(layer.get_parameter(name), stored[block.prefix + name]) for name in block.names)
        assert layer.mlp.down_proj.weight.is_meta
        if fault:
            raise fault
    assert all(p.is_meta for p in source.model.parameters())


def test_a_block_that_cannot_be_read_leaves_nothing_loaded(tiny_model):
    path = tiny_model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    source = ModelSource(tiny_model, "x")
    block = SimpleNamespace(prefix="model.layers.0.", names=["input_layernorm.weight", "mlp.up_proj.weight"])
    with pytest.raises(PareError, match="up_proj"), source.loaded(block):
        pass
    assert all(p.is_meta for p in source.model.parameters())


def test_the_compute_dtype_is_asked_for_and_the_stored_one_kept(tiny_model):
    source = ModelSource(tiny_model, "x", dtype=torch.float32)
    name = "mlp.up_proj.weight"
    source.materialise("model.layers.0.", [name])
    assert source.model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert source.read(["model.layers.0." + name])["model.layers.0." + name].dtype == torch.bfloat16
    assert ModelSource(tiny_model, "x").dtype == torch.bfloat16


def test_a_stale_index_beside_a_single_file_is_not_read(tiny_model):
    before = ModelSource(tiny_model, "x")
    (tiny_model / INDEX).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": "gone.safetensors"}}))
    after = ModelSource(tiny_model, "x")
    assert after.files.entries == before.files.entries
    assert after.remarks == [
        "model.safetensors is read, and model.safetensors.index.json beside it is not, as in transformers"
    ]


def test_a_shape_that_the_headers_contradict_is_found_without_reading_a_weight(tiny_model, monkeypatch):
    path = tiny_model / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].T.contiguous()}, path, metadata={"format": "pt"})
    monkeypatch.setattr(TensorFiles, "read", None)
    with pytest.raises(
        PareError, match=r"layers.1.mlp.down_proj.weight' has shape \(96, 64\), config.json wants \(64, 96\)"
    ):
        ModelSource(tiny_model, "x")


def test_experts_that_do_not_fit_together_are_named(tmp_path, save_model):
    save_model(tmp_path, CONFIGS["mixtral"])
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    first, second = [name for name in tensors if "experts.3.w2" in name]
    wrong = {first: tensors[first][:-1].contiguous(), second: tensors[second].repeat(2, 1)}
    save_file({**tensors, **wrong}, path, metadata={"format": "pt"})
    with pytest.raises(
        PareError, match=r"is made of 12 tensors, first .*experts.0.w2.* hold \d+ numbers; config.json wants"
    ):
        ModelSource(tmp_path, "m")
    third = first.replace("experts.3", "experts.4")  # now the numbers add up, and the shapes do not
    more = torch.cat([tensors[third], tensors[third][:1]])
    save_file({**tensors, first: wrong[first], third: more}, path, metadata={"format": "pt"})
    source = ModelSource(tmp_path, "m")
    with pytest.raises(PareError, match=r"down_proj' cannot be made of its 12 tensors, first .*experts.0.w2"):
        source.read(source.parameters)


def test_weights_come_in_the_order_of_their_names(tiny_model):
    source = ModelSource(tiny_model, "x")
    assert list(source.read(reversed(list(source.parameters)))) == sorted(source.parameters)


def test_tensors_that_the_class_does_not_know_are_copied_verbatim(tiny_model, tmp_path, prune, logits_of):
    path = tiny_model / "model.safetensors"
    extra = torch.arange(12.0).view(3, 4)
    save_file({**load_file(path), "mtp.head.weight": extra}, path, metadata={"format": "pt"})
    assert ModelSource(tiny_model, "x").verbatim == ["mtp.head.weight"]
    for format in ("packed", "dense"):
        prune(tiny_model, tmp_path / format, format=format)
        assert torch.equal(load_file(tmp_path / format / "model.safetensors")["mtp.head.weight"], extra)
    assert torch.equal(logits_of(tmp_path / "packed"), logits_of(tmp_path / "dense"))


def test_code_of_a_checkpoint_is_never_run(tiny_model):
    (tiny_model / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((tiny_model / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "llama"}
    config["_attn_implementation_internal"] = "evil/kernel"
    (tiny_model / "config.json").write_text(json.dumps(config))
    source = ModelSource(tiny_model, "x")
    assert type(source.model) is t.LlamaForCausalLM and source.config._attn_implementation != "evil/kernel"


def test_models_that_do_not_continue_text_are_refused(tmp_path, save_model):
    t.ViTModel(t.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)).save_pretrained(
        tmp_path
    )
    with pytest.raises(PareError, match="vit models are vision models without text"):
        ModelSource(tmp_path, "vit")


def test_natural_order_counts_as_people_do():
    names = ["experts.10.w", "experts.9.w", "experts.a.w"]
    assert sorted(names, key=natural)[1:] == ["experts.9.w", "experts.10.w"]
