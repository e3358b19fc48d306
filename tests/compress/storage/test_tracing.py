"""Packed layers can be exported and compiled as a whole, and copied into other processes."""

import pickle

import pytest
import torch
from packing import pack_model, random_tensors
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from paredown.compress.storage.install import install
from paredown.compress.storage.kinds import KINDS
from paredown.compress.storage.spec import Spec

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.arange(3, 19)[None]


class Own(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias + 1


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("old", [nn.Linear(8, 12), Conv1D(12, 8), Own(8, 12)], ids=["linear", "conv1d", "own forward"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_exported_and_compiled_whole(kind, old, trains):
    model, conv1d = nn.ModuleDict({"layer": old}), isinstance(old, Conv1D)
    asked = {name: {"values": 48, "rank": 3}[name] for name in KINDS[kind].asks}
    install(model, {"layer": Spec(kind, (12, 8), "conv1d" if conv1d else "linear", **asked)})
    layer, x = model["layer"], torch.randn(2, 5, 8)
    layer.load_state_dict({**layer.state_dict(), **random_tensors(kind, torch.randn(12, 8))})
    layer.requires_grad_(trains)
    wanted = layer(x)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), wanted)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), wanted)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["bitmap", "sparse24"])
def test_a_model_is_exported_whole(kind):
    packed, _ = pack_model(LlamaForCausalLM(LlamaConfig(**SIZES)), kind)
    exported = torch.export.export(packed, (IDS,), {"use_cache": False}).module()
    torch.testing.assert_close(exported(IDS, use_cache=False).logits, packed(IDS, use_cache=False).logits)


def test_layers_with_a_forward_of_their_family_can_be_pickled():
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    packed, dense = pack_model(FalconForCausalLM(config))
    assert packed.transformer.h[0].mlp.dense_h_to_4h.own_forward
    again = pickle.loads(pickle.dumps(packed))
    wanted = dense(IDS, use_cache=False).logits
    assert torch.equal(packed(IDS, use_cache=False).logits, wanted)
    assert torch.equal(again(IDS, use_cache=False).logits, wanted)
