"""Models with images beside the text: the text model is compressed, all else is kept, and the family's class loads it."""

import pytest
import torch
import transformers as t
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from paredown.compress.run.export import export

TEXT = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
}  # fmt: skip
QWEN = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
CONFIGS = {
    "qwen2_5_vl": t.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE}, vision_config={**QWEN_VISION, "fullatt_block_indexes": [0]}, **QWEN
    ),
    "qwen3_5": t.Qwen3_5Config(
        text_config={**TEXT, **LINEAR, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
        vision_config={**QWEN_VISION, "num_position_embeddings": 16}, **QWEN,
    ),
    "gemma3": t.Gemma3Config(
        text_config={**TEXT, "sliding_window": 8}, vision_config=VISION, mm_tokens_per_image=4, image_token_index=300,
        boi_token_index=301, eoi_token_index=302,
    ),
    "mistral3": t.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 16}, image_token_index=300,
    ),
    "llama4": t.Llama4Config(
        text_config={**TEXT, "num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
        vision_config={
            **VISION, "intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32,
            "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5,
        },
        image_token_index=300, boi_token_index=301, eoi_token_index=302,
    ),
}  # fmt: skip


@pytest.fixture
def model(request, tmp_path, tokenizer):
    """A random model of a family, saved in the folder `model`."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[request.param], dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return model


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


RARE = [pytest.param(name, marks=pytest.mark.all_families) for name in ("mistral3", "llama4")]


@pytest.mark.parametrize("model", ["qwen2_5_vl", "qwen3_5", "gemma3", *RARE], indirect=True)
def test_the_text_model_is_compressed_and_the_family_s_class_loads_what_is_written(model, tmp_path, prune, windows):
    folders = {name: tmp_path / name for name in ("model", "packed", "dense", "exported")}
    prune(folders["model"], folders["packed"], sparsity=0.5, method="magnitude")
    prune(folders["model"], folders["dense"], sparsity=0.5, method="magnitude", format="dense")
    export(folders["packed"], folders["exported"])
    assert names(folders["dense"]) == names(folders["exported"]) == names(folders["model"])
    packed, dense = (AutoModelForImageTextToText.from_pretrained(folders[name]) for name in ("packed", "dense"))
    wanted = logits(dense, windows.ids)
    assert type(packed).__name__ == f"Packed{type(model).__name__}" and type(dense) is type(model)
    assert torch.equal(logits(packed, windows.ids), wanted) and not torch.equal(logits(model, windows.ids), wanted)
    assert torch.equal(logits(type(model).from_pretrained(folders["exported"]), windows.ids), wanted)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folders["packed"]), windows.ids), wanted)
    inside = packed.config.quantization_config.modules
    assert inside and all("language_model." in name and "vis" not in name for name in inside)
    outside = {name: tensor for name, tensor in model.state_dict().items() if "vision" in name or "visual" in name}
    assert outside and all(torch.equal(packed.state_dict()[name], tensor) for name, tensor in outside.items())


@pytest.mark.parametrize("model", ["gemma3"], indirect=True)
def test_images_give_the_same_logits_packed_as_dense(model, tmp_path, prune):
    for format in ("packed", "dense"):
        prune(tmp_path / "model", tmp_path / format, sparsity=0.5, method="magnitude", format=format)
    ids = torch.tensor([[5, 301, 300, 300, 300, 300, 302, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == 300).long()}
    packed, dense = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("packed", "dense"))
    with torch.no_grad():
        assert torch.equal(packed(**inputs).logits, dense(**inputs).logits)


@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
def test_names_of_older_checkpoints_are_kept(model, tmp_path, prune, windows):
    path = tmp_path / "model" / "model.safetensors"
    old = {
        name.replace("model.visual.", "visual.").replace("language_model.", ""): x
        for name, x in load_file(path).items()
    }
    save_file(old, path, metadata={"format": "pt"})
    for format in ("packed", "dense"):
        prune(tmp_path / "model", tmp_path / format, sparsity=0.5, method="magnitude", format=format)
    assert names(tmp_path / "dense") == set(old)
    packed, dense = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("packed", "dense"))
    assert torch.equal(logits(packed, windows.ids), logits(dense, windows.ids))
