"""Blocks of Mamba models and of hybrids: which go, against the whole model, and what is refused by name."""

import pytest
import torch
import transformers as t
from transformers import AutoModelForCausalLM

from paredown.compress import PareError, verify
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.methods import build
from paredown.compress.model.blocks import blocks
from paredown.compress.model.reshape import reshaped
from paredown.compress.survey.depth import profile

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 4, "bos_token_id": 256, "eos_token_id": 256,
    "pad_token_id": 256, "initializer_range": 0.3,
}  # fmt: skip
HYBRID = {
    **SIZES, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "mamba": t.MambaConfig(**SIZES, state_size=8),
    "mamba2": t.Mamba2Config(**SIZES, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
    "falcon_mamba": t.FalconMambaConfig(**SIZES, state_size=8),
    "jamba": t.JambaConfig(
        **HYBRID, mamba_d_state=8, mamba_dt_rank=8, num_experts=1, num_experts_per_tok=1, attn_layer_period=2,
        attn_layer_offset=1,
    ),
}  # fmt: skip
IDS = torch.randint(3, 250, (3, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def loss_without(model, gone):
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    for i in gone:
        layers[i].forward = lambda hidden_states, *args, **kwargs: hidden_states
    logits = model(IDS, use_cache=False).logits[:, :-1].float()
    for i in gone:
        del layers[i].forward
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))


@pytest.mark.parametrize("family", MODELS)
def test_each_block_that_goes_is_the_best_one_left_by_the_loss_of_the_whole_model(family, tmp_path, save_model):
    model = save_model(tmp_path / "m", MODELS[family], torch.float32)
    source = ModelSource(tmp_path / "m", "m")
    found, gone = profile(source, blocks(source), IDS, build("mamba_shedder", {"blocks": 2}), 2).removals, []
    for block, loss in found:
        tried = {i: loss_without(model, [*gone, i]) for i in range(4) if i not in gone}
        assert block == min(tried, key=tried.get) and loss == pytest.approx(tried[block], abs=1e-4)
        gone.append(block)


@pytest.mark.parametrize(("family", "method"), [("mamba", "mamba_shedder"), ("mamba2", "paredown_depth")])
def test_what_remains_is_an_ordinary_smaller_model(family, method, tmp_path, save_model, run_raw):
    save_model(tmp_path / "model", MODELS[family], torch.float32)
    report = run_raw(tmp_path / "model", {"method": method, "options": {"blocks": 3}})
    assert report["parameters"]["kept"] * 4 == report["parameters"]["targeted"] * 3 and verify(tmp_path / "out") == []
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (
        small.config.model_type == family and len(report["structure"]["blocks"]) == small.config.num_hidden_layers == 3
    )


def test_a_block_whose_class_finds_its_weights_by_number_is_refused_by_name(tmp_path, save_model):
    kinds = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
    config = t.Zamba2Config(
        **HYBRID, layers_block_type=kinds, mamba_d_state=8, n_mamba_heads=4, mamba_ngroups=1, num_mem_blocks=1,
        chunk_size=8, adapter_rank=8,
    )  # fmt: skip
    save_model(tmp_path / "m", config, torch.float32)
    source = ModelSource(tmp_path / "m", "m")
    with pytest.raises(PareError, match=r"model.layers.3 cannot be run in its new place \(KeyError: 2\)"):
        reshaped(source, [0, 1, 3], {})
    assert reshaped(source, [0, 1, 2], {}).kept == (0, 1, 2)
