"""What is measured of blocks before some are removed, against the whole model with these blocks skipped."""

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
import transformers as t

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.methods import build
from paredown.compress.model import stream as stream_module
from paredown.compress.model.blocks import blocks
from paredown.compress.model.removal import check_removable
from paredown.compress.model.stream import hidden_bytes, start
from paredown.compress.survey import depth
from paredown.compress.survey.depth import divergences, profile, profile_bytes

C = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "llama": t.LlamaConfig(**C),
    # blocks are called with masks of two kinds, and logits are capped
    "gemma2": t.Gemma2Config(**C, sliding_window=4, query_pre_attn_scalar=8),
    # attention and MLP side by side, and a head of its own
    "gpt_neox": t.GPTNeoXConfig(**{k: v for k, v in C.items() if k not in ("num_key_value_heads", "head_dim")}),
}
IDS = torch.randint(3, 96, (5, 14), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Two windows in a batch, and one in the last."""
    monkeypatch.setitem(stream_module.BATCH_TOKENS, "cpu", 28)


@pytest.fixture(params=CONFIGS)
def case(request, tmp_path, save_model):
    """A model in float64, and the source of what was saved of it."""
    model = save_model(tmp_path / "m", CONFIGS[request.param], torch.float64)
    return model, ModelSource(tmp_path / "m", request.param)


@pytest.fixture
def llama(tmp_path, save_model):
    model = save_model(tmp_path / "m", CONFIGS["llama"], torch.float64)
    return model, ModelSource(tmp_path / "m", "llama")


def layers_of(model):
    return model.get_decoder().layers


@contextmanager
def skipped(model, gone):
    """The whole model without these blocks: their inputs are their outputs."""
    for i in gone:
        layers_of(model)[i].forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for i in gone:
            del layers_of(model)[i].forward


@torch.no_grad()
def divergence(model, gone, ids):
    """KL(dense || model without these blocks), the mean over every fourth position that has a next token."""
    dense = model(ids, use_cache=False).logits.double().log_softmax(-1)[:, :-1:4]
    with skipped(model, gone):
        got = model(ids, use_cache=False).logits.double().log_softmax(-1)[:, :-1:4]
    return float((dense.exp() * (dense - got)).sum(-1).mean())


@torch.no_grad()
def states(model, ids):
    """Hidden states before each block and at the end (windows, length, hidden)."""
    found, hooks = [], []
    for layer in layers_of(model):
        hooks.append(
            layer.register_forward_pre_hook(lambda _, args, kw: found.append(_first(args, kw)), with_kwargs=True)
        )
    hooks.append(layers_of(model)[-1].register_forward_hook(lambda _, args, out: found.append(_first(out, {}))))
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _first(values, named):
    if isinstance(values, torch.Tensor):
        return values
    return values[0] if values else named["hidden_states"]


def measured(source, name, drop, ids=IDS, note=lambda text: None, **options):
    return profile(source, blocks(source), ids, build(name, {"kept": 0.5, **options}), drop, note)


def test_similarities_and_last_tokens_are_those_of_the_whole_model(case):
    model, source = case
    found, x = measured(source, "shortgpt", 2), states(model, IDS)
    wanted = [float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairwise(x)]
    assert found.similarity == pytest.approx(wanted, abs=1e-6)
    assert found.last.shape == (5, 6, 32) and found.removals == ()
    for i, hidden in enumerate(x):
        torch.testing.assert_close(found.last[:, i], hidden[:, -1].float())


def test_each_removal_is_the_best_one_left_and_its_divergence_that_of_the_whole_model(case):
    model, source = case
    found, gone = measured(source, "greedy_depth", 3).removals, []
    for block, kl in found:
        tried = {i: divergence(model, [*gone, i], IDS) for i in range(5) if i not in gone}
        assert block == min(tried, key=tried.get) and kl == pytest.approx(tried[block], abs=1e-5)
        gone.append(block)
    assert len(set(gone)) == 3


def test_only_the_first_windows_are_tried(llama):
    model, source = llama
    ((block, kl),) = measured(source, "greedy_depth", 1, windows=3).removals
    assert kl == pytest.approx(divergence(model, [block], IDS[:3]), abs=1e-5)
    assert kl != pytest.approx(divergence(model, [block], IDS), abs=1e-4)


def test_a_round_reads_each_block_that_is_left_once(llama, monkeypatch):
    _, source = llama
    read, notes, whole = [], [], ModelSource.materialise
    monkeypatch.setattr(
        ModelSource, "materialise", lambda s, prefix, names: (read.append(prefix), whole(s, prefix, names))
    )
    found = measured(source, "greedy_depth", 2, note=notes.append).removals
    inside = [int(prefix.split(".")[2]) for prefix in read if prefix]
    assert inside == [0, 1, 2, 3, 4, *(i for i in range(5) if i != found[0][0])]
    assert notes[1] == f"survey, depth: 2 of 2 blocks chosen, the last one {found[1][0]}, KL {found[1][1]:.3g}"


def test_after_a_round_the_best_are_tried_again_and_all_once_these_are_few(monkeypatch):
    monkeypatch.setattr(depth, "SHORTLIST", 4)
    found = {0: 9.0, 1: 0.1, 2: 0.3, 3: 0.2, 4: 5.0, 5: 0.4, 6: 0.5}
    assert depth.worth_trying(found, {0, 2, 3, 4, 5, 6}) == {2, 3, 5, 6}
    assert depth.worth_trying({2: 0.3, 3: 0.2, 5: 0.4}, {0, 2, 4, 5, 6}) == {2, 5}
    assert depth.worth_trying({2: 0.3, 5: 0.4}, {0, 2, 4, 6}) == {0, 2, 4, 6}


def test_divergences_do_not_depend_on_how_many_positions_the_head_takes(llama):
    model, source = llama
    found = []
    for head_tokens in (512, 8, 1):
        dense, other = (start(source, IDS, head_tokens=head_tokens) for _ in range(2))
        for block in blocks(source):
            with source.loaded(block):
                dense.advance(block)
                if block.index != 2:
                    other.advance(block)
        found.append(divergences(source, dense, [other, dense]))
    assert found == [pytest.approx([divergence(model, [2], IDS), 0.0], abs=1e-5)] * 3


def test_logits_that_overflow_are_never_the_best(llama):
    _, source = llama
    dense = start(source, IDS)
    broken = dense.copy()
    broken.hidden = [hidden * torch.nan for hidden in dense.hidden]
    assert divergences(source, dense, [broken, dense]) == [torch.inf, 0.0]


def test_tail_measures_nothing(llama, monkeypatch):
    _, source = llama
    monkeypatch.setattr(ModelSource, "loaded", None)
    found = measured(source, "tail", 2)
    assert found.removals == found.similarity == () and found.last is None


KINDS = ["sliding_attention", "full_attention"] * 2
GEMMA4 = {
    **C, "num_hidden_layers": 4, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
    "layer_types": KINDS, "sliding_window": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        t.Gemma4TextConfig(**GEMMA4, num_kv_shared_layers=2),
        t.ZayaConfig(**C, num_experts=4, moe_intermediate_size=16, router_hidden_size=16, num_experts_per_tok=1),
    ],
    ids=["keys and values of an earlier block", "a second output of the block before"],
)
@pytest.mark.parametrize("name", ["tail", "shortgpt", "greedy_depth"])
def test_blocks_that_others_read_are_not_removed(name, config, tmp_path, save_model):
    save_model(tmp_path / "m", config, torch.float32)
    with pytest.raises(PareError, match=r"from model\.layers\.\d, so its blocks cannot be removed"):
        measured(ModelSource(tmp_path / "m", "m"), name, 1)


def test_a_container_that_no_block_fills_is_no_obstacle(tmp_path, save_model):
    save_model(tmp_path / "m", t.Gemma4TextConfig(**GEMMA4, num_kv_shared_layers=0), torch.float32)
    source = ModelSource(tmp_path / "m", "m")
    check_removable(source, blocks(source))


def test_bytes_are_those_of_the_copies_that_are_held(llama):
    _, source = llama
    methods = [build(name, {"kept": 0.5}) for name in ("tail", "shortgpt", "greedy_depth")]
    found = [profile_bytes(source, method, 5, 20, 10) for method in methods]
    assert found == [0, 2 * hidden_bytes(source, 200), 7 * hidden_bytes(source, 80)]
