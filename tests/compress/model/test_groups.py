"""Coupled units are found by trying, whatever a family calls them, and what is no MLP is not taken for one."""

import families as tiny
import pytest
import torch
from torch import nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.methods.base import Part
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.model.calls import Call
from paredown.compress.model.families import FAMILIES
from paredown.compress.model.groups import channel_groups, sliced
from paredown.compress.model.reshape_keys import with_keys, with_units
from paredown.compress.model.stream import Stream, start

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


class Elsewhere(Residual):
    """A block that uses a weight of its MLP a second time."""

    def forward(self, hidden_states):
        used = (hidden_states @ self.parts[0].up.weight.T).cumsum(-1)
        return super().forward(hidden_states) + used[..., :D]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_the_block_uses_elsewhere_too_is_in_no_group(dtype):
    torch.manual_seed(0)
    block = Block(0, "model.layers.0.", Elsewhere(Mlp(relu)).to(dtype).eval().requires_grad_(False))
    assert channel_groups(stream_of(dtype=dtype), block) == []


def test_a_module_that_cannot_be_run_in_float32_is_refused_by_name():
    block = block_of(lambda: Mlp(lambda m, x: (x @ torch.eye(M, dtype=torch.bfloat16)).relu()))
    block.module.bfloat16()
    with pytest.raises(PareError, match=r"layers.0.parts.0 cannot be run in float32.*paredown_depth"):
        channel_groups(stream_of(dtype=torch.bfloat16), block)


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


# The readers of each family's channels within a block, with their keys in the config; "" where it has none.
FOUND = {
    "mlp.down_proj=intermediate_size": """
        apertus arcee axk1 aya_vision beam bitnet cohere cohere2 cohere2_vision cohere_compass cohere_compass_text
        cosmos3_omni cwm deepseek_vl deepseek_vl_hybrid diffllama doge emu3 ernie4_5 exaone4 exaone4_5 flint gemma
        gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm46v
        glm4v glm_ocr glmasr glmga got_ocr2 granite granite_docling granite_swa helium hunyuan_v1_dense hyperclovax
        hyperclovax_vision_v2 idefics3 internlm3 internvl iquestcoder jais2 lighton_ocr llama llava llava_next
        llava_next_video llava_onevision mimo_v2_flash minicpm3 minicpm_ocr minicpmv4_6 minicpmv4_7 ministral
        ministral3 mistral mistral3 mllama moss_transcribe_diarize nemotron olmo olmo2 olmo3 olmo_hybrid ovis2
        paddleocr_vl paligemma phi3 phi4_multimodal pp_chart2table qianfan_ocr qwen2 qwen2_5_omni_thinker qwen2_5_vl
        qwen2_audio qwen2_vl qwen3 qwen3_5 qwen3_5_text qwen3_asr qwen3_vl seed_oss smollm3 smolvlm stablelm
        vaultgemma video_llama_3 video_llava vipllava voxtral youtu
    """,
    "": """
        dbrx falcon_mamba flex_olmo gpt_oss granitemoe inkling_mm_model inkling_text jetmoe mamba mamba2 mellum
        minimax minimax_m2 mixtral olmoe phimoe qwen3_moe qwen3_omni_moe_thinker qwen3_vl_moe zamba zamba2 zaya
    """,
    "mlp.down_proj=intermediate_size mlp.shared_experts.down_proj=": """
        afmoe axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe glm4_moe
        glm4_moe_lite glm4v_moe glm_moe_dsa hy_v3 hy_v4 kimi_k25 kimi_linear mistral4 mistral_large4 unlimited_ocr
    """,
    "output.dense=intermediate_size": """
        bert bert-generation big_bird camembert data2vec-text electra ernie git megatron-bert rembert roberta
        roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl
    """,
    "fc2=decoder_ffn_dim": """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper
    """,
    "mlp.shared_expert.down_proj=shared_expert_intermediate_size": """
        qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_next qwen4_exp qwen4_exp_text
    """,
    "mlp.shared_experts.down_proj=": "aria aria_text deepseek_v4 solar_open",
    "feed_forward.w2=intermediate_size": "lfm2_moe lfm3 lfm3_vl",
    "mlp.c_proj=n_inner": "gpt-sw3 gpt2 gpt_bigcode",
    "mlp.dense_4h_to_h=intermediate_size": "fuyu gpt_neox persimmon",
    "shared_mlp.output_linear=shared_intermediate_size": "granitemoe_swa granitemoehybrid granitemoeshared",
    "fc2=ffn_dim": "opt xglm",
    "feed_forward.down_proj=intermediate_size": "bamba falcon_h1",
    "feed_forward.down_proj=intermediate_size_mlp feed_forward.shared_expert.down_proj=": "llama4 llama4_text",
    "feed_forward.w2=": "lfm2 lfm2_vl",
    "mlp.c_proj=intermediate_size": "gpt_neo starcoder2",
    "mlp.dense_4h_to_h=": "bloom gpt_neox_japanese",
    "mlp.down_proj=": "blt idefics2",
    "mlp.down_proj=dense_intermediate_size mlp.shared_experts.down_proj=shared_intermediate_size": """
        minimax_m3_vl minimax_m3_vl_text
    """,
    "mlp.down_proj=intermediate_size mlp.shared_experts.down_proj=shared_experts_intermediate_size": """
        dots3_note dots3_note_text
    """,
    "mlp.fc2=intermediate_size": "nanochat phi",
    "mlp.fc_out=n_inner": "codegen gptj",
    "fc2=intermediate_size": "biogpt",
    "feed_forward.down_proj=": "jamba",
    "feed_forward.output=decoder_ffn_dim": "prophetnet",
    "feed_forward.value=intermediate_size": "rwkv",
    "ffn.2=dff": "ctrl",
    "ffn.down_proj=": "mpt",
    "ffn.fc2=ffn_dim": "kosmos-2.5",
    "ffn.ffn.w_out=dim_ff": "cpmant",
    "mixer.down_proj=intermediate_size mixer.shared_experts.down_proj=moe_shared_expert_intermediate_size": """
        nemotron_h
    """,
    "mlp.Wo=intermediate_size": "modernbert-decoder",
    "mlp.c_proj=": "openai-gpt",
    "mlp.dense_4h_to_h=ffn_hidden_size": "falcon",
    "mlp.down_proj=intermediate_size mlp.shared_experts.down_proj=share_expert_dim": "step3p7",
    "mlp.down_proj=intermediate_size mlp.shared_experts.down_proj=shared_expert_intermediate_size": "laguna",
    "mlp.down_proj=prefix_dense_intermediate_size mlp.shared_experts.down_proj=": "cohere2_moe",
    "mlp.fc2=": "moshi",
    "mlp.shared_experts.down_proj=shared_expert_intermediate_size": "kolibri1",
    "mlp.shared_mlp.down_proj=": "hunyuan_v1_moe",
    "mlp_block.down_proj=": "recurrent_gemma",
    "mlps.0.down_proj=ffn_hidden_size mlps.1.down_proj=ffn_hidden_size": "longcat_flash",
}
_DAILY = """
llama qwen2 gemma2 gemma3 phi3 gpt2 gpt_neox opt falcon olmo2 starcoder2 granite cohere2 stablelm glm4 bert bart
rwkv bitnet gemma3n_text longcat_flash nemotron_h granitemoehybrid qwen3_next laguna minimax_m3_vl_text lfm2
deepseek_v3 jamba bloom axk2 mixtral jetmoe mamba2 zamba2
"""
DAILY = _DAILY.split()
RARE = [pytest.param(f, marks=pytest.mark.all_families) for f in sorted(FAMILIES - set(DAILY))]
# where channels depend on all others of their token, by a norm or a threshold
TOGETHER = {"bitnet", "gemma3n_text", "kosmos-2.5"}


