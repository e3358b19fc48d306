"""A tiny model of every causal family of transformers, and what each of them must pass.

`check(family, folder)` says which promises a family breaks; `tests/compress/run/test_families.py` runs it.
"""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.job import resolve_job
from paredown.compress.model.blocks import blocks
from paredown.compress.recipe import Recipe
from paredown.compress.run.export import export_source
from paredown.compress.run.pipeline import Run
from paredown.compress.run.plan import make_plan
from paredown.compress.run.record import write_record
from paredown.compress.run.result import Result
from paredown.compress.run.scoring import score
from paredown.compress.text.windows import Windows

IDS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))
TEXT = Windows(IDS, "random", "all", "0")

# What a config's field gets, if its class has a field of that name.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"], 128),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "input_embedding_size"], 64),
    **dict.fromkeys(["output_embedding_size", "cross_attention_hidden_size", "attention_hidden_size", "lru_width"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"], 96),
    **dict.fromkeys(["dff", "dim_ff", "feed_forward_size", "d_inner", "n_inner", "intermediate_size_mlp"], 96),
    **dict.fromkeys(["dense_intermediate_size", "prefix_dense_intermediate_size"], 96),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 32),
    **dict.fromkeys(["shared_intermediate_size", "shared_experts_intermediate_size"], 32),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "router_hidden_size"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["num_encoder_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"], 4),
    **dict.fromkeys(["num_decoder_attention_heads", "num_encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "dim_head", "kv_channels", "attention_head_size", "swa_head_dim", "d_head"], 16),
    **dict.fromkeys(["v_head_dim", "qk_nope_head_dim", "linear_head_dim", "linear_key_head_dim"], 16),
    **dict.fromkeys(["linear_value_head_dim", "index_head_dim", "query_pre_attn_scalar"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank", "hc_lowrank", "laurel_rank", "adapter_rank"], 32),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers"], 1),
    **dict.fromkeys(["linear_num_heads", "linear_num_key_heads", "linear_num_value_heads", "index_n_heads"], 2),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "state_size", "ssm_state_size"], 16),
    **dict.fromkeys(["mamba_d_state", "chunk_size", "mamba_chunk_size", "context_length"], 16),
    **dict.fromkeys(["mamba_n_groups", "mamba_ngroups", "n_groups", "num_mem_blocks"], 1),
    "mamba_d_ssm": 128,
    **dict.fromkeys(["hidden_size_global", "adapter_in_dim", "adapter_out_dim", "adapter_input_size"], 64),
    **dict.fromkeys(["out_hidden_size", "text_hidden_size", "embed_dim", "audio_hidden_size"], 64),
    "depth": 2,
    **dict.fromkeys(["index_topk", "index_topk_blocks", "index_block_size"], 8),
    **dict.fromkeys(["mamba_dt_rank", "time_step_rank"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 128),
    **dict.fromkeys(["original_max_position_embeddings", "max_target_positions", "max_source_positions"], 128),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_chunk_size", "local_attention"], 8),
    **dict.fromkeys(["window_size", "attention_window_size", "keep_window_size"], 8),
    "pad_token_id": 0,
    "bos_token_id": 1,
    **dict.fromkeys(["eos_token_id", "forced_eos_token_id", "decoder_start_token_id", "sep_token_id"], 2),
    **dict.fromkeys(["initializer_range", "init_std", "embed_init_std", "embedding_initializer_range"], 0.1),
    "is_decoder": True,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}  # fmt: skip

_THREE_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}  # time, height and width

