"""Windows walk through the blocks as they would through the whole model, and nothing stays behind."""

import pytest
import torch
import transformers as t

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import blocks
from paredown.compress.model.stream import next_token_nll, start
from paredown.compress.run.scoring import score

C = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def source(tmp_path, save_model):
    save_model(tmp_path / "m", t.LlamaConfig(**C), torch.float32)
    return ModelSource(tmp_path / "m", "m")


def losses(source, stream):
    """Loss per token of the whole model (windows, length - 1)."""
    for block in blocks(source):
        with source.loaded(block):
            stream.advance(block)
    return stream.nll(source)


@pytest.mark.parametrize(
    "batch_tokens", [24, 100, 2048]
)  # windows one by one, by fours with two left over, all at once
def test_the_size_of_a_batch_changes_nothing(batch_tokens, source, windows):
    whole = losses(source, start(source, windows.ids))
    stream = start(source, windows.ids, batch_tokens)
    assert len(stream.hidden) == {24: 6, 100: 2, 2048: 1}[batch_tokens]
    torch.testing.assert_close(losses(source, stream), whole)


def test_the_head_may_be_run_on_few_positions_at_a_time(tmp_path, save_model, windows):
    model = save_model(tmp_path / "m", t.LlamaConfig(**C), torch.float32)
    with torch.no_grad():
        whole = next_token_nll(model, windows.ids)
        torch.testing.assert_close(next_token_nll(model, windows.ids, head_tokens=12), whole)
    source = ModelSource(tmp_path / "m", "m")
    torch.testing.assert_close(losses(source, start(source, windows.ids, head_tokens=12)), whole)
    assert whole.shape == (6, 23)


def test_afterwards_the_skeleton_is_empty_and_whole_again(source, windows):
    names, layers = list(source.model.state_dict()), [b.module for b in blocks(source)]
    progress = []
    score(source, [windows], lambda done, total: progress.append((done, total)))
    assert progress == [(1, 2), (2, 2)]
    assert all(p.is_meta for p in source.model.parameters())
    assert list(source.model.state_dict()) == names
    assert all(a is b.module for a, b in zip(layers, blocks(source), strict=True))


def test_hidden_states_between_blocks_are_the_models_own(tmp_path, save_model, windows):
    model = save_model(tmp_path / "m", t.LlamaConfig(**C))
    with torch.no_grad():
        wanted = model(windows.ids, use_cache=False, output_hidden_states=True).hidden_states
    source = ModelSource(tmp_path / "m", "m")
    stream = start(source, windows.ids)
    copy = stream.copy()
    assert torch.equal(torch.cat(stream.hidden), wanted[0])
    block = blocks(source)[0]
    source.materialise(block.prefix, block.names)
    with torch.no_grad():
        assert torch.equal(torch.cat(list(stream.outputs(block))), wanted[1])
    assert torch.equal(torch.cat(stream.hidden), wanted[0])
    stream.advance(block)
    assert torch.equal(torch.cat(stream.hidden), wanted[1]) and torch.equal(torch.cat(copy.hidden), wanted[0])


def test_activations_that_are_not_finite_name_the_block(source, windows):
    stream = start(source, windows.ids)
    block = blocks(source)[1]
    source.materialise(block.prefix, block.names)
    with torch.no_grad():
        block.module.mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(PareError, match=r"non-finite activations leave model.layers.1.*--dtype bfloat16"):
        stream.advance(block)


def test_a_block_whose_own_code_fails_is_named(source, windows):
    stream = start(source, windows.ids)
    block = blocks(source)[0]
    source.materialise(block.prefix, block.names)
    block.module.mlp.down_proj.weight.data = block.module.mlp.down_proj.weight.double()
    with pytest.raises(PareError, match=r"model.layers.0 cannot be run: RuntimeError: .* try --dtype float32"):
        stream.advance(block)