@torch.no_grad()
def groups_of(source):
    stream, found = start(source, tiny.IDS[:1]), {}
    for block in blocks(source):
        with source.loaded(block):
            found[block.index] = channel_groups(stream, block)
            stream.advance(block)
    return with_keys(source, found)


@pytest.mark.parametrize("family", [*DAILY, *RARE])
def test_the_channels_of_a_family_are_found_and_a_smaller_config_fits_them(family, tmp_path):
    expected = next(readers for readers, names in FOUND.items() if family in names.split())
    model = tiny.build(family)
    model.save_pretrained(tmp_path)
    source = ModelSource(tmp_path, family)
    groups = groups_of(source)
    within = {(blocks(source)[i].prefix, g) for i, found in groups.items() for g in found}
    assert {f"{g.reader.removeprefix(prefix)}={g.config_key}" for prefix, g in within} == set(expected.split())
    named = [g for _, g in within if g.config_key]
    if named and family not in TOGETHER:
        check_smaller(family, model, named)


@torch.no_grad()
def check_smaller(family, model, groups):
    """Transformers' own model of the smaller config, with the weights that stay, is the large one with the rest silent."""
    config, weights, silent = model.config, model.state_dict(), dict(model.state_dict())
    for group in groups:
        keep = torch.randperm(group.units, generator=torch.Generator().manual_seed(0)) < group.units // 2
        for name in {p.name for p in group.parts}:
            weights[name] = sliced(weights[name], [p for p in group.parts if p.name == name], keep)
        last = group.parts[-1]
        silent[last.name] = silent[last.name] * (keep if last.dim == 1 else keep[:, None])
        config = with_units(config, group.config_key, group.units // 2)
    small = tiny.class_of(family)._from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    small.load_state_dict(weights)
    model.load_state_dict(silent)
    torch.testing.assert_close(tiny.logits_of(small), tiny.logits_of(model), rtol=1e-4, atol=1e-4)


def test_every_family_is_in_the_table_once():
    assert sorted(name for names in FOUND.values() for name in names.split()) == sorted(FAMILIES)


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [
        ("gpt2", {"n_inner": None}, "n_inner"),  # four times the hidden size
        ("gemma3n_text", {"intermediate_size": [96, 96, 96, 80]}, ""),  # one number for all of them is not enough
        (
            "llama",
            {"intermediate_size": 64, "max_position_embeddings": 64},
            "intermediate_size",
        ),  # as large as other things
    ],
)
def test_a_key_is_one_that_changes_the_groups_and_nothing_else(family, changes, key, tmp_path):
    torch.manual_seed(0)
    model = tiny.class_of(family)._from_config(tiny.tiny_config(family, **changes), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    groups = [g for found in groups_of(ModelSource(tmp_path, family)).values() for g in found]
    assert groups and {g.config_key for g in groups} == {key}


def test_a_smaller_config_leaves_the_one_it_comes_from_alone_and_keeps_lists():
    config = tiny.tiny_config("gemma3n_text")
    assert with_units(config, "intermediate_size", 8).intermediate_size == [8] * 4
    assert config.intermediate_size == [96] * 4
    assert with_units(tiny.tiny_config("gemma3"), "intermediate_size", 8).text_config.intermediate_size == 8
