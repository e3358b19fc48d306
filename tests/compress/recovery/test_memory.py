"""The count of what training takes, against what autograd keeps, and for a model of eight billion parameters."""

import pytest
import torch
from packing import pack_model
from transformers import LlamaConfig, LlamaForCausalLM

from paredown.compress.recipe import DistillSpec
from paredown.compress.recovery.memory import Sizes, device_bytes, host_bytes
from paredown.compress.recovery.trainable import Trainable

WIDTH, INNER, TOKENS = 64, 192, 128


def kept(blocks, checkpointing):
    """Bytes that the backward pass of a packed 2:4 model's blocks needs, beside its weights."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16,
    )  # fmt: skip
    model = pack_model(LlamaForCausalLM(config).to(torch.bfloat16), "sparse24")[0]
    student = Trainable(model, tuple(f"model.layers.{i}." for i in range(blocks)), frozenset(), torch.bfloat16)
    if checkpointing:
        student.checkpointed()
    own, seen = {p.data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), storage  # held, so that no other one has its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_count_of_a_block_is_what_autograd_keeps(checkpointing):
    linears = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER

    def counted(blocks):
        sizes = Sizes(0, linears * blocks, 0, blocks, WIDTH, INNER, 64, 2)
        return device_bytes(sizes, DistillSpec(checkpointing=checkpointing), TOKENS)

    more = kept(3, checkpointing) - kept(2, checkpointing)
    assert more == pytest.approx(counted(3) - counted(2), rel=0.1)


def test_eight_billion_parameters_at_2_of_4_fit_80_gb_with_checkpointing():
    inside, outside, tokens = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 2 * 128256 * 4096, 8192
    stored = inside // 2 * 2 + inside // 8 + 2 * outside
    sizes = Sizes(stored, inside, inside // 2, 32, 4096, 14336, 128256, 2)

    def gigabytes(**spec):
        return device_bytes(sizes, DistillSpec(**spec), tokens) / 1e9

    assert gigabytes() > gigabytes(optimizer="adamw8bit") > 100
    assert 70 < gigabytes(checkpointing=True) < 80
    assert 50 < gigabytes(checkpointing=True, optimizer="adamw8bit") < 60
    assert 60 < host_bytes(sizes, DistillSpec()) / 1e9 < 64
