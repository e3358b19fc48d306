"""A Llama whose blocks have sizes of their own, in the layout that engines read: against a slow forward of that layout."""

import importlib.util
import json

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoConfig, AutoTokenizer

from paredown.compress import PareError, export, load, verify
from paredown.compress.checkpoint.transformers_plugin import packed_config
from paredown.compress.storage.shapes import Shapes

SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256,
    "initializer_range": 0.1, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
}  # fmt: skip
IDS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))


def uneven_llama(folder, save_model, tokenizer, widths, absent=(), groups=None, **settings):
    """A packed checkpoint whose MLPs have these widths, without the modules that are absent."""
    config = t.LlamaConfig(**{**SIZES, **settings})
    state = dict(save_model(folder / "dense", config, torch.float32).state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    sizes = {}
    for i, width in enumerate(widths):
        for name in ("gate_proj", "up_proj", "down_proj"):
            full = f"model.layers.{i}.mlp.{name}.weight"
            state[full] = state[full][:, :width] if name == "down_proj" else state[full][:width]
            sizes[full] = tuple(state[full].shape)
            if name != "down_proj" and config.mlp_bias:
                bias = full.replace("weight", "bias")
                state[bias] = torch.linspace(-1, 1, width)
                sizes[bias] = (width,)
    for full in groups or ():
        state[full] = state[full][:16]
        sizes[full] = (16, 64)
    gone = tuple(f"{name}." for name in absent)
    state = {name: tensor.contiguous() for name, tensor in state.items() if not name.startswith(gone)}
    sizes = {name: shape for name, shape in sizes.items() if name in state}
    out = folder / "packed"
    packed_config(config, {}, [], Shapes(sizes, tuple(absent))).save_pretrained(out)
    save_file(state, out / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(out)
    return out


def rotated(x, theta):
    """Rotary positions: x (batch, heads, length, width)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] * theta ** (-torch.arange(half) / half)  # (length, half)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def forward(folder, ids):
    """The logits of a folder in this layout, by its block_configs; every tensor must be used."""
    config, left = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    width = config["head_dim"] or hidden // heads
    used = set()

    def get(name):
        used.add(name)
        return left[name].double()

    def linear(x, name):
        y = x @ get(f"{name}.weight").T
        return y + get(f"{name}.bias") if f"{name}.bias" in left else y

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * get(f"{name}.weight")

    def split(y, n):
        return y.unflatten(-1, (n, width)).transpose(1, 2)

    x = get("model.embed_tokens.weight")[ids]
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
    for i, block in enumerate(config["block_configs"]):
        at, attention, ffn = f"model.layers.{i}.", block["attention"], block["ffn"]
        if not attention["no_op"]:
            groups = heads // attention["n_heads_in_group"]
            z = norm(x, f"{at}input_layernorm")
            q, k, v = (
                split(linear(z, f"{at}self_attn.{name}_proj"), n)
                for name, n in (("q", heads), ("k", groups), ("v", groups))
            )
            q, k = rotated(q, config["rope_theta"]), rotated(k, config["rope_theta"])
            k, v = (y.repeat_interleave(heads // groups, 1) for y in (k, v))
            weights = (q @ k.transpose(-1, -2) / width**0.5 + mask).softmax(-1)
            x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{at}self_attn.o_proj")
        if not ffn["no_op"]:
            z = norm(x, f"{at}post_attention_layernorm")
            gate, up = (linear(z, f"{at}mlp.{name}_proj") for name in ("gate", "up"))
            assert up.shape[-1] == ffn["intermediate_size"]
            x = x + linear(silu(gate) * up, f"{at}mlp.down_proj")
    head = get("model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight")
    logits = norm(x, "model.norm") @ head.T
    assert used == set(left)
    return logits


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}])
@torch.no_grad()
def test_the_layout_computes_what_the_packed_model_does(settings, tmp_path, save_model, tokenizer):
    absent = ["model.layers.1.self_attn", "model.layers.2.mlp"]
    packed = uneven_llama(tmp_path, save_model, tokenizer, [256, 96, 512, 300], absent, **settings)
    told = export(packed, tmp_path / "deci", "deci")
    assert told["format"] == "deci" and told["bytes"]["after"] < told["bytes"]["before"]  # two norms fewer
    torch.testing.assert_close(forward(tmp_path / "deci", IDS), load(packed)(IDS).logits.double(), atol=1e-4, rtol=1e-4)
    assert (
        AutoTokenizer.from_pretrained(packed)("a b").input_ids
        == AutoTokenizer.from_pretrained(tmp_path / "deci")("a b").input_ids
    )
    notes = []
    assert verify(tmp_path / "deci", notes.append) == [] and "is for other engines" in notes[0]


def test_the_config_says_each_block_to_both_readers(tmp_path, save_model, tokenizer):
    absent = ["model.layers.1.self_attn", "model.layers.2.mlp"]
    export(uneven_llama(tmp_path, save_model, tokenizer, [256, 96, 512, 300], absent), tmp_path / "deci", "deci")
    config = json.loads((tmp_path / "deci" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert "quantization_config" not in config and config["rope_theta"] == 5e5
    # as llama.cpp's converter reads it: rounded to a multiple of 256, absent where it could not be said
    found = [block["ffn"].get("ffn_mult", "none") for block in config["block_configs"]]
    sizes = [-(-int(2 * mult * 64 / 3) // 256) * 256 if isinstance(mult, float) else mult for mult in found]
    assert sizes == [256, "none", None, "none"]
    assert [block["attention"]["n_heads_in_group"] for block in config["block_configs"]] == [2, None, 2, 2]
    read = AutoConfig.from_pretrained(tmp_path / "deci", trust_remote_code=True)
    ffn = [block.ffn for block in read.block_configs]
    assert [f.intermediate_size for f in ffn] == [256, 96, None, 300] and not any(hasattr(f, "ffn_mult") for f in ffn)
    assert [block.attention.no_op for block in read.block_configs] == [False, True, False, False]
    assert type(read).from_dict(json.loads(read.to_json_string())).block_configs == read.block_configs


@torch.no_grad()
def test_an_ordinary_llama_is_exported_too(tmp_path, save_model):
    model = save_model(tmp_path / "model", t.LlamaConfig(**SIZES), torch.float32)
    export(tmp_path / "model", tmp_path / "deci", "deci")
    torch.testing.assert_close(forward(tmp_path / "deci", IDS), model(IDS).logits.double(), atol=1e-4, rtol=1e-4)


def test_the_class_beside_the_weights_needs_transformers_alone(tmp_path, save_model):
    save_model(tmp_path / "model", t.LlamaConfig(**SIZES), torch.float32)
    export(tmp_path / "model", tmp_path / "deci", "deci")
    code = (tmp_path / "deci" / "configuration_decilm.py").read_text()
    assert "paredown" not in code
    spec = importlib.util.spec_from_file_location("alone", tmp_path / "deci" / "configuration_decilm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.DeciLMConfig(block_configs=[{"ffn": {"no_op": True}}]).block_configs[0].ffn.no_op


@pytest.mark.parametrize(
    ("absent", "groups", "told"),
    [
        (["model.layers.0.self_attn"], (), r"model.layers.0 has no attention, and readers of the deci layout fail"),
        (
            (),
            ["model.layers.1.self_attn.k_proj.weight"],
            r"layers.1.self_attn.v_proj.weight has shape \[32, 64\], which",
        ),
    ],
)
def test_what_the_layout_cannot_say_is_refused(absent, groups, told, tmp_path, save_model, tokenizer):
    packed = uneven_llama(tmp_path, save_model, tokenizer, [256] * 4, absent, groups)
    with pytest.raises(PareError, match=told):
        export(packed, tmp_path / "deci", "deci")
    with pytest.raises(PareError, match="have sizes of their own, which no config of an ordinary llama checkpoint"):
        export(packed, tmp_path / "plain")
    assert not (tmp_path / "deci").exists()


def test_other_families_and_packed_weights_are_refused(tmp_path, save_model, tiny_model, prune):
    save_model(tmp_path / "gpt2", t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64))
    with pytest.raises(PareError, match="is a gpt2 model, and the deci layout is for llama models"):
        export(tmp_path / "gpt2", tmp_path / "deci", "deci")
    prune(tiny_model, tmp_path / "packed")
    with pytest.raises(PareError, match="has packed weights, and the deci layout holds ordinary ones"):
        export(tmp_path / "packed", tmp_path / "deci", "deci")
