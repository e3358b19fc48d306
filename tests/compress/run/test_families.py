"""Every family we name: streamed like transformers runs it, compressed, written, reloaded, equal to the last bit."""

import os
import subprocess
import sys

import pytest
import torch
import transformers as t
from torch.nn.functional import cross_entropy

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.job import resolve_job
from paredown.compress.model.blocks import blocks, known
from paredown.compress.recipe import Recipe
from paredown.compress.run.pipeline import Run, score
from paredown.compress.run.record import write_config
from paredown.compress.text.windows import Windows

C = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "vocab_size": 128, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
SSM = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
FAMILIES = {
    "llama": t.LlamaConfig(**C),
    "llama tied": t.LlamaConfig(**C, tie_word_embeddings=True),
    "mistral": t.MistralConfig(**C, sliding_window=8),
    "qwen2": t.Qwen2Config(**C),
    "qwen3": t.Qwen3Config(**C, head_dim=16),
    "gemma2": t.Gemma2Config(**C, head_dim=16, sliding_window=8),
    "gemma3": t.Gemma3TextConfig(**C, head_dim=16, sliding_window=8),
    "phi3": t.Phi3Config(**C),
    "opt": t.OPTConfig(**OPT, word_embed_proj_dim=64),
    "opt post-norm": t.OPTConfig(**OPT, word_embed_proj_dim=32, do_layer_norm_before=False),
    "gpt2": t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": t.GPTNeoXConfig(**C),
    "bloom": t.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
    "falcon": t.FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    "mixtral": t.MixtralConfig(**C, num_local_experts=4),
    "qwen3_moe": t.Qwen3MoeConfig(**C, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "mamba": t.MambaConfig(**SSM),
    "mamba2": t.Mamba2Config(**SSM, num_heads=8, head_dim=16, n_groups=1, expand=2),
}
IDS = torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(0))
TEXT = Windows(IDS, "random", "all", "0")


def compress(folder, out, sparsity="2:4", format="packed", method="sparsegpt", **changes):
    recipe = Recipe.parse({"method": method, "options": {"sparsity": sparsity}, **changes})
    source = ModelSource(folder, folder.name)
    with CheckpointWriter(out) as writer:
        result = Run(resolve_job(source, recipe, format), TEXT, [TEXT], writer).run()
        writer.finish({})
        write_config(writer, source, format, result.specs)
        writer.copy(source.companions())
        writer.commit()
    return source, result, writer


