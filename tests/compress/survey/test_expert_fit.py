"""The experts that stay are fitted as one least squares problem over all of them, whatever class holds them."""

import families as tiny
import pytest
import torch
from torch.nn.functional import linear

from paredown.compress.checkpoint.source import ModelSource, set_tensor
from paredown.compress.methods.base import Sliced
from paredown.compress.methods.structured.experts import Fit
from paredown.compress.model.blocks import blocks
from paredown.compress.model.reshape import reshaped
from paredown.compress.model.stream import start
from paredown.compress.run.cut import left_of
from paredown.compress.shape_job import find_groups
from paredown.compress.survey.expert_fit import ExpertFit

KEEP = torch.tensor([True, False, True, True])


@pytest.fixture
def smaller(tmp_path):
    """`smaller(family)`: the last block of a tiny model, its group, a stream before it, and the block with an expert less."""

    def make(family):
        tiny.build(family).save_pretrained(tmp_path)
        source = ModelSource(tmp_path, family)
        stream, (*before, block) = start(source, tiny.IDS), blocks(source)
        groups = find_groups(source, blocks(source), "experts")
        for earlier in before:
            with source.loaded(earlier):
                stream.advance(earlier)
        source.materialise(block.prefix, block.names)
        (group,) = groups[block.index]
        target = reshaped(source, range(len(before) + 1), {group.config_key: 3}).blocks[-1]
        changed = left_of(block, group, Sliced(KEEP))
        own = block.module.state_dict()
        for name in target.module.state_dict():
            full = block.prefix + name
            set_tensor(target.module, name, changed[full] if full in changed else own[name])
        return stream, block, target, group, changed

    return make


def experts_of(module):
    return next(m for name, m in module.named_modules() if name.endswith("experts"))


def seen_by(stream, block):
    """What a block's experts are called with, token by token."""
    calls = []
    handle = experts_of(block.module).register_forward_pre_hook(lambda module, args: calls.append(args))
    for i in range(len(stream.hidden)):
        stream.output(block, i)
    handle.remove()
    return [token for call in calls for token in zip(*call, strict=True)]


def hidden(experts, e, x):
    """An expert's hidden channels for one token, by the formulas of the two classes."""
    if hasattr(experts, "gate_up_proj_bias"):  # GPT-OSS: (experts, in, out), interleaved
        both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
        return ((up + 1) * gate * torch.sigmoid(gate * experts.alpha)).double()
    gate, up = linear(x, experts.gate_up_proj[e]).chunk(2)
    return (experts.act_fn(gate) * up).double()


def mixed(experts, token):
    """What a mixture gives for one token."""
    total = 0.0
    for e, share in zip(token[1].tolist(), token[2].double(), strict=True):
        last, h = experts.down_proj[e].double(), hidden(experts, e, token[0])
        has_bias = hasattr(experts, "down_proj_bias")
        total = total + share * (h @ last + experts.down_proj_bias[e].double() if has_bias else last @ h)
    return total


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_the_fit_is_the_least_squares_over_all_experts_that_stay(family, smaller):
    stream, block, target, group, _ = smaller(family)
    stood = list(stream.hidden)
    dense, small = experts_of(block.module), experts_of(target.module)
    start = torch.stack([v.weight for v in ExpertFit(block, target, group).views]).double()  # (experts, out, in)
    count, _, width = start.shape
    design, lacking, whole = [], [], 0.0
    for before, after in zip(seen_by(stream, block), seen_by(stream, target), strict=True):
        y = mixed(dense, before)
        row = torch.zeros(count, width, dtype=torch.float64)
        for e, w in zip(after[1].tolist(), after[2].double(), strict=True):
            row[e] += w * hidden(small, e, after[0])
        design.append(row)
        lacking.append(y - mixed(small, after))
        whole += float(y.square().sum())
    f, lost = torch.stack(design), torch.stack(lacking)  # (tokens, experts, channels), (tokens, out)
    damp = 0.1 * f.square().sum(0).mean(1).repeat_interleave(width)
    f = f.flatten(1)
    change = torch.linalg.solve(f.T @ f + damp.diag(), f.T @ lost).T  # (out, experts * channels)
    found = ExpertFit(block, target, group).fitted(stream, Fit(damping=0.1, rounds=40))
    wanted = start + change.unflatten(1, (count, width)).transpose(0, 1)
    scale = float(change.abs().max())
    assert scale > 0 and float((found.weights.double() - wanted).abs().max()) < 2e-2 * scale
    after = float((lost - f @ change.T).square().sum()) / whole
    assert found.before == pytest.approx(float(lost.square().sum()) / whole, rel=1e-3)
    assert found.after == pytest.approx(after, rel=2e-2) and after < found.before
    assert all(a is b for a, b in zip(stream.hidden, stood, strict=True))  # the stream has not moved
