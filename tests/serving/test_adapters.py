"""LoRA of peft on packed layers."""

import sys

import pytest
import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.errors import PareError
from paredown.compress.serving.adapters import enable_peft

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


def test_what_would_change_the_packed_weight_is_refused(packed):
    from peft import get_peft_model

    with pytest.raises(PareError, match="--format dense"):
        get_peft_model(packed(), lora()).merge_and_unload()
    with pytest.raises(PareError, match="olora"):
        get_peft_model(packed(), lora(init_lora_weights="olora"))
    with pytest.raises(ValueError, match="use_dora"):
        get_peft_model(packed(), lora(use_dora=True))


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "paredown.compress.serving.peft_lora", None)
    with pytest.raises(PareError, match=r"pip install 'peft>=0.21"):
        enable_peft(None)
