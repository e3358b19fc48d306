"""What is seen of experts is what a slow loop over tokens and their experts computes."""

import families as tiny
import pytest
import torch
from torch.nn.functional import linear

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import blocks
from paredown.compress.model.expert_groups import expert_groups
from paredown.compress.model.stream import start
from paredown.compress.survey.experts import ExpertObserver


@pytest.fixture
def loaded(tmp_path):
    """`loaded(family, ids)`: the source of a tiny model, its last block, in memory, and a stream that stands before it."""

    def load(family, ids):
        tiny.build(family).save_pretrained(tmp_path)
        source = ModelSource(tmp_path, family)
        stream, (*before, block) = start(source, ids), blocks(source)
        for earlier in before:
            with source.loaded(earlier):
                stream.advance(earlier)
        source.materialise(block.prefix, block.names)
        return stream, block

    return load


def one_expert(experts, e, x):
    """An expert's output for one token (hidden,), by the formulas of the two classes."""
    if hasattr(experts, "gate_up_proj_bias"):  # GPT-OSS: (experts, in, out), interleaved
        both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
        return ((up + 1) * gate * torch.sigmoid(gate * experts.alpha)) @ experts.down_proj[e] + experts.down_proj_bias[
            e
        ]
    gate, up = linear(x, experts.gate_up_proj[e]).chunk(2)
    return linear(experts.act_fn(gate) * up, experts.down_proj[e])


def slow(experts, calls):
    count, norm, gated = torch.zeros(3, 4, dtype=torch.float64)
    for hidden, index, weights in calls:
        for x, chosen, shares in zip(hidden, index, weights, strict=True):
            for e, share in zip(chosen.tolist(), shares.tolist(), strict=True):
                size = float(one_expert(experts, e, x).double().norm())
                count[e] += 1
                norm[e] += size
                gated[e] += share * size
    return count, norm / count.clamp_min(1), gated / count.clamp_min(1)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_what_is_seen_of_experts_is_the_mean_over_their_tokens(family, loaded):
    stream, block = loaded(family, tiny.IDS)
    (group,) = expert_groups(stream, block)
    experts, calls = block.module.mlp.experts, []
    plain = [hidden.clone() for hidden in stream.hidden]
    handle = experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    expected = [stream.output(block, i) for i in range(len(plain))]
    handle.remove()
    with ExpertObserver(block, [group]) as observer:
        seen = [stream.output(block, i) for i in range(len(plain))]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))  # watching changes nothing
    stats = observer.of(group)
    count, norm, gated = slow(experts, calls)
    assert torch.equal(stats.count, count) and count.sum() == 2 * tiny.IDS.numel()
    torch.testing.assert_close(stats.norm, norm, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(stats.gated, gated, rtol=1e-5, atol=1e-7)
    assert not any(m._forward_pre_hooks for m in block.module.modules())


def logits_of(family, gate, x):
    """A router's products with its input, by the formulas of three classes."""
    return linear(x, gate.weight, gate.bias if family == "gpt_oss" else None)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_products_of_router_logits_are_those_of_all_tokens(family, loaded):
    stream, block = loaded(family, tiny.IDS)
    (group,) = expert_groups(stream, block)
    with ExpertObserver(block, [group], logits=True) as observer:
        given = []
        gate = block.module.mlp.router if family == "gpt_oss" else block.module.mlp.gate
        handle = gate.register_forward_pre_hook(
            lambda module, args: given.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for i in range(len(stream.hidden)):
            stream.output(block, i)
        handle.remove()
    logits = [logits_of(family, gate, x).double() for tokens in given for x in tokens]
    assert len(logits) == tiny.IDS.numel()
    torch.testing.assert_close(observer.of(group).logits, sum(torch.outer(t, t) for t in logits), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_expert_without_tokens_gives_nothing_and_its_means_are_zero(loaded):
    stream, block = loaded("mixtral", tiny.IDS[:1, :2])
    (group,) = expert_groups(stream, block)
    with ExpertObserver(block, [group]) as observer:
        stream.output(block, 0)
    stats = observer.of(group)
    idle = stats.count == 0
    for value in (stats.norm, stats.gated):
        assert value.isfinite().all() and bool((value[idle] == 0).all()) and bool((value[~idle] > 0).all())


@torch.no_grad()
def test_experts_that_are_not_told_their_tokens_are_refused_by_name(loaded):
    stream, block = loaded("llama4_text", tiny.IDS[:1])
    (group,) = expert_groups(stream, block)
    with ExpertObserver(block, [group]) as observer:
        stream.output(block, 0)
    with pytest.raises(PareError, match=r"layers\.1\.feed_forward: its experts are not told.*aimer"):
        observer.of(group)