def logits_of(folder):
    model = transformers_plugin.load(folder, experts_implementation="eager").eval()
    with torch.no_grad():
        return model, model(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_losses_are_those_of_the_model_itself(family, tmp_path, save_model):
    model = save_model(tmp_path / "model", FAMILIES[family])
    streamed = score(ModelSource(tmp_path / "model", family), [TEXT], lambda done, total: None)[0]
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    whole = cross_entropy(logits[:, :-1].float().flatten(0, 1), IDS[:, 1:].flatten(), reduction="none")
    assert torch.equal(streamed, whole.view(6, -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_dense_load_to_equal_logits_and_the_streamed_loss(family, tmp_path, save_model):
    save_model(tmp_path / "model", FAMILIES[family])
    source, result, writer = compress(tmp_path / "model", tmp_path / "packed")
    assert known(source) and all("calibration tokens are fewer" in told for told in result.fallbacks)
    assert result.layers and result.numbers * 2 == result.targeted and result.specs
    compress(tmp_path / "model", tmp_path / "dense", format="dense")
    model, packed = logits_of(tmp_path / "packed")
    assert torch.equal(packed, logits_of(tmp_path / "dense")[1])
    loss = cross_entropy(packed[:, :-1].float().flatten(0, 1), IDS[:, 1:].flatten())
    assert abs(float(loss.exp()) / result.evaluation[0]["after"]["token_perplexity"] - 1) < 2e-3
    assert model.generate(IDS[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 27)
    stored = sum(e["bytes"] for e in writer.tensors.values() if e["kind"] == "sparse24")
    assert stored <= 0.58 * 2 * result.targeted  # 9 / 16, and rows of 32 columns fill half a block of indices
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(packed, logits_of(tmp_path / "again")[1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_unstructured_halves_are_stored_in_57_5_percent(family, tmp_path, save_model):
    save_model(tmp_path / "model", FAMILIES[family])
    _, result, writer = compress(tmp_path / "model", tmp_path / "packed", sparsity=0.5, method="wanda")
    compress(tmp_path / "model", tmp_path / "dense", sparsity=0.5, method="wanda", format="dense")
    assert torch.equal(logits_of(tmp_path / "packed")[1], logits_of(tmp_path / "dense")[1])
    stored = sum(e["bytes"] for e in writer.tensors.values() if e["kind"] == "bitmap")
    assert stored <= 0.575 * 2 * result.targeted


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_stay_what_they_are(dtype, tmp_path, save_model):
    save_model(tmp_path / "model", FAMILIES["llama"], dtype)
    compress(tmp_path / "model", tmp_path / "packed")
    compress(tmp_path / "model", tmp_path / "dense", format="dense")
    model, packed = logits_of(tmp_path / "packed")
    assert model.dtype == dtype and packed.dtype == dtype
    assert torch.equal(packed, logits_of(tmp_path / "dense")[1])


def test_an_unknown_family_is_tried_by_structure_and_says_so(tmp_path, save_model):
    save_model(tmp_path / "model", t.StableLmConfig(**C))
    source, result, _ = compress(tmp_path / "model", tmp_path / "packed")
    assert not known(source) and "by structure" in result.fallbacks[0]
    assert torch.isfinite(logits_of(tmp_path / "packed")[1]).all()


@pytest.mark.parametrize(("policy", "kept"), [("data_free", 0.5), ("dense", 1.0)])
def test_idle_experts_follow_the_policy_and_are_reported(policy, kept, tmp_path, save_model):
    config = t.Qwen3MoeConfig(
        **{**C, "head_dim": 16, "num_experts": 64, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    )
    save_model(tmp_path / "model", config)
    _, result, _ = compress(tmp_path / "model", tmp_path / "dense", format="dense", idle=policy)
    idle = [line.split(":")[0] for line in result.fallbacks if "no calibration token reached" in line]
    assert idle
    source = ModelSource(tmp_path / "dense", "dense")
    block = blocks(source)[0]
    with source.loaded(block):
        weights = {v.name: v.weight for v in block.views()}
    for name in [n for n in idle if n in weights][:4]:
        share = float((weights[name] != 0).float().mean())
        assert share == pytest.approx(kept, abs=1e-2)


FRESH = """
import sys, torch
{our_import}
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = torch.load(folder + ".ids", weights_only=True)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, torch.load(folder + ".logits", weights_only=True)), folder
    assert type(AutoConfig.from_pretrained(folder)).__name__.startswith("Packed")
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids
    print(type(model).__name__)
"""


def test_a_fresh_process_loads_with_our_import_and_fails_closed_without(tmp_path, save_model):
    folders = []
    for family in ("llama tied", "gpt2", "mixtral"):
        out = tmp_path / f"{family}-packed"
        save_model(tmp_path / family, FAMILIES[family])
        compress(tmp_path / family, out)
        torch.save(IDS, f"{out}.ids")
        torch.save(logits_of(out)[1], f"{out}.logits")
        folders.append(str(out))
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def run(our_import):
        code = FRESH.format(our_import=our_import)
        return subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, env=env)

    done = run("import paredown.compress")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["PackedLlamaForCausalLM", "PackedGPT2LMHeadModel", "PackedMixtralForCausalLM"]
    failed = run("")
    assert failed.returncode != 0 and "ValueError" in failed.stderr and "paredown_llama" in failed.stderr
