"""Packed linears that share an input, as one product: the same outputs, the same names on save."""

import copy

import pytest
import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.storage.fuse import fuse
from paredown.compress.storage.modules import PackedLinear


@pytest.fixture(params=["sparse24", "bitmap", "pifa", "factors", "2:4 and factors"])
def packed(request, tiny_model, tmp_path, prune):
    changes = {
        "sparse24": {}, "bitmap": {"sparsity": 0.6},
        "pifa": {"method": "svd_llm", "options": {"kept": 0.6, "storage": "pifa"}},
        "2:4 and factors": {"method": "sparse_low_rank", "options": {"sparsity": "2:4", "rank": 4}},
        "factors": {"method": "svd_llm", "options": {"kept": 0.6}},
    }[request.param]  # fmt: skip
    prune(tiny_model, tmp_path / "out", **changes)
    return tmp_path / "out"


def logits(model, windows):
    with torch.no_grad():
        return model(windows.ids, use_cache=False).logits.double()


def test_a_fused_model_computes_the_same(packed, windows):
    model = transformers_plugin.load(packed).eval()
    before = logits(model, windows)
    assert fuse(model, "cpu") == 4  # q, k, v and gate, up in two blocks
    after = logits(model, windows)
    assert float((after - before).norm() / before.norm()) < 1e-2  # products of other sizes may sum in another order
    assert all(m.group.pending is None for m in model.modules() if isinstance(m, PackedLinear) and m.group)


def test_nothing_is_stored_twice_and_what_is_saved_has_the_old_names(packed, windows, tmp_path):
    model, plain = transformers_plugin.load(packed).eval(), transformers_plugin.load(packed).eval()
    fuse(model, "cpu")
    for (name, tensor), (old, wanted) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == old and torch.equal(tensor, wanted)
    attention = model.model.layers[0].self_attn
    part = attention.q_proj.parts[0]
    storages = {
        getattr(attention, name).get_parameter(part).untyped_storage().data_ptr() for name in ("q_proj", "k_proj")
    }
    assert len(storages) == 1
    model.save_pretrained(tmp_path / "again")
    again = transformers_plugin.load(tmp_path / "again").eval()
    assert torch.equal(logits(again, windows), logits(plain, windows))


def test_moving_replacing_or_loading_other_weights_undoes_a_group_or_is_seen_by_it(packed, windows):
    plain = transformers_plugin.load(packed).eval()
    wanted = logits(plain, windows)
    model = transformers_plugin.load(packed).eval()
    fuse(model, "cpu")
    moved = copy.deepcopy(model).to(torch.float32)
    assert not any(m.group for m in moved.modules() if isinstance(m, PackedLinear))
    assert fuse(moved, "cpu") == 4
    layer = model.model.layers[0].mlp.gate_proj
    name = layer.parts[0]
    setattr(layer, name, torch.nn.Parameter(torch.zeros_like(getattr(layer, name)), requires_grad=False))
    assert layer.group is None and model.model.layers[0].mlp.up_proj.group is None
    assert float((logits(model, windows) - wanted).norm() / wanted.norm()) > 0.05  # the new weight is what counts
    model.load_state_dict(plain.state_dict())
    assert float((logits(model, windows) - wanted).norm() / wanted.norm()) < 1e-2


def test_other_inputs_are_never_given_an_old_part(packed):
    model = transformers_plugin.load(packed).eval()
    attention = model.model.layers[0].self_attn
    x, other = torch.randn(2, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    with torch.no_grad():
        wanted = attention.k_proj(other)
        fuse(model, "cpu")
        attention.q_proj(x)
        close = attention.k_proj(other)
        assert float((close.double() - wanted.double()).norm() / wanted.double().norm()) < 1e-2
        again = attention.k_proj(other)
    assert torch.equal(again, close)


def test_a_fused_layer_compiles_whole(packed):
    model = transformers_plugin.load(packed).eval()
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 64).bfloat16()
    fuse(model, "cpu")
    with torch.no_grad():
        wanted = mlp(x)
        assert torch.equal(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), wanted)
        assert mlp.gate_proj.group.pending is None
