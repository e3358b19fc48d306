"""Coupled units are found by trying, whatever a family calls them, and what is no MLP is not taken for one."""

import pytest
import torch
from torch import nn

from paredown.compress.methods.base import Part
from paredown.compress.model.blocks import Block
from paredown.compress.model.calls import Call
from paredown.compress.model.groups import channel_groups, sliced
from paredown.compress.model.stream import Stream

D, M, TOKENS = 12, 20, 8  # hidden size, channels, tokens


class Residual(nn.Module):
    """A block that adds what its parts give, one after another."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, hidden_states):
        for part in self.parts:
            hidden_states = hidden_states + part(hidden_states)
        return hidden_states


class Mlp(nn.Module):
    """What an MLP may look like: `between` makes the channels of what `up` gives."""

    def __init__(self, between, copies=1, bias=True, width=M, hidden=D, **parameters):
        super().__init__()
        self.up = nn.Linear(hidden, copies * width, bias)
        self.down = nn.Linear(width, hidden, bias)
        self.between = between
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x):
        return self.down(self.between(self, self.up(x)))


class Gated(nn.Module):
    """Three matrices without biases; all square if the width is the hidden size."""

    def __init__(self, width=M):
        super().__init__()
        self.gate, self.up = nn.Linear(D, width, False), nn.Linear(D, width, False)
        self.down = nn.Linear(width, D, False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Causal attention without positions; `shared`: one key and value head for all query heads."""

    def __init__(self, heads, head_dim, shared=False):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        kv = head_dim if shared else heads * head_dim
        self.q, self.k, self.v = nn.Linear(D, heads * head_dim), nn.Linear(D, kv), nn.Linear(D, kv)
        self.o = nn.Linear(heads * head_dim, D)

    def queries(self, x):
        return self.q(x)

    def forward(self, x):
        given = (self.queries(x), self.k(x), self.v(x))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in given)
        k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class LatentQueries(Attention):
    """Queries are made in two steps with a norm between them, as in DeepSeek's models."""

    def __init__(self):
        super().__init__(3, 4)
        self.a, self.norm, self.b = nn.Linear(D, M), nn.RMSNorm(M), nn.Linear(M, D)

    def queries(self, x):
        return self.b(self.norm(self.a(x)))


class Flat(LatentQueries):
    """A block without parts."""

    def __init__(self, norm):
        super().__init__()
        self.up, self.down, self.norm_after = nn.Linear(D, M), nn.Linear(M, D), norm

    def forward(self, hidden_states):
        x = hidden_states + super().forward(hidden_states)
        return self.norm_after(x + self.down(self.up(x).relu()))


class GatedNorm(nn.Module):
    """A norm that a small MLP gates."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(D), Mlp(lambda m, x: nn.functional.silu(x))

    def forward(self, x):
        y = self.norm(x)
        return y * torch.sigmoid(self.mlp(y))


class TwoReaders(Mlp):
    """The same channels are read twice."""

    def __init__(self):
        super().__init__(lambda m, x: x.relu())
        self.other = nn.Linear(M, D)

    def forward(self, x):
        channels = self.between(self, self.up(x))
        return self.down(channels) + self.other(channels)


def relu(module, x):
    return x.relu()


def halves(module, x):
    gate, up = x.chunk(2, -1)
    return gate.sigmoid() * up


def interleaved(module, x):
    return x[..., ::2].clamp(max=0.7) * (x[..., 1::2] + 1)  # as in gpt-oss


def normed(module, x):
    return nn.functional.rms_norm(x.relu(), (x.shape[-1],), module.scale)


def scaled_halves(module, x):
    gate, up = (x * module.scale).chunk(2, -1)
    return gate.relu() * up


def block_of(*parts):
    torch.manual_seed(0)
    module = Residual(*(part() for part in parts)).eval().requires_grad_(False)
    return Block(0, "model.layers.0.", module)


def stream_of(hidden=D, dtype=torch.float32):
    states = torch.randn(2, TOKENS, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    states[:, 0] = 0  # as the embedding of a padding token is
    return Stream([states], [[Call((), {})]], [torch.zeros(2, TOKENS)], torch.device("cpu"))


def parts_of(group):
    prefix = "model.layers.0.parts.0."
    return {(p.name.removeprefix(prefix), p.dim, p.width, p.first) for p in group.parts}


@torch.no_grad()
def smaller(block, group, keep):
    """The block's parameters without the units that go."""
    own = {block.prefix + name: tensor for name, tensor in block.module.state_dict().items()}
    names = {p.name for p in group.parts}
    changed = {n: sliced(own[n], [p for p in group.parts if p.name == n], keep) for n in names}
    return {n.removeprefix(block.prefix): t for n, t in changed.items()}


