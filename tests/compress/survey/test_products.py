"""What is observed while a block runs is what its layers were fed, to the last token."""

import pytest
import torch
import transformers as t

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import blocks
from paredown.compress.model.stream import start
from paredown.compress.survey.collect import observe
from paredown.compress.survey.products import InputObserver

C = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": t.LlamaConfig(**C),
    "gpt2": t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "mamba": t.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8),
}
NEEDS = frozenset({"gram", "mean", "absolute_mean", "window_mean", "window_norm"})


def observed(folder, windows, batch_tokens=None):
    source = ModelSource(folder, "m")
    block = blocks(source)[0]
    stream = start(source, windows.ids, batch_tokens)
    source.materialise(block.prefix, block.names)
    return {name: stats.inputs for name, stats in observe(stream, block, block.views(), NEEDS).items()}


@pytest.mark.parametrize("batch_tokens", [48, 2048])
@pytest.mark.parametrize("family", CONFIGS)
def test_moments_are_those_of_every_layers_input(family, batch_tokens, tmp_path, save_model, windows):
    model = save_model(tmp_path / "m", CONFIGS[family])
    stats = observed(tmp_path / "m", windows, batch_tokens)
    inputs = {}
    for name in stats:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        model(windows.ids, use_cache=False)
    assert stats.keys() == inputs.keys() and stats
    for name, x in inputs.items():
        windowed = x.double().view(*windows.ids.shape, -1)
        torch.testing.assert_close(
            stats[name].window_mean, windowed.abs().mean(1).square().mean(0), rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(
            stats[name].window_norm, windowed.square().mean(1).sqrt().mean(0), rtol=1e-3, atol=1e-6
        )
        x = x.double().flatten(0, -2)  # (tokens, in)
        assert stats[name].count == len(x) == windows.tokens
        torch.testing.assert_close(stats[name].gram, x.T @ x / len(x), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(stats[name].mean, x.mean(0), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(stats[name].absolute_mean, x.abs().mean(0), rtol=1e-3, atol=1e-6)


def test_layers_that_are_fed_the_same_tensor_share_their_statistics(tmp_path, save_model, windows):
    save_model(tmp_path / "m", CONFIGS["llama"])
    stats = {name.rpartition(".")[2]: s for name, s in observed(tmp_path / "m", windows, 48).items()}
    assert stats["q_proj"] is stats["k_proj"] is stats["v_proj"] and stats["gate_proj"] is stats["up_proj"]
    assert len({id(s) for s in stats.values()}) == 4


def test_an_expert_counts_only_the_tokens_that_reached_it(tmp_path, save_model, windows):
    config = t.MixtralConfig(**C, num_local_experts=4, num_experts_per_tok=1)
    save_model(tmp_path / "m", config)
    stats = observed(tmp_path / "m", windows)
    counts = {name: s.count for name, s in stats.items()}
    for part in ("gate_up_proj", "down_proj"):
        of_experts = [count for name, count in counts.items() if f"experts.{part}." in name]
        assert sum(of_experts) == windows.tokens and len(of_experts) > 1
    assert counts["model.layers.0.self_attn.q_proj"] == windows.tokens


def test_a_layer_that_is_never_called_and_inputs_that_are_not_finite(tmp_path, save_model):
    save_model(tmp_path / "m", CONFIGS["llama"])
    source = ModelSource(tmp_path / "m", "m")
    block = blocks(source)[0]
    source.materialise(block.prefix, block.names)
    mlp = source.model.model.layers[0].mlp
    with InputObserver(block.views(), NEEDS, torch.device("cpu")) as observer:
        mlp.up_proj(torch.ones(2, 64, dtype=torch.bfloat16))
    assert list(observer.stats) == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(PareError, match=r"layers.0.mlp.up_proj: its inputs hold NaN"), observer:
        mlp.up_proj(torch.full((2, 64), torch.nan, dtype=torch.bfloat16))
