"""LoRA of peft on packed layers."""

import sys

import pytest
import torch
import transformers

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.errors import PareError
from paredown.compress.serving.adapters import enable_peft
from paredown.compress.storage.modules import PackedLinear

IDS = torch.arange(3, 19)[None]


@pytest.fixture
def packed(tmp_path, tiny_model, prune):
    pytest.importorskip("peft", reason="peft is not installed: pip install 'peft>=0.21,<0.22'")
    prune(tiny_model, tmp_path / "packed")
    return lambda: transformers_plugin.load(tmp_path / "packed", dtype=torch.float32)


def lora(**changes):
    from peft import LoraConfig

    return enable_peft(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **changes))


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


def test_adapters_over_packed_layers_learn_and_come_back(packed, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(packed(), lora())
    before = loss_of(model)
    before.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.grad is not None for name, p in trained.items())
    assert any(p.grad.abs().max() > 0 for name, p in trained.items() if "down_proj.lora_B" in name)
    assert any("q_proj.lora_B" in name and p.grad.abs().max() > 0 for name, p in trained.items())
    torch.optim.SGD(trained.values(), lr=0.1).step()
    after = loss_of(model)
    assert after < before
    model.save_pretrained(tmp_path / "adapter")
    config = enable_peft(LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(packed(), tmp_path / "adapter", config=config)
    assert torch.allclose(loss_of(again), after, atol=1e-5)


def adapted(model, names=("default",), **changes):
    """A model with adapters of random numbers, all of them active."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, lora(init_lora_weights=False, **changes), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(init_lora_weights=False, **changes))
    model.base_model.set_adapter(list(names))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def weights_of(model):
    return {name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "rank_pattern": {"down_proj": 2}}])
def test_merged_2_of_4_stays_2_of_4_and_gains_the_masked_update(packed, changes):
    before, model = weights_of(packed()), adapted(packed(), **changes)
    updates = {
        name.removeprefix("base_model.model."): m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight
        for name, m in model.named_modules() if type(m).__name__ == "PackedLora"
    }  # fmt: skip
    after = weights_of(model.merge_and_unload())
    assert len(updates) == 4 and after.keys() == before.keys()
    for name, weight in before.items():
        wanted = weight + updates[name] * (weight != 0) if name in updates else weight
        assert torch.allclose(after[name], wanted, atol=1e-6)
        assert int((after[name] != 0).unflatten(-1, (-1, 4)).sum(-1).max()) == 2


@pytest.mark.parametrize("form", ["2:4", "svd", "pifa", "cur", "sparse_low_rank"])
def test_every_form_is_merged_computes_so_and_is_unmerged_to_the_last_bit(form, tiny_model, prune, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed: pip install 'peft>=0.21,<0.22'")
    recipes = {
        "2:4": {}, "svd": {"method": "svd", "options": {"kept": 0.6}},
        "pifa": {"method": "svd", "options": {"kept": 0.6, "storage": "pifa"}},
        "cur": {"method": "cur", "options": {"kept": 0.6, "blocks": None}},
        "sparse_low_rank": {"method": "sparse_low_rank", "options": {}},
    }  # fmt: skip
    prune(tiny_model, tmp_path / "packed", **recipes[form])
    model = adapted(transformers_plugin.load(tmp_path / "packed", dtype=torch.float32), ("one", "two"))
    layer = next(module for module in model.modules() if type(module).__name__ == "PackedLora")
    plain, changed = layer.base_layer.weight.clone(), logits(model)
    update = sum(layer.get_delta_weight(name) for name in ("one", "two"))
    kind, rank = layer.base_layer.kind, layer.base_layer.spec.rank
    stored = {name: t.clone() for name, t in layer.base_layer.tensors().items()}
    model.merge_adapter()
    merged = layer.base_layer.weight
    if rank is not None and form != "sparse_low_rank":
        left, sizes, right = torch.linalg.svd((plain + update).double())
        wanted = left[:, :rank] * sizes[:rank] @ right[:rank]
        assert torch.allclose(merged.double(), wanted, atol=1e-4)
    assert layer.merged_adapters == ["one", "two"] and layer.base_layer.kind == kind
    x = torch.randn(5, merged.shape[1])
    assert torch.allclose(layer(x), x @ merged.T, atol=1e-4) and not torch.allclose(merged, plain, atol=1e-2)
    model.unmerge_adapter()
    assert all(torch.equal(t, stored[name]) for name, t in layer.base_layer.tensors().items())
    assert torch.allclose(logits(model), changed, atol=1e-5)


def test_an_adapter_that_the_mask_swallows_changes_nothing_when_merged(packed):
    model = adapted(packed())
    for module in model.modules():
        if type(module).__name__ == "PackedLora":  # one column of the update, which the first row's mask may not keep
            keep = module.base_layer.weight != 0
            with torch.no_grad():
                module.lora_A["default"].weight.zero_()[0] = ~keep[0]
                module.lora_B["default"].weight.zero_()[0, 0] = 1.0
    plain = logits(packed())
    assert not torch.allclose(logits(model), plain, atol=1e-3)
    assert torch.equal(logits(model.merge_and_unload()), plain)


def test_what_would_change_the_packed_weight_is_refused(packed):
    from peft import get_peft_model

    with pytest.raises(PareError, match="olora"):
        get_peft_model(packed(), lora(init_lora_weights="olora"))
    with pytest.raises(PareError, match=r"has use_dora, which packed layers do not support: .*--format dense"):
        get_peft_model(packed(), lora(use_dora=True))
    model = get_peft_model(packed(), lora())
    with pytest.raises(PareError, match="the adapter 'second' has use_dora"):
        model.add_adapter("second", lora(use_dora=True))
    with pytest.raises(PareError, match="needs layers with a bias"):
        get_peft_model(packed(), lora(lora_bias=True))


def test_a_bias_is_merged_with_its_layer(tmp_path, prune, save_model):
    pytest.importorskip("peft", reason="peft is not installed: pip install 'peft>=0.21,<0.22'")
    config = transformers.GPT2Config(
        vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=256, eos_token_id=256
    )
    save_model(tmp_path / "model", config)
    prune(tmp_path / "model", tmp_path / "packed", sparsity=0.5)
    from peft import LoraConfig, get_peft_model

    plain = transformers_plugin.load(tmp_path / "packed", dtype=torch.float32)
    bias = plain.transformer.h[0].mlp.c_fc.bias.clone()
    weight = plain.transformer.h[0].mlp.c_fc.weight.clone()  # (in, out)
    settings = LoraConfig(r=4, target_modules=["c_fc"], lora_bias=True, init_lora_weights=False, fan_in_fan_out=True)
    model = get_peft_model(plain, enable_peft(settings))
    own = model.base_model.model.transformer.h[0].mlp.c_fc
    gained = own.lora_B["default"].bias.detach().clone() * own.scaling["default"]
    update = own.get_delta_weight("default").detach()
    merged = model.merge_and_unload().transformer.h[0].mlp.c_fc
    assert torch.allclose(merged.bias, bias + gained)
    assert torch.allclose(merged.weight, weight + update * (weight != 0), atol=1e-6)


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "paredown.compress.serving.peft_lora", None)
    with pytest.raises(PareError, match=r"pip install 'peft>=0.21"):
        enable_peft(None)