BIASED = {("up.weight", 0, 1, 0), ("up.bias", 0, 1, 0), ("down.weight", 1, 1, 0)}
SECOND = {("up.weight", 0, 1, M), ("up.bias", 0, 1, M)}
CASES = {
    "plain": (lambda: Mlp(relu), BIASED),
    "without biases": (lambda: Mlp(relu, bias=False), {p for p in BIASED if "bias" not in p[0]}),
    "two halves": (lambda: Mlp(halves, 2), BIASED | SECOND),
    "interleaved": (
        lambda: Mlp(interleaved, 2),
        {("up.weight", 0, 2, 0), ("up.bias", 0, 2, 0), ("down.weight", 1, 1, 0)},
    ),
    "scaled halves": (
        lambda: Mlp(scaled_halves, 2, scale=torch.ones(2 * M)),
        BIASED | SECOND | {("scale", 0, 1, 0), ("scale", 0, 1, M)},
    ),
    "gated": (Gated, {("gate.weight", 0, 1, 0), ("up.weight", 0, 1, 0), ("down.weight", 1, 1, 0)}),
    "square": (lambda: Gated(D), {("gate.weight", 0, 1, 0), ("up.weight", 0, 1, 0), ("down.weight", 1, 1, 0)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_channels_are_found_in_every_part_and_slicing_them_is_silencing_them(case, dtype):
    make, parts = CASES[case]
    block = block_of(make, lambda: Attention(3, 4))
    (group,) = channel_groups(stream_of(dtype=dtype), block_in(block, dtype))
    assert (group.name, group.kind, group.reader) == (
        "model.layers.0.parts.0",
        "channels",
        "model.layers.0.parts.0.down",
    )
    assert parts_of(group) == parts
    block.module.float()
    keep = torch.rand(group.units, generator=torch.Generator().manual_seed(2)) > 0.4
    silent = {"parts.0.down.weight": block.module.parts[0].down.weight * keep}
    stream = stream_of()
    less, zeroed = (
        stream.call(block, 0, stream.hidden[0], changed) for changed in (smaller(block, group, keep), silent)
    )
    torch.testing.assert_close(less, zeroed)


def block_in(block, dtype):
    block.module.to(dtype)
    return block


def test_a_norm_over_the_channels_goes_with_them_though_it_was_never_trained():
    block = block_of(lambda: Mlp(normed, scale=torch.ones(M)))
    (group,) = channel_groups(stream_of(), block)
    assert parts_of(group) == BIASED | {("scale", 0, 1, 0)}


def test_biases_that_were_never_trained_go_with_their_channels():
    block = block_of(lambda: Mlp(relu))
    nn.init.zeros_(block.module.parts[0].up.bias)
    (group,) = channel_groups(stream_of(), block)
    assert parts_of(group) == BIASED


OTHERS = {
    "attention": lambda: Attention(3, 4),
    "attention of width one": lambda: Attention(D, 1),
    "attention of one head": lambda: Attention(1, D),
    "shared keys": lambda: Attention(3, 4, shared=True),
    "shared keys of width one": lambda: Attention(D, 1, shared=True),
    "latent queries": LatentQueries,
    "a gated norm": GatedNorm,
    "factors of a matrix": lambda: Mlp(lambda m, x: x, bias=False),
    "two readers": TwoReaders,
    "channels that depend on their order": lambda: Mlp(lambda m, x: x.cumsum(-1).relu()),
    "tokens that depend on each other": lambda: Mlp(lambda m, x: x.cumsum(1).relu()),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_mlp_has_no_channels(other):
    assert channel_groups(stream_of(), block_of(OTHERS[other])) == []
    (group,) = channel_groups(stream_of(), block_of(OTHERS[other], Gated))
    assert group.reader == "model.layers.0.parts.1.down"


@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(D)], ids=["alone", "before a norm"])
def test_channels_are_found_in_a_block_without_parts(norm):
    torch.manual_seed(0)
    (group,) = channel_groups(stream_of(), Block(0, "model.layers.0.", Flat(norm).eval().requires_grad_(False)))
    assert (group.name, group.reader) == ("model.layers.0", "model.layers.0.down")


def test_nothing_of_a_block_is_changed_and_no_hook_is_left():
    block = block_of(lambda: Mlp(relu), lambda: Attention(3, 4))
    before = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
    assert channel_groups(stream_of(), block)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.module.modules())


def test_entries_outside_of_all_parts_stay():
    tensor, keep = torch.arange(14).view(7, 2), torch.tensor([True, False])
    parts = [Part("x", 0, width=2, first=1)]
    assert sliced(tensor, parts, keep)[:, 0].tolist() == [0, 2, 4, 10, 12]
    both = [*parts, Part("x", 1)]
    assert sliced(tensor, both, keep).tolist() == [[0], [2], [4], [10], [12]]
