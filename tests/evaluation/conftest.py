"""Tiny models to be timed."""

import pytest
import torch
import transformers as t

from paredown.compress.checkpoint import transformers_plugin


@pytest.fixture(scope="session")
def random_model():
    """`random_model(config)`: weights so large that the logits depend on every token before."""

    def make(config):
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture
def llama(random_model, tiny_config):
    return random_model(tiny_config)


@pytest.fixture
def packed(tmp_path, tiny_model, prune):
    prune(tiny_model, tmp_path / "packed")
    return transformers_plugin.load(tmp_path / "packed").eval()


@pytest.fixture
def dense(tiny_model):
    return transformers_plugin.load(tiny_model).eval()
