"""LoRAP whole: the MLP's channels by its formula, against slow loops, and attention by low rank behind it."""

import pytest
import torch
import transformers as t
from transformers import AutoModelForCausalLM

from paredown.compress import PareError, verify
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.methods import build
from paredown.compress.recipe import Recipe
from paredown.compress.shape_job import resolve

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256,
    "initializer_range": 0.2,
}  # fmt: skip


@torch.no_grad()
def scores_of(model, ids):
    """I_j of each block's channels, from the whole model, one channel after another."""
    found = []
    for layer in model.model.layers:
        seen = {}
        for name in ("up_proj", "down_proj"):
            hook = lambda m, args, y, name=name, seen=seen: seen.__setitem__(name, args[0].double().flatten(0, 1))  # noqa: E731
            handle = getattr(layer.mlp, name).register_forward_hook(hook)
            model(ids, use_cache=False)
            handle.remove()
        n = [x.square().mean(0).sqrt() for x in (seen["up_proj"], seen["down_proj"])]
        scores = []
        for j in range(48):
            total = sum(
                sum((float(weight[j, i]) * float(n[0][i])) ** 2 for i in range(32)) ** 0.5
                for weight in (layer.mlp.gate_proj.weight.double(), layer.mlp.up_proj.weight.double())
            )
            down = layer.mlp.down_proj.weight.double()
            scores.append(total + sum((float(down[i, j]) * float(n[1][j])) ** 2 for i in range(32)) ** 0.5)
        found.append(scores)
    return found


@pytest.mark.parametrize("config", [t.LlamaConfig, t.Phi3Config], ids=["gate and up apart", "fused"])
def test_the_channels_that_stay_are_the_highest_and_the_very_lowest(config, tmp_path, save_model, windows, prune):
    model = save_model(tmp_path / "model", config(**SIZES), torch.float32)
    options = {"units": 24, "multiple": 8, "least": 0.05}
    prune(tmp_path / "model", tmp_path / "out", method="lorap_mlp", options=options)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if config is t.Phi3Config:
        for layer in model.model.layers:
            layer.mlp.gate_proj, layer.mlp.up_proj = (torch.nn.Linear(32, 48, bias=False) for _ in range(2))
            layer.mlp.gate_proj.weight.data, layer.mlp.up_proj.weight.data = layer.mlp.gate_up_proj.weight.chunk(2)
            layer.mlp.gate_up_proj = _Both(layer.mlp)
    for scores, before, after in zip(
        scores_of(model, windows.ids), model.model.layers, small.model.layers, strict=True
    ):
        order = sorted(range(48), key=scores.__getitem__)
        stay = sorted([*order[:2], *order[-22:]])
        torch.testing.assert_close(after.mlp.down_proj.weight, before.mlp.down_proj.weight[:, stay])


class _Both(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.__dict__["mlp"] = mlp

    def forward(self, x):
        return torch.cat([self.mlp.gate_proj(x), self.mlp.up_proj(x)], -1)


def test_both_halves_are_one_recipe_of_two_stages(tmp_path, save_model, run_raw):
    save_model(tmp_path / "model", t.LlamaConfig(**SIZES), torch.float32)
    attention = {"include": ["*self_attn*"]}
    weights = {"v_proj": 3.0, "o_proj": 3.0, "q_proj": 1.0, "k_proj": 1.0}
    second = {
        "method": "lorap", "options": {"kept": 0.8}, "targets": attention,
        "allocation": {"strategy": "per_type", "weights": weights},
    }  # fmt: skip
    report = run_raw(
        tmp_path / "model", {"stages": [{"method": "lorap_mlp", "options": {"units": 40, "multiple": 8}}, second]}
    )
    assert verify(tmp_path / "out") == [] and report["structure"]["units"] == {"intermediate_size": [48, 40]}
    ranks = {layer["name"].rpartition(".")[2] for layer in report["layers"] if "rank" in layer}
    assert ranks <= {"q_proj", "k_proj", "v_proj", "o_proj"} and ranks


def test_kept_is_a_share_of_the_channels_and_units_are_channels(tmp_path, save_model):
    save_model(tmp_path / "m", t.LlamaConfig(**SIZES))
    recipe = Recipe.parse({"method": "lorap_mlp", "options": {"kept": 0.5, "multiple": 8}})
    assert resolve(ModelSource(tmp_path / "m", "m"), recipe).units == {"intermediate_size": 24}
    with pytest.raises(PareError, match="lorap_mlp removes channels of MLPs: leave unit out"):
        build("lorap_mlp", {"kept": 0.8, "unit": "kv_groups"})
