"""Whatever a model's blocks are given beside the hidden states reaches them: what depends on the text, further outputs of
other blocks, containers that blocks write to. What cannot be given is refused before any weight is read."""

import json

import pytest
import torch
import transformers as t
from torch.nn.functional import cross_entropy

from paredown.compress import plan
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import blocks
from paredown.compress.model.carried import FromBlock, from_json, to_json, unshared
from paredown.compress.model.stream import start
from paredown.compress.numerics.moments import Need
from paredown.compress.survey.gradients import backward

C = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention"] * 2
CONFIGS = {
    # inputs of every layer that depend on the text; keys and values of two blocks serve the two after them
    "gemma4": t.Gemma4TextConfig(
        **C, global_head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=128, num_kv_shared_layers=2,
        layer_types=KINDS, sliding_window=8,
    ),
    "gemma3n": t.Gemma3nTextConfig(
        **{**C, "intermediate_size": [48] * 4}, hidden_size_per_layer_input=8, vocab_size_per_layer_input=128,
        num_kv_shared_layers=2, laurel_rank=8, activation_sparsity_pattern=[0.0] * 4, layer_types=KINDS, sliding_window=8,
    ),
    # a second output that the next block takes
    "zaya": t.ZayaConfig(
        **{**C, "num_key_value_heads": 2}, num_experts=4, moe_intermediate_size=16, router_hidden_size=16,
        num_experts_per_tok=1,
    ),
    # blocks of two classes in one list
    "jamba": t.JambaConfig(
        **C, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2,
        mamba_d_state=4, mamba_dt_rank=4,
    ),
    # one attention block that two places share
    "zamba2": t.Zamba2Config(
        **{**C, "num_key_value_heads": 2, "head_dim": 32}, mamba_d_state=8, n_mamba_heads=4, mamba_headdim=16,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], num_mem_blocks=1, adapter_rank=4, chunk_size=8,
    ),
}  # fmt: skip
IDS = torch.randint(3, 128, (5, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=CONFIGS)
def case(request, tmp_path, save_model):
    """A model, and the source of what was saved of it."""
    model = save_model(tmp_path / "m", CONFIGS[request.param], torch.float32)
    return model, ModelSource(tmp_path / "m", request.param)


def walk(source, stream, first=0):
    for block in blocks(source)[first:]:
        with source.loaded(block):
            stream.advance(block)
    return stream.nll(source)


@torch.no_grad()
def whole(model, ids):
    logits = torch.cat([model(part, use_cache=False).logits for part in ids.split(2)])
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        len(ids), -1
    )


def test_losses_are_the_models_own_whatever_its_blocks_are_given(case):
    model, source = case
    assert torch.equal(walk(source, start(source, IDS, batch_tokens=32)), whole(model, IDS))


def test_a_copy_of_a_stream_carries_its_own_state(case):
    model, source = case
    stream = start(source, IDS, batch_tokens=32)
    other = stream.copy()
    for block in blocks(source):  # the other one goes through zeroed blocks: nothing of it may reach the first
        with source.loaded(block):
            stream.advance(block)
            for p in block.module.parameters():
                p.data = torch.zeros_like(p)
            other.advance(block)
    assert torch.equal(stream.nll(source), whole(model, IDS))


def test_a_stream_goes_on_from_its_saved_state(case):
    model, source = case
    stream = start(source, IDS, batch_tokens=32)
    for block in blocks(source)[:2]:
        with source.loaded(block):
            stream.advance(block)
    tensors, structure = stream.state()
    fresh = start(source, IDS, batch_tokens=32)
    fresh.restore(unshared(tensors), json.loads(json.dumps(structure)))
    assert torch.equal(walk(source, fresh, first=2), whole(model, IDS))


def test_gradients_come_back_through_what_blocks_hand_on(tmp_path, save_model):
    model = save_model(tmp_path / "m", CONFIGS["gemma4"], torch.float32)
    source = ModelSource(tmp_path / "m", "m")
    name, deltas = "model.layers.0.self_attn.v_proj", []  # its values serve block 2 too
    layer = model.get_submodule(name)
    layer.register_forward_hook(lambda module, x, y: y.register_hook(deltas.append) and None)
    losses = cross_entropy(
        model(IDS, use_cache=False).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum"
    )
    losses.backward()
    wanted = deltas[0].double().square().flatten(0, 1).mean(0)  # (out,)
    needs = frozenset({Need.OUTPUT_GRADIENT_DIAGONAL})
    stream = start(source, IDS, batch_tokens=32)
    walked = backward(source, stream, {name}, frozenset({Need.SECOND_MOMENT}), needs, tmp_path)
    stats = next(stats[name] for block, stats in walked if name in stats)
    torch.testing.assert_close(stats.gradient(Need.OUTPUT_GRADIENT_DIAGONAL), wanted, rtol=1e-4, atol=1e-9)


def test_what_was_carried_survives_json():
    carried = [{FromBlock(1, 2): (torch.ones(2), None), 0: {"full": [torch.zeros(1), 3], 7: "x"}}, {}]
    tensors = []
    structure = json.loads(json.dumps(to_json(carried, tensors)))
    again = from_json(structure, tensors)
    assert (
        again[1] == {}
        and torch.equal(again[0][FromBlock(1, 2)][0], torch.ones(2))
        and again[0][FromBlock(1, 2)][1] is None
    )
    assert again[0][0]["full"][1] == 3 and again[0][0][7] == "x" and torch.equal(again[0][0]["full"][0], torch.zeros(1))


def test_weights_that_blocks_share_are_no_targets(tmp_path, save_model):
    save_model(tmp_path / "m", CONFIGS["zamba2"], torch.float32)
    targeted = plan(tmp_path / "m", "magnitude-50").targeted
    assert targeted and not any("shared_transformer" in name and "adapter" not in name for name in targeted)


HRM = {"num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 2}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (t.HrmTextConfig(**{**C, "num_hidden_layers": 2}, **HRM), "does not call block after block, each once"),
        (t.XLMConfig(vocab_size=128, emb_dim=32, n_layers=2, n_heads=2), "their output head reads more than the last block"),
        (t.ReformerConfig(is_decoder=True), "its forward pass fails if its blocks are run by themselves"),
    ],
)  # fmt: skip
def test_what_cannot_be_walked_is_refused_by_plan_too(config, why, tmp_path, save_model):
    save_model(tmp_path / "m", config)
    with pytest.raises(PareError, match=rf"models cannot be compressed block by block: .*{why}"):
        plan(tmp_path / "m", "magnitude-50")
