"""Key/value heads are found with all that belongs to them, and the smaller config keeps all else as it was."""

import families as tiny
import pytest
import torch
from torch import nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.model.calls import Call
from paredown.compress.model.families import FAMILIES
from paredown.compress.model.groups import sliced
from paredown.compress.model.head_groups import head_groups
from paredown.compress.model.reshape_keys import smaller_values, with_keys, with_units
from paredown.compress.model.stream import Stream, start
from paredown.compress.recipe import Recipe
from paredown.compress.shape_job import resolve

D, HEADS, KV, SIZE, TOKENS = 20, 6, 3, 4, 8  # hidden size; query heads, keys and values, and how large each is; tokens
PER = HEADS // KV


class Attention(nn.Module):
    """Causal attention without positions; `heads`, `kv` and `size` as above."""

    def __init__(self, heads=HEADS, kv=KV, size=SIZE, **parameters):
        super().__init__()
        self.heads, self.kv, self.size = heads, kv, size
        self.make()
        self.o = nn.Linear(heads * size, D)
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def make(self):
        self.q = nn.Linear(D, self.heads * self.size)
        self.k, self.v = nn.Linear(D, self.kv * self.size), nn.Linear(D, self.kv * self.size, bias=False)

    def given(self, x):
        """(batch, tokens, heads, size) of queries, keys and values."""
        return tuple(y.unflatten(-1, (-1, self.size)) for y in (self.q(x), self.k(x), self.v(x)))

    def mixed(self, q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        per = self.heads // self.kv
        k, v = (t.repeat_interleave(per, 1) for t in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def forward(self, x):
        return self.o(self.mixed(*self.given(x)).flatten(2))


class Concatenated(Attention):
    """[q | k | v] in one matrix, as in Phi-3."""

    def make(self):
        self.sizes = [self.heads * self.size, self.kv * self.size, self.kv * self.size]
        self.qkv = nn.Linear(D, sum(self.sizes))

    def given(self, x):
        return tuple(y.unflatten(-1, (-1, self.size)) for y in self.qkv(x).split(self.sizes, -1))


class Interleaved(Attention):
    """Each key and value after its query heads, as in Falcon."""

    def make(self):
        self.qkv = nn.Linear(D, (self.heads + 2 * self.kv) * self.size)

    def given(self, x):
        per = self.heads // self.kv
        y = self.qkv(x).unflatten(-1, (self.kv, per + 2, self.size))
        return y[..., :per, :].flatten(2, 3), y[..., per, :], y[..., per + 1, :]


class QueriesAlone(Attention):
    """Queries by themselves, keys and values together."""

    def make(self):
        self.q, self.kv_proj = nn.Linear(D, self.heads * self.size), nn.Linear(D, 2 * self.kv * self.size)

    def given(self, x):
        k, v = self.kv_proj(x).chunk(2, -1)
        return tuple(y.unflatten(-1, (-1, self.size)) for y in (self.q(x), k, v))


class NormOfHeads(Attention):
    """A norm with the same weight for all heads, as in Qwen3."""

    def given(self, x):
        q, k, v = super().given(x)
        return nn.functional.rms_norm(q, (self.size,), self.scale), k, v


class NormOfAll(Attention):
    """A norm over all heads together, with a weight for each entry, as in OLMo 2."""

    def given(self, x):
        q, k, v = super().given(x)
        q = nn.functional.rms_norm(q.flatten(2), (self.heads * self.size,), self.scale)
        return q.unflatten(-1, (-1, self.size)), k, v


class Sinks(Attention):
    """Each query head may look at nothing, as in gpt-oss."""

    def mixed(self, q, k, v):
        k, v = (t.repeat_interleave(PER, 2) for t in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k)
        scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
        sinks = self.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.einsum("bhts,bshd->bthd", torch.cat([scores, sinks], -1).softmax(-1)[..., :-1], v)


class Gated(Attention):
    """Half of what the queries' matrix gives is a gate, head by head, as in Qwen3-Next."""

    def make(self):
        super().make()
        self.q = nn.Linear(D, 2 * self.heads * self.size)

    def forward(self, x):
        q, gate = self.q(x).unflatten(-1, (self.heads, 2 * self.size)).chunk(2, -1)
        k, v = (y.unflatten(-1, (-1, self.size)) for y in (self.k(x), self.v(x)))
        return self.o((self.mixed(q, k, v) * gate.sigmoid()).flatten(2))


class Latent(Attention):
    """Keys are made of a latent vector, and of a part that all heads share, as in DeepSeek's models."""

    def make(self):
        self.q, self.down = nn.Linear(D, self.heads * self.size), nn.Linear(D, 5 + 2)
        self.up = nn.Linear(5, self.kv * (self.size - 2 + self.size))

    def given(self, x):
        latent, shared = self.down(x).split([5, 2], -1)
        own, v = self.up(latent).unflatten(-1, (self.kv, -1)).split([self.size - 2, self.size], -1)
        k = torch.cat([own, shared[:, :, None].expand(-1, -1, self.kv, -1)], -1)
        return self.q(x).unflatten(-1, (-1, self.size)), k, v


class Distances(Attention):
    """Each head has a bias of its own for distances, as with ALiBi."""

    def mixed(self, q, k, v):
        k, v = (t.repeat_interleave(PER, 2) for t in (k, v))
        distance = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).float()
        scores = torch.einsum("bthd,bshd->bhts", q, k) - distance * torch.arange(HEADS)[:, None, None]
        scores = scores.masked_fill(distance < 0, -torch.inf)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 24), nn.Linear(24, D)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Residual(nn.Module):
    """A block that adds what its parts give, one after another."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, hidden_states):
        for part in self.parts:
            hidden_states = hidden_states + part(hidden_states)
        return hidden_states


def block_of(*parts, dtype=torch.float32):
    torch.manual_seed(0)
    module = Residual(*(part() for part in parts)).to(dtype).eval().requires_grad_(False)
    return Block(0, "model.layers.0.", module)


def stream_of(dtype=torch.float32):
    states = torch.randn(2, TOKENS, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    return Stream([states], [[Call((), {})]], [torch.zeros(2, TOKENS)], torch.device("cpu"))


def parts_of(group):
    prefix = "model.layers.0.parts.0."
    return {(p.name.removeprefix(prefix), p.dim, p.width, p.first) for p in group.parts}


QUERIES = {("q.weight", 0, PER * SIZE, 0), ("q.bias", 0, PER * SIZE, 0)}
SEPARATE = QUERIES | {("k.weight", 0, SIZE, 0), ("k.bias", 0, SIZE, 0), ("v.weight", 0, SIZE, 0)}
READER = {("o.weight", 1, PER * SIZE, 0)}
OWN = PER * SIZE
CASES = {
    "three matrices": (Attention, SEPARATE),
    "one after another": (
        Concatenated,
        {
            (f"qkv.{name}", 0, width, first)
            for name in ("weight", "bias")
            for width, first in ((OWN, 0), (SIZE, KV * OWN), (SIZE, KV * (OWN + SIZE)))
        },
    ),
    "interleaved": (Interleaved, {(f"qkv.{name}", 0, OWN + 2 * SIZE, 0) for name in ("weight", "bias")}),
    "keys with values": (
        QueriesAlone,
        QUERIES | {(f"kv_proj.{name}", 0, SIZE, first) for name in ("weight", "bias") for first in (0, KV * SIZE)},
    ),
    "a norm of each head": (lambda: NormOfHeads(scale=torch.ones(SIZE)), SEPARATE),
    "a norm of all heads": (lambda: NormOfAll(scale=torch.ones(HEADS * SIZE)), SEPARATE | {("scale", 0, OWN, 0)}),
    "sinks": (lambda: Sinks(sinks=torch.zeros(HEADS)), SEPARATE | {("sinks", 0, PER, 0)}),
    "gated": (Gated, SEPARATE - QUERIES | {(name, dim, 2 * OWN, first) for name, dim, _, first in QUERIES}),
}
TOGETHER = {"a norm of all heads"}  # where what stays depends on what goes


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_heads_are_found_in_every_part_and_slicing_them_is_silencing_them(case, dtype):
    make, parts = CASES[case]
    block = block_of(make, Mlp, dtype=dtype)
    (group,) = head_groups(stream_of(dtype), block)
    assert (group.name, group.kind, group.units) == ("model.layers.0.parts.0", "kv_groups", KV)
    assert group.reader == "model.layers.0.parts.0.o" and parts_of(group) == parts | READER
    block.module.float()
    if case not in TOGETHER:
        check_slices(block, group)


def check_slices(block, group):
    keep = torch.arange(group.units) != 1
    own = {block.prefix + name: tensor for name, tensor in block.module.state_dict().items()}
    names = {p.name for p in group.parts}
    changed = {n: sliced(own[n], [p for p in group.parts if p.name == n], keep) for n in names}
    less = {name.removeprefix("model.layers.0.parts.0."): tensor for name, tensor in changed.items()}
    attention = block.module.parts[0]
    silent = {"o.weight": attention.o.weight * keep.repeat_interleave(OWN)}
    x = stream_of().hidden[0]
    wanted = torch.func.functional_call(attention, silent, (x,))
    attention.heads, attention.kv = 2 * PER, 2
    if isinstance(attention, Concatenated):
        attention.sizes = [2 * OWN, 2 * SIZE, 2 * SIZE]
    torch.testing.assert_close(torch.func.functional_call(attention, less, (x,)), wanted)


def test_a_norm_of_all_heads_hides_no_head_where_none_share_a_key():
    (group,) = head_groups(stream_of(), block_of(lambda: NormOfAll(kv=HEADS, scale=torch.ones(HEADS * SIZE))))
    assert group.units == HEADS and ("q.weight", 0, SIZE, 0) in parts_of(group)


def test_each_head_is_a_unit_where_none_share_a_key_and_what_all_share_is_no_part():
    (group,) = head_groups(stream_of(), block_of(lambda: Latent(kv=HEADS)))
    assert group.units == HEADS
    written = {("q", SIZE), ("up", 2 * SIZE - 2)}
    assert parts_of(group) == {("o.weight", 1, SIZE, 0)} | {
        (f"{name}.{kind}", 0, width, 0) for name, width in written for kind in ("weight", "bias")
    }


OTHERS = {
    "one key and value for all": lambda: Attention(kv=1),
    "one head": lambda: Attention(heads=1, kv=1),
    "one key and value for all, in one matrix": lambda: Concatenated(kv=1),
    "a bias of each head": Distances,
    "no attention": Mlp,
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_has_no_heads_that_can_change_places_has_no_groups(other):
    assert head_groups(stream_of(), block_of(OTHERS[other])) == []


def test_nothing_of_a_block_is_changed_and_no_hook_is_left():
    block = block_of(Attention, Mlp)
    before = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
    assert head_groups(stream_of(), block)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.module.modules())


# The readers of each family's heads within a block, with the keys that say how many there are and what goes with them; none
# after "=" where no config can have fewer.
FOUND = {
    "self_attn.o_proj=num_key_value_heads,num_attention_heads": """
        afmoe arcee aria aria_text aya_vision beam cohere2 cohere2_moe cohere2_vision cohere_compass
        cohere_compass_text cosmos3_omni cwm deepseek_vl deepseek_vl_hybrid ernie4_5 flint gemma gemma2 gemma3
        gemma3_text gemma4_unified gemma4_unified_text glm glm4 glmasr gpt_oss hunyuan_v1_dense hunyuan_v1_moe
        hy_v3 hyperclovax hyperclovax_vision_v2 idefics2 idefics3 internlm3 iquestcoder jais2 kolibri1
        lighton_ocr llama llama4 llama4_text llava llava_next llava_next_video mellum minimax_m2 minimax_m3_vl
        minimax_m3_vl_text ministral ministral3 mistral mistral3 mixtral moss_transcribe_diarize nemotron
        paddleocr_vl paligemma qianfan_ocr qwen3 qwen3_asr qwen3_vl qwen3_vl_moe seed_oss smolvlm solar_open
        step3p7 unlimited_ocr vaultgemma video_llava vipllava voxtral
    """,
    "self_attn.o_proj=num_key_value_heads,num_attention_heads,head_dim": """
        apertus bamba cohere dots1 emu3 ernie4_5_moe exaone4 exaone4_5 exaone_moe flex_olmo glm4_moe glm4v_moe
        glm_ocr got_ocr2 granite granite_docling granite_swa granitemoe granitemoe_swa granitemoehybrid
        granitemoeshared internvl jamba llava_onevision nanochat olmo olmo2 olmo3 ovis2 phi3 phi4_multimodal
        phimoe pp_chart2table qwen2 qwen2_5_omni_thinker qwen2_audio qwen2_moe qwen3_moe qwen3_omni_moe_thinker
        smollm3 starcoder2 video_llama_3
    """,
    "": """
        bitnet bloom cpmant deepseek_v4 diffllama doge falcon falcon_mamba gpt_bigcode jetmoe mamba mamba2 mpt
        prophetnet zamba2 zaya
    """,
    "attention.output.dense=": """
        bert bert-generation big_bird camembert data2vec-text electra ernie git megatron-bert rembert roberta
        roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl
    """,
    "self_attn.o_proj=": """
        blt gemma3n_text gemma4 gemma4_text glm46v glm4v glmga helium mimo_v2_flash minimax mllama olmoe
        qwen2_5_vl qwen2_vl stablelm
    """,
    "self_attn.o_proj=num_attention_heads,num_key_value_heads": """
        axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note dots3_note_text glm4_moe_lite glm_moe_dsa
        hy_v4 kimi_k25 minicpm3 mistral4 mistral_large4 youtu
    """,
    "self_attn.out_proj=": """
        bart bigbird_pegasus biogpt blenderbot blenderbot-small kosmos-2.5 marian mbart mvp opt pegasus plbart
        trocr whisper xglm
    """,
    "linear_attn.out_proj=linear_num_key_heads,linear_num_value_heads "
    "self_attn.o_proj=num_key_value_heads,num_attention_heads": """
        minicpm_ocr minicpmv4_6 minicpmv4_7 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next
        qwen4_exp qwen4_exp_text
    """,
    "attn.c_proj=": "gpt-sw3 gpt2 openai-gpt",
    "conv.out_proj= self_attn.out_proj=num_key_value_heads,num_attention_heads,head_dim": "lfm2 lfm2_moe lfm2_vl",
    "attention.dense=": "gpt_neox gpt_neox_japanese",
    "attn.out_proj=": "codegen gptj",
    "conv.out_proj= self_attn.o_proj=num_key_value_heads,num_attention_heads": "lfm3 lfm3_vl",
    "self_attn.dense=": "fuyu persimmon",
    "self_attn.o_proj=linear_num_heads self_attn.o_proj=num_attention_heads,num_key_value_heads": """
        bailing_hybrid kimi_linear
    """,
    "self_attn.o_proj=num_key_value_heads,num_attention_heads "
    "self_attn.o_proj=swa_num_key_value_heads,swa_num_attention_heads": """
        inkling_mm_model inkling_text
    """,
    "attention.output=attention_hidden_size": "rwkv",
    "attn.Wo=": "modernbert-decoder",
    "attn.attention.out_proj=": "gpt_neo",
    "linear_attn.o_proj=linear_num_key_heads,linear_num_value_heads "
    "self_attn.o_proj=num_key_value_heads,num_attention_heads,head_dim": """
        olmo_hybrid
    """,
    "mamba.out_proj= mamba_decoder.mamba.out_proj=": "zamba",
    "mamba.out_proj=mamba_n_heads,mamba_d_ssm "
    "self_attn.o_proj=num_key_value_heads,num_attention_heads,head_dim": "falcon_h1",
    "mixer.o_proj=num_key_value_heads,num_attention_heads": "nemotron_h",
    "multi_head_attention.dense=": "ctrl",
    "norm_attn_norm.attn.out_proj=": "dbrx",
    "self_attn.0.o_proj=num_attention_heads,num_key_value_heads "
    "self_attn.1.o_proj=num_attention_heads,num_key_value_heads": """
        longcat_flash
    """,
    "self_attn.dense=num_key_value_heads,num_attention_heads,head_dim": "phi",
    "self_attn.o_proj.linear=num_key_value_heads,num_attention_heads": "moshi",
    "self_attn.o_proj=num_key_value_heads,num_attention_heads_per_layer": "laguna",
    "temporal_block.linear_out= temporal_block.o_proj=": "recurrent_gemma",
}
# state spaces in modules that are called otherwise
SPACES = {
    "kimi_linear": {"self_attn.o_proj"}, "bailing_hybrid": {"self_attn.o_proj"},
    "recurrent_gemma": {"temporal_block.linear_out"},
}  # fmt: skip
DAILY = ["qwen3", "phi3", "gpt_oss", "olmo2", "deepseek_v3", "qwen3_next", "bert", "bloom", "falcon_h1"]
RARE = [pytest.param(f, marks=pytest.mark.all_families) for f in sorted(FAMILIES - set(DAILY))]


@pytest.mark.parametrize("family", [*DAILY, *RARE])
def test_the_heads_of_a_family_are_found_and_a_smaller_config_fits_them(family, tmp_path):
    expected = next(readers for readers, names in FOUND.items() if family in names.split())
    groups, config = found(family, tmp_path)
    every = [(index, group) for index, own in groups.items() for group in own]
    keys = [",".join([g.config_key, *(key for key, _ in (*g.further, *g.fixed))]) for _, g in every]
    readers = [group.reader.split(f".{index}.", 1)[1] for index, group in every]
    assert {f"{reader}={key}" for reader, key in zip(readers, keys, strict=True)} == set(expected.split())
    spaces = {reader for reader, (_, group) in zip(readers, every, strict=True) if group.kind == "ssm_heads"}
    assert spaces == (SPACES.get(family, set()) or {r for r in readers if "linear_attn" in r or "mamba" in r})
    named = [group for _, group in every if group.config_key]
    if named and not any("norm" in part.name for group in named for part in group.parts):  # over all heads together
        check_smaller(family, config, named)


@torch.no_grad()
def check_smaller(family, config, groups):
    """Transformers' own model of the smaller config, with the weights that stay, is the large one with the rest silent."""
    model = tiny.build(family)
    weights, silent = model.state_dict(), dict(model.state_dict())
    for group in groups:
        keep = torch.randperm(group.units, generator=torch.Generator().manual_seed(0)) < group.units // 2
        for name in {p.name for p in group.parts}:
            weights[name] = sliced(weights[name], [p for p in group.parts if p.name == name], keep)
        last = group.parts[-1]
        columns = keep.repeat_interleave(last.width)
        silent[last.name] = silent[last.name] * (columns if last.dim == 1 else columns[:, None])
    for key, value in smaller_values(config, groups, {g.config_key: g.units // 2 for g in groups}).items():
        config = with_units(config, key, value)
    small = tiny.class_of(family)._from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    small.load_state_dict(weights)
    model.load_state_dict(silent)
    torch.testing.assert_close(tiny.logits_of(small), tiny.logits_of(model), rtol=1e-4, atol=1e-4)


def test_every_family_is_in_the_table_once():
    assert sorted(name for names in FOUND.values() for name in names.split()) == sorted(FAMILIES)


def test_keys_that_count_heads_change_together_and_lists_keep_their_ratio(tmp_path):
    groups, config = found("laguna", tmp_path)
    values = smaller_values(config, [g for own in groups.values() for g in own], {"num_key_value_heads": 1})
    assert values["num_attention_heads_per_layer"] == [2, 4] and values["num_key_value_heads"] == 1
    small = with_units(config, "num_attention_heads_per_layer", values["num_attention_heads_per_layer"])
    assert small.num_attention_heads_per_layer == [2, 4] and config.num_attention_heads_per_layer == [4, 8]


def test_the_size_of_a_head_is_told_where_it_would_grow(tmp_path):
    groups, _ = found("qwen2", tmp_path)
    assert groups[0][0].fixed == (("head_dim", 16),) and groups[0][0].further == (("num_attention_heads", 2),)
    assert groups[0][0].vector == 16


@pytest.mark.parametrize(
    ("family", "why"),
    [("gpt2", "keeps the size of each.*paredown_depth"), ("falcon", "multi-query attention has one for all")],
)
def test_a_family_whose_heads_cannot_go_is_refused_by_name(family, why, tmp_path):
    tiny.build(family).save_pretrained(tmp_path)
    recipe = Recipe.parse({"method": "random", "options": {"units": 1, "unit": "kv_groups"}})
    with pytest.raises(PareError, match=f"(?s){family}.*{why}"):
        resolve(ModelSource(tmp_path, family), recipe)


@torch.no_grad()
def found(family, folder):
    """The groups of a tiny model, by block, and its config."""
    tiny.build(family).save_pretrained(folder)
    source = ModelSource(folder, family)
    stream, groups = start(source, tiny.IDS[:1]), {}
    for block in blocks(source):
        with source.loaded(block):
            groups[block.index] = head_groups(stream, block)
            stream.advance(block)
    return with_keys(source, groups), source.config
