"""Masked weights stay dense in memory on a CPU: the outputs are the same, and no change of the stored tensors is missed."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.storage import unpacked
from paredown.compress.storage.install import install
from paredown.compress.storage.kinds import pack
from paredown.compress.storage.spec import Spec
from paredown.compress.storage.unpacked import LINE, align, keep_unpacked


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.conv, self.experts = nn.Linear(8, 6), Conv1D(6, 8), Experts()

    def forward(self, x):
        return torch.cat([self.proj(x), self.conv(x), x @ self.experts.up[1], x @ self.experts.up[torch.tensor(2)]], -1)


@pytest.fixture
def counted(monkeypatch):
    """A packed model and how often a weight of it was unpacked."""
    model, shapes = Tiny(), {"proj": (6, 8), "conv": (6, 8), "experts.up": (3, 6, 8)}
    layouts = {"proj": "linear", "conv": "conv1d", "experts.up": "experts_in_out"}
    keep = {name: (torch.rand(*s[:-1], 2, 4).argsort(-1) < 2).reshape(s) for name, s in shapes.items()}
    install(model, {n: Spec("sparse24", s, layouts[n], values=keep[n].numel() // 2) for n, s in shapes.items()})
    packed = {n: pack("sparse24", torch.randn(s), keep[n]) for n, s in shapes.items()}
    model.load_state_dict({**model.state_dict(), **{f"{n}.{t}": v for n, ts in packed.items() for t, v in ts.items()}})
    calls = []
    for module in (model.proj, model.conv, model.experts.up):
        pack_kind = module._pack

        class Counted(pack_kind):
            @staticmethod
            def unpack(tensors, shape, own=pack_kind):
                calls.append(shape)
                return own.unpack(tensors, shape)

        module._pack = Counted
    return model, calls


@torch.no_grad()
def test_a_weight_is_unpacked_once_and_gives_the_same_to_the_last_bit(counted):
    model, calls = counted
    x = torch.randn(5, 8)
    before = model(x)
    assert keep_unpacked(model) == 4 * (48 + 48 + 3 * 48)
    assert torch.equal(model(x), before)
    calls.clear()
    assert torch.equal(model(x), before) and not calls
    keep_unpacked(model, False)
    assert torch.equal(model(x), before) and calls


@torch.no_grad()
def test_what_is_kept_follows_every_change(counted):
    model, _ = counted
    x = torch.randn(5, 8)
    keep_unpacked(model)
    before = model(x)
    for module in (model.proj, model.conv, model.experts.up):
        module.values.mul_(2.0)  # in place
    model.proj.bias.mul_(2.0)
    model.conv.bias.mul_(2.0)
    assert torch.equal(model(x), 2 * before)
    state = {name: tensor / 2 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(model(x), before)
    assert model.double()(x.double()).dtype == torch.float64


def test_weights_that_are_trained_are_unpacked_at_each_call(counted):
    model, _ = counted
    keep_unpacked(model)
    with torch.inference_mode():
        model(torch.randn(5, 8))
    model(torch.randn(5, 8, requires_grad=True)).sum().backward()  # through what was kept
    model.requires_grad_(True)
    model(torch.randn(5, 8)).sum().backward()
    assert bool(model.proj.values.grad.abs().sum() > 0)


@torch.no_grad()
def test_weights_that_could_be_trained_are_kept_while_they_are_not(counted):
    model, calls = counted
    model.requires_grad_(True)
    keep_unpacked(model)
    model(torch.randn(5, 8))
    calls.clear()
    model(torch.randn(5, 8))
    assert not calls


def test_nothing_is_kept_where_memory_is_short_unless_asked_for(counted, monkeypatch, caplog):
    model, _ = counted
    monkeypatch.setattr(unpacked, "available_memory", lambda: 1000)
    with caplog.at_level(logging.INFO, "paredown"):
        assert keep_unpacked(model) == 0
    assert "unpack=True" in caplog.text and not model.proj.keeps
    assert keep_unpacked(model, True) == 960 and model.proj.keeps


@torch.no_grad()
@pytest.mark.parametrize("size, kept", [(24, 24 * 8), (1100, 0)])
def test_a_small_pifa_weight_keeps_a_left_factor(size, kept):
    model = nn.Sequential(nn.Linear(size, size))
    install(model, {"0": Spec("pifa", (size, size), rank=8)})
    parts = {
        "pivots": torch.randn(8, size),
        "coefficients": torch.randn(size - 8, 8),
        "order": torch.randperm(size).int(),
    }
    model.load_state_dict({"0.bias": torch.randn(size), **{f"0.{name}": tensor for name, tensor in parts.items()}})
    x = torch.randn(3, 5, size)
    before, weight = model(x), model[0].weight
    assert keep_unpacked(model) == 4 * kept
    after = model(x)
    assert torch.equal(after, before) and torch.equal(model[0].weight, weight)
    assert (model[0]._kept is not None) == (kept > 0)
    model[0].coefficients.mul_(0.0)
    assert float((model(x) - after).norm() / before.norm()) > 0.1


def test_factors_are_copied_to_where_a_line_of_the_cache_begins():
    model = nn.Sequential(nn.Linear(24, 24))
    install(model, {"0": Spec("lowrank", (24, 24), rank=8)})
    placed = {
        name: torch.randn(1 + 24 * 8)[1:].view(p.shape) for name, p in model[0].named_parameters() if p.dim() == 2
    }
    for name, values in placed.items():
        getattr(model[0], name).data = values
    align(model)
    for name, values in placed.items():
        tensor = getattr(model[0], name)
        assert values.data_ptr() % LINE and not tensor.data_ptr() % LINE and torch.equal(tensor, values)


@torch.no_grad()
def test_a_loaded_model_keeps_its_weights_dense_and_saves_them_packed(tiny_model, tmp_path, prune, windows):
    prune(tiny_model, tmp_path / "out")
    kept, plain = (transformers_plugin.load(tmp_path / "out", unpack=unpack).eval() for unpack in (None, False))
    assert torch.equal(kept(windows.ids).logits, plain(windows.ids).logits)
    layers = (model.model.layers[0].mlp.down_proj for model in (kept, plain))
    assert [layer.weight is layer.weight for layer in layers] == [True, False]
    kept.save_pretrained(tmp_path / "again")
    saved = [load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path / "again")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][n], saved[1][n]) for n in saved[0])
