"""Packed layers train like the dense ones that they stand for: true gradients, and the mask holds."""

import copy

import pytest
import torch
from packing import halves, pack_model, random_tensors
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.pytorch_utils import Conv1D

from paredown.compress.storage.install import install
from paredown.compress.storage.kinds import KINDS, MASKS, pack
from paredown.compress.storage.spec import Spec

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.arange(3, 35).view(2, 16)


def packed_layer(kind, old, dtype):
    """A packed layer in the place of `old`, and its stored tensors."""
    model = nn.ModuleDict({"layer": old.to(dtype)})
    weight = old.weight.data.T if isinstance(old, Conv1D) else old.weight.data
    tensors = random_tensors(kind, weight)
    counts = {"values": weight.numel() // 2, "rank": 3}
    asked = {name: counts[name] for name in KINDS[kind].asks}
    install(
        model, {"layer": Spec(kind, tuple(weight.shape), "conv1d" if isinstance(old, Conv1D) else "linear", **asked)}
    )
    layer = model["layer"]
    layer.load_state_dict({**layer.state_dict(), **tensors})
    return layer.requires_grad_(), tensors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("old", [nn.Linear(8, 12), Conv1D(12, 8)], ids=["linear", "conv1d"])
def test_gradients_are_those_of_the_dense_weight(kind, old):
    layer, tensors = packed_layer(kind, copy.deepcopy(old), torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    outward = torch.randn(2, 5, 12, dtype=torch.float64)
    free = {name: t.clone().requires_grad_() for name, t in tensors.items() if t.is_floating_point()}
    bias = layer.bias.detach().clone().requires_grad_()
    weight = slow_dense(kind, {**tensors, **free})
    wanted = torch.autograd.grad(F.linear(x, weight, bias), [x, bias, *free.values()], outward)
    found = torch.autograd.grad(layer(x), [x, layer.bias, *(getattr(layer, name) for name in free)], outward)
    torch.testing.assert_close(found, wanted)
    through_weight = torch.autograd.grad(layer.weight.sum(), [getattr(layer, name) for name in free])
    by_weight = torch.autograd.grad(slow_dense(kind, {**tensors, **free}).sum(), list(free.values()))
    torch.testing.assert_close(through_weight, by_weight, rtol=1e-4, atol=1e-4)  # multiplied in float32


def slow_dense(kind, t):
    """The dense weight (12, 8) by places, so that autograd knows where each stored value goes."""
    product = 0
    if "left" in t:
        product = t["left"] @ t["right"]
    if "pivots" in t:
        return torch.cat((t["pivots"], t["coefficients"] @ t["pivots"]))[t["order"].long()]
    if "columns" in t:
        return t["columns"] @ t["link"] @ t["rows"]
    if "values" in t:
        stored = {name: x.detach() for name, x in t.items()}
        keep = KINDS[kind.removesuffix("_lowrank")].unpack(
            {**stored, "values": torch.ones_like(stored["values"])}, (12, 8)
        )
        places = keep.flatten().nonzero().squeeze(-1)
        return torch.zeros(96, dtype=torch.float64).index_put((places,), t["values"].flatten()).view(12, 8) + product
    return product


@pytest.mark.parametrize("kind", MASKS)
def test_packed_experts_get_the_gradient_of_each_expert(kind):
    model = nn.Module()
    weight, keep = torch.randn(3, 12, 8, dtype=torch.float64), halves(3, 12, 8)
    model.experts = nn.Parameter(weight)
    install(model, {"experts": Spec(kind, (3, 12, 8), "experts", values=144)})
    model.experts.load_state_dict({**model.experts.state_dict(), **pack(kind, weight, keep)})
    values = model.experts.values.requires_grad_()
    outward = torch.randn(3, 12, 8, dtype=torch.float64)
    sum((model.experts[e] * outward[e]).sum() for e in (0, 2)).backward()
    wanted = pack(kind, outward * torch.tensor([1.0, 0.0, 1.0])[:, None, None], keep)["values"]
    assert torch.equal(values.grad, wanted)


@pytest.mark.parametrize("kind", ["sparse24", "bitmap", "lowrank", "bitmap_lowrank"])
def test_adamw_trains_what_is_kept_and_the_mask_holds(kind, tmp_path):
    torch.manual_seed(0)
    packed, _ = pack_model(LlamaForCausalLM(LlamaConfig(**SIZES)), kind)
    packed.save_pretrained(tmp_path / "before")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "before").train()
    assert all(p.requires_grad for p in model.parameters())
    layer = model.model.layers[1].mlp.down_proj
    before = {name: t.detach().clone() for name, t in layer.tensors().items()}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), []
    for _ in range(5):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    after = layer.tensors()
    assert all(torch.equal(after[name], t) != t.is_floating_point() for name, t in before.items())
    if kind in MASKS:
        assert torch.equal(layer.weight == 0, KINDS[kind].unpack(before, (32, 48)) == 0)
    model.eval().save_pretrained(tmp_path / "after")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert torch.equal(again(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


def test_the_trainer_s_question_whether_a_packed_model_can_be_trained_is_answered_yes(tmp_path):
    packed, _ = pack_model(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=2, moe_intermediate_size=16)))
    packed.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_qat_trainable
