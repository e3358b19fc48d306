"""Modules that stand in for layers: install checks everything before it changes anything."""

import copy

import pytest
import torch
from torch import nn

from paredown.compress import packed
from paredown.compress.errors import PareError
from paredown.compress.packed import PackedConv1D, PackedExperts, PackedLinear, install, pack


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 6, 8))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 6)
        self.experts = Experts()


def spec(kind="sparse24", layout="linear", shape=(6, 8), kept=24):
    return {"kind": kind, "layout": layout, "shape": list(shape), "kept": kept}


def halves(*shape):
    return (torch.rand(*shape[:-1], shape[-1] // 4, 4).argsort(-1) < 2).reshape(shape)


def fill(module, tensors):
    module.load_state_dict({**module.state_dict(), **tensors})
    return module


@pytest.mark.parametrize("kind", ["sparse24", "bitmap"])
def test_a_packed_linear_multiplies_bit_for_bit_like_the_masked_one(kind):
    model, keep = Tiny(), halves(6, 8)
    dense = copy.deepcopy(model.proj)
    dense.weight.data *= keep
    install(model, {"proj": spec(kind)})
    fill(model.proj, pack(kind, dense.weight.data, keep))
    x = torch.randn(2, 5, 8)
    assert isinstance(model.proj, PackedLinear) and model.proj.spec == spec(kind) and model.proj.fault() is None
    assert torch.equal(model.proj(x), dense(x)) and torch.equal(model.proj.weight, dense.weight)


@pytest.mark.parametrize("kind", ["sparse24", "bitmap"])
def test_packed_experts_give_one_expert_at_a_time(kind):
    model, keep = Tiny(), halves(3, 6, 8)
    weight = model.experts.gate_up_proj.data * keep
    install(model, {"experts.gate_up_proj": spec(kind, "experts", (3, 6, 8), 72)})
    experts = fill(model.experts.gate_up_proj, pack(kind, weight, keep))
    assert isinstance(experts, PackedExperts) and experts.shape == (3, 6, 8) and experts.fault() is None
    for twin in (experts, copy.deepcopy(experts)):
        assert all(torch.equal(twin[torch.tensor(e)], weight[e]) for e in range(3))
    with pytest.raises(IndexError):
        experts[3]
    with pytest.raises(PareError, match="eager"):
        experts[torch.tensor([0, 1])]


def test_conv1d_keeps_its_own_order_of_summation():
    from transformers.pytorch_utils import Conv1D

    model, keep = nn.Sequential(Conv1D(6, 8)), halves(6, 8)
    dense = copy.deepcopy(model[0])
    dense.weight.data *= keep.T
    install(model, {"0": spec(layout="conv1d")})
    fill(model[0], pack("sparse24", dense.weight.data.T, keep))
    x = torch.randn(3, 8)
    assert isinstance(model[0], PackedConv1D)
    assert torch.equal(model[0](x), dense(x))
    assert torch.equal(model[0].weight, dense.weight)


def test_a_linear_with_a_forward_of_its_own_keeps_it():
    class Falcon(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias + 1

    model, keep = nn.Sequential(Falcon(8, 6)), halves(6, 8)
    dense = copy.deepcopy(model[0])
    dense.weight.data *= keep
    install(model, {"0": spec()})
    fill(model[0], pack("sparse24", dense.weight.data, keep))
    x = torch.randn(3, 8)
    assert torch.equal(model[0](x), dense(x))


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("prj", spec(), "Did you mean 'proj'"),
        ("proj", spec(kind="sparse42"), "Did you mean 'sparse24'"),
        ("proj", spec(layout="conv1d"), "cannot take the place"),
        ("proj", spec(layout="line"), "unknown layout"),
        ("proj", spec(shape=(6, 12), kept=36), "the model's"),
        ("proj", spec(kept=23), "stores half"),
        ("proj", {"kind": "bitmap"}, "lacks layout"),
        ("proj", spec("bitmap", kept=99), "cannot keep"),
    ],
)
def test_specs_that_do_not_fit_are_named_and_nothing_changes(name, wrong, said):
    model = Tiny()
    with pytest.raises(PareError, match=said):
        install(model, {"experts.gate_up_proj": spec("sparse24", "experts", (3, 6, 8), 72), name: wrong})
    assert isinstance(model.proj, nn.Linear) and isinstance(model.experts.gate_up_proj, nn.Parameter)


def test_damaged_index_data_is_a_fault():
    model, keep = Tiny(), halves(6, 8)
    install(model, {"proj": spec()})
    fill(model.proj, pack("sparse24", torch.randn(6, 8), keep))
    model.proj.indices[0, 0] = 0
    assert "indices" in model.proj.fault()
    install(other := Tiny(), {"proj": spec("bitmap")})
    fill(other.proj, pack("bitmap", torch.randn(6, 8), keep))
    other.proj.bitmap[0, 0] ^= 1
    assert "bitmap" in other.proj.fault()


def test_kinds_say_their_sizes():
    for kind in packed.KINDS:
        tensors = pack(kind, torch.randn(6, 8), halves(6, 8))
        assert {n: tuple(t.shape) for n, t in tensors.items()} == packed.KINDS[kind].sizes((6, 8), 24)