# What the rules above get wrong, or would leave out.
_FAMILY: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"q_lora_rank": None, "head_dim": 24},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "chameleon": {"vocabulary_map": {"<image>": 3}, "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1]}},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0, "mlp_layer_types": ["dense", "sparse"]},
    "cohere_compass_text": {
        "logit_scale": 1.0,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "cwm": {"layer_types": ["full_attention", "sliding_attention"]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "num_key_value_heads": 1,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "o_groups": 2,
    },
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "head_dim": 24,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 32 for name in ("q_lora_rank", "kv_lora_rank")},
        **{"swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16},
    },
    "emu3": {"vocabulary_map": {"<image>": 3}, "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1]}},
    "falcon_h1": {"ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7], "mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 16,
    },
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm4v_moe_text": {"rope_parameters": {**_THREE_AXES, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    "glm4v_text": {"rope_parameters": _THREE_AXES},
    "glm_ocr_text": {"rope_parameters": _THREE_AXES},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"attention_multiplier": 0.25},
    "granite_swa": {"attention_multiplier": 0.25},
    "granitemoe": {"attention_multiplier": 0.25},
    "granitemoe_swa": {"attention_multiplier": 0.25},
    "granitemoehybrid": {"attention_multiplier": 0.25, "layer_types": ["mamba", "attention"]},
    "granitemoeshared": {"attention_multiplier": 0.25},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"], "num_attention_heads_per_layer": [4, 8]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {
        "vision_config": {
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
            "image_size": 28,
        }
    },
    "llama4_text": {"moe_layers": [1]},
    "longcat_flash": {"num_layers": 1, "num_hidden_layers": 2, "zero_expert_num": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "sparse"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "opt": {"word_embed_proj_dim": 32},
    "paddleocr_vl_text": {"rope_parameters": _THREE_AXES},
    "qwen2_5_omni_text": {"rope_parameters": _THREE_AXES},
    "qwen2_5_vl_text": {"rope_parameters": _THREE_AXES},
    "qwen2_vl": {"vision_config": {"hidden_size": 64}},
    "qwen2_vl_text": {"rope_parameters": _THREE_AXES},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "hc_count": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 48],
        "num_buckets": 4,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
    },
    "roc_bert": {
        "shape_vocab_size": 128,
        "pronunciation_vocab_size": 128,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 2,
        "attention_hidden_size": 128,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}

# Further models of a family: name -> the family, and what differs.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "opt post-norm": ("opt", {"do_layer_norm_before": False}),
    "falcon new decoder": ("falcon", {"new_decoder_architecture": True}),
    "qwen2 sliding": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
}

# transformers itself cannot build or run these here, and why
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "it drafts for another model, whose keys and values it needs",
    "gemma4_unified_assistant": "it drafts for another model, whose keys and values it needs",
    "musicgen": "transformers builds its decoder from the wrong config",
    "musicgen_melody": "transformers builds its decoder from the wrong config",
    "xlstm": "its own forward mixes float32 and bfloat16",
}

# What we refuse, and a part of the sentence that says why.
REFUSED: dict[str, str] = {
    "hrm_text": "does not call block after block, each once",
    "inkling2_text": "output head reads more than the last block's output",
    "reformer": "its forward pass fails if its blocks are run by themselves",
    "xlm": "the hidden states are changed between block 0 and block 1",
    "xlnet": "its forward pass fails if its blocks are run by themselves",
    "xmod": "its forward pass fails if its blocks are run by themselves",
}

