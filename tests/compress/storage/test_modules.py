"""Modules that stand in for layers: install checks everything before it changes anything."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from paredown.compress.errors import PareError
from paredown.compress.storage.install import install, read_specs
from paredown.compress.storage.kinds import KINDS, MASKS, pack
from paredown.compress.storage.mask_kinds import Bitmap
from paredown.compress.storage.modules import PackedConv1D, PackedExperts, PackedLinear
from paredown.compress.storage.spec import Spec
from paredown.kernels import ops
from paredown.kernels.bitmap import row_starts


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 6, 8))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 6)
        self.experts = Experts()


def spec(kind="sparse24", layout="linear", shape=(6, 8), values=24):
    return Spec(kind, shape, layout, values=values)


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
        ("proj", spec(shape=(6, 12), values=36), "the model's"),
        ("proj", spec(values=23), "stores half"),
        ("proj", {"kind": "bitmap"}, "lacks layout"),
        ("proj", spec("bitmap", values=99), "cannot keep"),
    ],
)
def test_specs_that_do_not_fit_are_named_and_nothing_changes(name, wrong, said):
    model = Tiny()
    raw = wrong if isinstance(wrong, dict) else wrong.to_json()
    with pytest.raises(PareError, match=said):
        fitting = spec("sparse24", "experts", (3, 6, 8), 72).to_json()
        install(model, read_specs({"experts.gate_up_proj": fitting, name: raw}))
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


def tensors_of(kind):
    """Some tensors of a (6, 8) weight of each kind."""
    if kind in MASKS:
        return pack(kind, torch.randn(6, 8), halves(6, 8))
    named = {"order": torch.randperm(6).int()}
    mask = pack(kind.removesuffix("_lowrank"), torch.randn(6, 8), halves(6, 8)) if "_" in kind else {}
    sizes = KINDS[kind].sizes(spec_of(kind))
    return {name: mask.get(name, named.get(name, torch.randn(size))) for name, size in sizes.items()}


def spec_of(kind, **more):
    return replace(spec(kind), rank=3, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_say_their_sizes_and_multiply_as_their_dense_weight_does(kind):
    tensors, kind_ = tensors_of(kind), KINDS[kind]
    assert {n: tuple(t.shape) for n, t in tensors.items()} == kind_.sizes(spec_of(kind))
    x, bias = torch.randn(2, 5, 8), torch.randn(6)
    dense = kind_.unpack(tensors, (6, 8))
    torch.testing.assert_close(kind_.matmul(x, tensors, bias), nn.functional.linear(x, dense, bias))
    assert kind_.fault(tensors, (6, 8)) is None


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(MASKS)))
@pytest.mark.parametrize("added", [False, True])
def test_a_layer_of_factors_keeps_its_bias_or_brings_one(kind, added):
    from transformers.pytorch_utils import Conv1D

    for old in (nn.Linear(8, 6, bias=not added), *([] if added else [Conv1D(6, 8)])):
        model, layout = nn.Sequential(old), "conv1d" if isinstance(old, Conv1D) else "linear"
        counts = {name: spec_of(kind).counts[name] for name in KINDS[kind].asks}
        given = Spec(kind, (6, 8), layout, bias=added, **counts)
        install(model, {"0": given})
        tensors, bias = tensors_of(kind), torch.randn(6)
        fill(model[0], {**tensors, "bias": bias})
        x = torch.randn(2, 5, 8)
        assert model[0].spec == given
        assert torch.equal(model[0](x), KINDS[kind].matmul(x, tensors, bias))


def test_an_order_that_names_a_row_twice_is_a_fault():
    tensors = tensors_of("pifa")
    tensors["order"][0] = tensors["order"][1]
    assert "permutation" in KINDS["pifa"].fault(tensors, (6, 8))


@pytest.mark.parametrize("layout", ["experts", "experts_in_out"])
@pytest.mark.parametrize("kind", ["lowrank", "pifa", "cur", "bitmap_lowrank"])
def test_factored_experts_are_the_products_of_their_factors(kind, layout):
    """One by one, all together, and as an operand of a torch function; in the layout of the parameter."""
    parts = [tensors_of(kind) for _ in range(3)]
    values = {"values": [p.pop("values") for p in parts]} if kind == "bitmap_lowrank" else {}
    tensors = {name: torch.stack([p[name] for p in parts]) for name in parts[0]}
    tensors |= {name: torch.cat(own) for name, own in values.items()}
    counts = {name: spec_of(kind).counts[name] for name in KINDS[kind].asks}
    counts |= {"values": len(tensors["values"])} if values else {}
    model = nn.Module()
    rows, columns = (6, 8) if layout == "experts" else (8, 6)
    model.weight = nn.Parameter(torch.empty(3, rows, columns), requires_grad=False)
    install(model, {"weight": Spec(kind, (3, 6, 8), layout, **counts)})
    fill(model.weight, tensors)
    dense = [KINDS[kind].unpack(p | {n: own[e] for n, own in values.items()}, (6, 8)) for e, p in enumerate(parts)]
    dense = torch.stack(dense if layout == "experts" else [w.T for w in dense])
    x = torch.randn(3, 5, rows)
    assert model.weight.fault() is None and model.weight.shape == dense.shape
    assert all(torch.equal(model.weight[e], dense[e]) for e in range(3))
    assert torch.equal(torch.bmm(x, model.weight), torch.bmm(x, dense))
    assert torch.equal(model.weight.transpose(1, 2), dense.transpose(1, 2))


@pytest.mark.parametrize("layout", ["experts", "experts_in_out"])
def test_experts_that_lie_below_each_other_in_one_matrix_are_told_apart(layout):
    model, keep = nn.Module(), torch.rand(3, 6, 8) < 0.5
    weight = torch.randn(3, 6, 8) * keep
    dense = weight if layout == "experts" else weight.transpose(1, 2)
    model.weight = nn.Parameter(torch.empty(dense.flatten(0, 1).shape), requires_grad=False)
    install(model, {"weight": Spec("bitmap", (3, 6, 8), layout, values=int(keep.sum()))})
    fill(model.weight, pack("bitmap", weight, keep))
    assert torch.equal(model.weight.whole(), dense.flatten(0, 1)) and model.weight.shape == dense.flatten(0, 1).shape
    assert torch.equal(model.weight.view(-1, *dense.shape[1:])[2], dense[2])
    assert torch.equal(model.weight.view(dense.numel()), dense.flatten())


class Indexed(Bitmap):
    """A kind as a GPU's kernels use it: it multiplies with a tensor derived from the stored ones, and not without."""

    @staticmethod
    def derive(tensors):
        return {"starts": row_starts(tensors["bitmap"])}

    @staticmethod
    def matmul(x, tensors, bias, ranks=None, outs=None):
        return ops.bitmap_matmul(x, tensors["values"], tensors["bitmap"], bias, tensors["starts"])


def test_a_bitmap_layer_compiles_whole_with_what_kernels_derive_from_it(monkeypatch):
    monkeypatch.setitem(KINDS, "indexed", Indexed)  # as a new kind is added
    model, keep = Tiny(), torch.rand(6, 8) < 0.4
    install(model, {"proj": spec("indexed", values=int(keep.sum()))})
    fill(model.proj, pack("bitmap", torch.randn(6, 8), keep))
    with torch.no_grad():
        compiled, x = torch.compile(model.proj, fullgraph=True, backend="aot_eager"), torch.randn(3, 8)
        assert torch.equal(compiled(x), model.proj(x))
