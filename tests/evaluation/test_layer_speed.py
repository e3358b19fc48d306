"""Each kind of layer is timed as the model runs it, beside its dense counterpart."""

import pytest
import torch
import transformers as t
from torch import nn
from torch.nn import functional as F

from paredown.compress.storage.fuse import fuse
from paredown.evaluation.layer_speed import dense_product, fused_experts, layer_cases, linear_kinds
from paredown.evaluation.speed import Settings, measure

SMALL = Settings(batches=(2,), context=16, decode=8, repeats=1)


def test_every_kind_of_layer_is_timed_against_its_dense_counterpart(packed, dense):
    found = measure({"model": packed, "against": dense}, SMALL)["layers"]
    kinds = {(row["kind"], row["out"], row["in"]): row["count"] for row in found}
    assert kinds == {
        ("sparse24", 64, 64): 4, ("sparse24", 32, 64): 4, ("sparse24", 96, 64): 4, ("sparse24", 64, 96): 2,
    }  # fmt: skip
    for row in found:
        assert [timing["tokens"] for timing in row["timings"]] == [1, 8, 32, 512]
        assert row["bytes"] < 2 * row["out"] * row["in"] and row["against"] == "the other model's layer"
        for timing in row["timings"]:
            quotient = timing["against_seconds"]["median"] / timing["seconds"]["median"]
            assert timing["ratio"] == pytest.approx(quotient) and timing["relative_error"] < 0.01
    alone = measure({"model": packed}, SMALL)["layers"]
    assert all(row["against"] == "torch's product with the unpacked weight" for row in alone)
    plain = measure({"model": dense}, SMALL)["layers"]
    assert all(row["against"] is None and row["timings"][0]["ratio"] is None for row in plain)


def test_the_dense_product_is_that_of_the_unpacked_weight(packed):
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    layer = packed.model.layers[0].mlp.up_proj
    assert torch.equal(dense_product(layer)(x), F.linear(x, layer.weight))
    conv = t.pytorch_utils.Conv1D(5, 64)
    nn.init.normal_(conv.bias)
    x = torch.randn(3, 64)
    torch.testing.assert_close(dense_product(conv)(x), conv(x))


def test_layers_that_are_one_product_are_timed_as_one(packed, dense):
    """A member of a group multiplies for all of them: alone it would look slower than it is."""
    assert fuse(packed, "cpu") == 4
    units = linear_kinds(packed)
    assert {key: len(found) for key, found in units.items()} == {
        ("sparse24, 3 fused", 128, 64): 2, ("sparse24", 64, 64): 2, ("sparse24, 2 fused", 192, 64): 2,
        ("sparse24", 64, 96): 2,
    }  # fmt: skip
    assert units["sparse24, 2 fused", 192, 64][1] == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    rows = measure({"model": packed, "against": dense}, SMALL)["layers"]
    fused = next(row for row in rows if row["kind"] == "sparse24, 3 fused")
    assert fused["layer"].endswith("self_attn.q_proj + k_proj + v_proj")
    assert all(timing["relative_error"] < 0.01 and timing["ratio"] for timing in fused["timings"])


def test_the_layer_of_middle_size_stands_for_its_kind():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=i != 1) for i in range(3))
            self.head = nn.Linear(4, 9)
            self.dtype = torch.float32

    cases = list(layer_cases({"model": Model()}))
    assert {case.name for case in cases} == {"blocks.0"} and cases[0].count == 3
    assert all(case.shape == (4, 4) for case in cases)  # the head stands in no block


def test_fused_experts_are_named_as_not_timed(random_model):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = random_model(t.MixtralConfig(vocab_size=128, num_hidden_layers=2, num_local_experts=4, **sizes))
    assert fused_experts(model)[0].startswith("model.layers.0.mlp.experts")
    told = measure({"model": model}, SMALL)["notes"]
    assert any("4 fused parameters such as model.layers.0.mlp.experts" in text for text in told)