# At least sixty types, one or more of each kind: what `make test` runs. The marker `all_families` has the others.
EVERY_DAY = [
    *("llama", "llama tied", "mistral", "qwen2", "qwen2 sliding", "qwen3", "gemma2", "gemma3_text", "phi3", "opt"),
    *("opt post-norm", "gpt2", "gpt_neox", "gptj", "codegen", "gpt_bigcode", "bloom", "falcon", "falcon new decoder"),
    *("olmo2", "stablelm", "cohere2", "smollm3", "glm4", "granite", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"),
    *("phimoe", "ernie4_5_moe", "hunyuan_v1_moe", "dbrx", "jetmoe", "llama4_text", "granitemoe", "deepseek_v2"),
    *("deepseek_v3", "deepseek_v4", "glm_moe_dsa", "longcat_flash", "kimi_linear", "qwen3_next", "qwen3_5_text"),
    *("mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba", "jamba", "zamba2", "nemotron_h", "granitemoehybrid"),
    *("recurrent_gemma", "lfm2_moe", "olmo_hybrid", "rwkv", "zaya", "gemma3n_text", "gemma4_text", "bert", "bart"),
    *("gemma3", "qwen3_5", "qwen2_5_vl"),
]

CAUSAL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_MULTIMODAL_CLASSES = {**MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")


def tiny_config(name: str, **changes: Any) -> Any:
    """The config of a tiny model of a family or variant: each size that its class has is small, each kind of layer is there."""
    family, own = VARIANTS.get(name, (name, {}))
    config_class = CONFIG_MAPPING[family]
    return config_class(**_sizes(config_class, {**_FAMILY.get(family, {}), **own, **changes}))


def _sizes(config_class: Any, changes: dict[str, Any]) -> dict[str, Any]:
    own = {f.name: f.default for f in fields(config_class)}
    sizes = {name: _SIZES[name] for name in own if name in _SIZES}
    if "kv_lora_rank" in own:  # latent attention has no grouped heads
        sizes["num_key_value_heads"] = 4
    try:
        usual = config_class()
    except ValueError:  # the defaults of some contradict themselves
        return {**sizes, **changes}
    changes = dict(changes)
    for name in config_class.sub_configs:
        sub = getattr(usual, name, None)
        if sub is not None:
            inner = {"model_type": sub.model_type, **_FAMILY.get(sub.model_type, {}), **changes.pop(name, {})}
            sizes[name] = _sizes(type(sub), inner)
    kinds = {name: list(dict.fromkeys(getattr(usual, name) or ())) for name in _KINDS if name in own}
    kinds = {name: changes.get(name) or found for name, found in kinds.items() if len(found) > 1 or name in changes}
    depth = max([len(found) for found in kinds.values()] + [0])
    if depth:
        sizes["num_hidden_layers"] = depth
        sizes |= {name: found + found[-1:] * (depth - len(found)) for name, found in kinds.items()}
    return {**sizes, **{name: value for name, value in changes.items() if name not in sizes.keys() & kinds.keys()}}


def class_of(name: str) -> Any:
    """The class of transformers that continues a text with models of a family or variant."""
    family = VARIANTS.get(name, (name, {}))[0]
    return getattr(transformers, {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **_MULTIMODAL_CLASSES}[family])


@torch.no_grad()
def build(family: str) -> Any:
    """A random float32 model in which nothing is trivial: what a class fills with one number is made random, too."""
    torch.manual_seed(0)
    config = tiny_config(family)
    model = class_of(family)._from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    state = model.state_dict()
    for name in sorted(state):
        tensor = state[name]
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.isfinite().all() and tensor.std() == 0:
            tensor += 0.1 * torch.randn(tensor.shape)
    return model


def save(family: str, folder: Path) -> None:
    """Write a family's tiny model twice, with a tokenizer: in float32 in `folder/float32`, and in `folder/bfloat16`."""
    model = build(family)
    model.save_pretrained(folder / "float32")
    save_tokenizer(family, folder / "float32")
    narrow = load(folder / "float32", dtype=torch.bfloat16)
    narrow.save_pretrained(folder / "bfloat16")
    save_tokenizer(family, folder / "bfloat16")


def save_tokenizer(family: str, folder: Path) -> None:
    """Printable ASCII and three special tokens, with the tokenizer class that transformers has for the family."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    letters = [chr(i) for i in range(33, 127)] + ["\u0120", "\u2581"]
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<pad>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    own = TOKENIZER_MAPPING_NAMES.get(family) or "TokenizersBackend"
    # where any class will do, many checkpoints name that of Llama, which transformers then follows for some families only
    own = "LlamaTokenizer" if own in ("TokenizersBackend", "PreTrainedTokenizerFast") else own
    settings = folder / "tokenizer_config.json"
    plain = settings.read_text()
    settings.write_text(json.dumps({**json.loads(plain), "tokenizer_class": own}))
    try:
        ids_of(folder)
    except Exception:  # classes that need another library or file: whatever they raise
        settings.write_text(plain)


def ids_of(folder: Path) -> list[int]:
    """What the folder's tokenizer makes of a text."""
    ids: list[int] = transformers.AutoTokenizer.from_pretrained(folder)(" It's  A 42nd\ttest, no?\n").input_ids
    return ids


def load(folder: Path, **options: Any) -> Any:
    """The model of a folder, as transformers loads it."""
    return transformers_plugin.load(folder, experts_implementation="eager", **options).eval()


@torch.no_grad()
def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    """Of transformers' own forward."""
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


def losses_of(model: Any, ids: Tensor = IDS) -> Tensor:  # (windows, length - 1)
    """Loss per token, in nats, of transformers' own forward."""
    logits = logits_of(model, ids)[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def streamed_losses(folder: Path) -> Tensor:  # (windows, length - 1)
    """As a run scores the model, block by block."""
    return score(ModelSource(folder, folder.name), [TEXT], lambda done, total: None)[0]


def compress(folder: Path, out: Path, format: Any, method: str = "wanda") -> Result:
    """A whole run with the whole record, at 2:4."""
    recipe = Recipe.parse({"method": method, "options": {"sparsity": "2:4"}})
    job = resolve_job(ModelSource(folder, folder.name), recipe, format)
    make_plan(job, IDS.numel(), [IDS.numel()])
    with CheckpointWriter(out) as writer:
        result = Run(job, TEXT, [TEXT], writer).run()
        write_record(writer, job, result, TEXT)
        writer.commit()
    return result


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's files by name."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit, with the same dtype; NaN equals NaN."""
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(7777), other.nan_to_num(7777))


def check(family: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Pairs of a promise and how the family breaks it ("" if it keeps it); later ones are left out where they cannot be
    asked. Raises what transformers or the product raises."""
    save(family, folder)
    for dtype in ("float32", "bfloat16"):
        yield f"streamed {dtype}", _apart(streamed_losses(folder / dtype), losses_of(load(folder / dtype)))
    model, packed, dense = folder / "bfloat16", folder / "packed", folder / "dense"
    result = compress(model, packed, "packed")
    yield "compressed", "" if result.layers and result.specs and result.numbers * 2 == result.targeted else "not halved"
    compress(model, dense, "dense")
    yield "masks", _mask_faults(model, dense, [layer["name"] for layer in result.layers])
    loaded = load(packed)
    yield "packed reload", _apart(logits_of(loaded), logits_of(load(dense)))
    probe = torch.tensor([result.probe["ids"]])
    yield "loss after", _apart(torch.tensor([result.probe["nll"]]), losses_of(loaded, probe), 2e-3)
    yield "streamed packed", _apart(streamed_losses(packed), losses_of(loaded))
    yield "stored", _too_much(packed, result)
    yield "generated", _other_words(loaded, load(dense))
    loaded.save_pretrained(folder / "again")
    yield "saved again", _apart(logits_of(load(folder / "again")), logits_of(loaded))
    export_source(ModelSource(packed, "packed"), folder / "exported", "dense")
    yield "export", _other_tensors(folder / "exported", dense)
    told = [out.name for out in (packed, dense, folder / "exported") if ids_of(out) != ids_of(model)]
    yield "tokenizer", "" if not told else f"other ids in {', '.join(told)}"


def _apart(ours: Tensor, theirs: Tensor, tolerance: float = 0.0) -> str:
    """How far two tensors are apart, if they are."""
    if not theirs.isfinite().all():
        return "transformers' own result is not finite"
    apart = float((ours.double() - theirs.double()).abs().max())
    return "" if apart <= tolerance else f"apart by {apart:.2e}"


def _too_much(packed: Path, result: Result) -> str:
    """2:4 takes 9 bits for each 16; rows of 16 or 32 columns fill a part of a block of indices."""
    stored = sum(tensors_of(packed)[f"{name}.{part}"].nbytes for name in result.specs for part in ("values", "indices"))
    share = stored / (2 * result.targeted)
    return "" if share <= 0.6 else f"packed weights take {share:.1%} of their bytes"


def _other_words(packed: Any, dense: Any) -> str:
    """Greedy decoding, with the cache, must give the tokens that it gives with the dense checkpoint."""
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    try:
        wanted = dense.generate(IDS[:1], **settings)
    except Exception:  # families that transformers itself cannot generate with, for whatever reason
        return ""
    return "" if torch.equal(packed.generate(IDS[:1], **settings), wanted) else "other tokens"


def _mask_faults(model: Path, dense: Path, targets: list[str]) -> str:
    """Targets must hold two of four weights, and everything else what it held before."""
    before, after = tensors_of(model), tensors_of(dense)
    if before.keys() != after.keys():
        return f"other names: {sorted(before.keys() ^ after.keys())[:3]}"
    source = ModelSource(dense, dense.name)
    edited = {key for name in targets for key in _keys(source, name)}
    for name, tensor in after.items():
        if name not in edited and not same_bits(tensor, before[name]):
            return f"{name} is not what it was"
    for block in blocks(source):
        with source.loaded(block):
            for view in block.views():
                if view.name in targets and int((view.weight.unflatten(-1, (-1, 4)) != 0).sum(-1).max()) > 2:
                    return f"{view.name} is not 2:4"
    return ""


def _keys(source: ModelSource, name: str) -> tuple[str, ...]:
    """The tensors of the checkpoint that hold a target."""
    for stored in (f"{name}.weight", name.rpartition(".")[0]):
        if stored in source.origins:
            return source.origins[stored].keys
    raise AssertionError(f"no tensor holds {name}")


def _other_tensors(one: Path, other: Path) -> str:
    """Where two dense checkpoints differ."""
    ours, theirs = tensors_of(one), tensors_of(other)
    if ours.keys() != theirs.keys():
        return f"other names: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    return next((f"{name} differs" for name in ours if not same_bits(ours[name], theirs[name])), "")
