"""Pairs of small matrices that are part of the stored weights: gradients, masks, and what is stored in the end."""

import pytest
import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.recipe import LoraSpec, Recipe
from paredown.compress.recovery.lora import Adapted, places
from paredown.compress.storage.kinds import kind_of
from paredown.compress.storage.modules import PACKED

IDS = torch.arange(3, 27)[None] % 19
FORMS = ("2:4", "0.5", "dense", "lowrank", "pifa", "sum")


@pytest.fixture(scope="module")
def make(lively):
    """`make(form, spec)`: the folder of a tiny model of that form and its pairs, with B no longer zero."""

    def run(form="2:4", stir=0.3, **settings):
        folder = lively(form, torch.float32)
        source = ModelSource(folder, "compressed")
        spec = LoraSpec(**{"rank": 3, "alpha": 6.0, **settings})
        model = transformers_plugin.load(folder)
        inside = ("model.layers.0.", "model.layers.1.")
        student = Adapted(model, inside, places(source, spec), frozenset(), torch.float32, spec, 0)
        generator = torch.Generator().manual_seed(1)
        for pair in student.pairs.values():
            pair.up.master.copy_(stir * torch.randn(pair.up.master.shape, generator=generator))
        student.show()
        return folder, student

    return run


def dense_sum(student, name, base, pairs):
    """What a stored matrix is, float64: of a packed mask the dense matrix, by the formula and the places that are zero."""
    pair = student.pairs[name]
    down, up = pairs[f"{name}.lora_A"], pairs[f"{name}.lora_B"]
    if pair.owner is not None:
        shape = pair.owner.spec.shape
        mask = pair.owner.kind.removesuffix("_lowrank")
        whole = kind_of(mask).unpack({**pair.owner.tensors(), "values": base[name]}, shape).double()
        return whole + (whole != 0) * (pair.scale * up @ down)
    whole = base[name].double()
    change = pair.scale * up @ down
    return whole + (change * (whole != 0) if pair.keep is not None else change)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_pairs_are_those_of_autograd_on_dense_weights_in_float64(form, make):
    folder, student = make(form)
    student.model(IDS, labels=IDS).loss.backward()
    model = transformers_plugin.load(folder).double()
    base = {name: pair.base for name, pair in student.pairs.items()}
    pairs = {name: w.master.double().requires_grad_() for name, w in student.weights.items()}
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PACKED):
                full = next(n for n, m in model.named_modules() if m is child)
                own = {
                    part: dense_sum(student, f"{full}.{part}", base, pairs)
                    for part in child.parts
                    if f"{full}.{part}" in base
                }
                setattr(module, name, Product(child, own))
            elif (full := f"{next(n for n, m in model.named_modules() if m is module)}.{name}.weight") in base:
                setattr(module, name, Product(child, {"weight": dense_sum(student, full, base, pairs)}))
    model(IDS, labels=IDS).loss.backward()
    assert len(student.weights) == len(pairs) >= 28
    for name, weight in student.weights.items():
        wanted = pairs[name].grad
        assert torch.allclose(weight.master.grad.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())), (
            name
        )


class Product(torch.nn.Module):
    """A linear layer by the dense formula of its kind; `own` are its parts, those under a mask dense."""

    def __init__(self, layer, own):
        super().__init__()
        self.layer, self.own = layer, own

    def forward(self, x):
        own, order = self.own, getattr(self.layer, "order", None)
        if order is not None:
            weight = torch.cat([own["pivots"], own["coefficients"] @ own["pivots"]])[order.long()]
        else:
            weight = own.get("weight", own.get("values", 0))
            weight = weight + own["left"] @ own["right"] if "left" in own else weight
        return x @ weight.T


@pytest.mark.parametrize("form", FORMS)
def test_what_is_stored_is_what_the_model_computed_with_and_has_its_form(form, make):
    folder, student = make(form)
    with torch.no_grad():
        wanted = student.model(IDS).logits
    model = transformers_plugin.load(folder)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        for name, tensor in student.stored(student.results()).items():
            assert not torch.equal(before[name], tensor)
            model.get_parameter(name).copy_(tensor)
        assert torch.equal(model(IDS).logits, wanted)
    if form == "dense":
        pruned = [name for name in student.pairs if float((before[name] == 0).float().mean()) > 0.4]
        assert len(pruned) == 14
        assert all(torch.equal(model.get_parameter(name) == 0, before[name] == 0) for name in pruned)


def test_pairs_begin_as_no_change_and_a_first_step_is_the_rate_s_share_of_the_weight(make):
    folder, student = make(stir=0.0)
    model = transformers_plugin.load(folder)
    assert all(torch.equal(t, model.get_parameter(name)) for name, t in student.stored(student.results()).items())
    for group in student.groups():
        (master,) = group["params"]
        master.sub_(0.01 * group["size"] * torch.randn(master.shape, generator=torch.Generator().manual_seed(0)).sign())
    changes = []
    for pair in student.pairs.values():
        change = (pair.sum() - pair.base).square().mean().sqrt() / pair.base.square().mean().sqrt()
        changes.append(float(change) / pair.scale)
    assert all(0.005 < change < 0.02 for change in changes)


def test_targets_and_the_last_blocks_say_what_gets_a_pair(make):
    _, student = make(targets=("q_proj", "mlp.*"), last=1)
    stems = {name.rpartition(".")[0] for name in student.pairs}
    assert stems == {
        f"model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert [name for name, p in student.model.named_parameters() if p.requires_grad] == [*student.pairs]
    _, whole = make("lowrank", rank=3)
    assert {name.rpartition(".")[2] for name in whole.pairs} == {"left", "right"}
    assert whole.numbers == sum(3 * sum(pair.base.shape) for pair in whole.pairs.values())
    with pytest.raises(PareError, match="'nose' matches no linear layer"):
        make(targets=("nose",))
    with pytest.raises(PareError, match="rank 64, and no stored matrix of its targets a larger one"):
        make(rank=64)


def test_settings_that_lora_has_not_are_refused():
    with pytest.raises(PareError, match="embeddings are of distill"):
        Recipe.parse({"recover": [{"lora": {"embeddings": True}}]})
    with pytest.raises(PareError, match=r"lora.rang: there is no such key. Did you mean 'rank'"):
        Recipe.parse({"recover": [{"lora": {"rang": 4}}]})
    with pytest.raises(PareError, match="either reconstruct, distill or lora"):
        Recipe.parse({"recover": [{"lora": {}, "distill": {}}]})
