"""Small models of some families with one block in memory: what tests of paired streams share."""

import copy

import torch
import transformers as t

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.model.blocks import blocks
from paredown.compress.model.stream import start
from paredown.compress.survey.residual import ResidualLayers
from paredown.compress.survey.sides import Side

C = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "vocab_size": 128, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "word_embed_proj_dim": 64,
}  # fmt: skip
LLAMA = ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]
FAMILIES = {
    "llama": (t.LlamaConfig(**C), LLAMA),
    "qwen3": (t.Qwen3Config(**C, head_dim=16), LLAMA),
    "phi3": (t.Phi3Config(**C), (["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"])),
    "opt": (t.OPTConfig(**OPT), (["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"])),
    "gpt2": (
        t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        (["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]),
    ),
    "gpt_neox": (t.GPTNeoXConfig(**C), (["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"])),
    "mamba": (
        t.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8),
        (["in_proj"], ["x_proj"], ["out_proj"]),
    ),
}


def opened(folder, ids, index=0, batch_tokens=None):
    """A source with one block in memory, and the stream before it."""
    source = ModelSource(folder, "m")
    walk = start(source, ids, batch_tokens)
    for block in blocks(source)[: index + 1]:
        source.materialise(block.prefix, block.names)
        if block.index < index:
            walk.advance(block)
    return source, blocks(source)[index], walk


def both(walk, dense, block, twin, layers=ResidualLayers([])):  # noqa: B008 - it is frozen
    """The two sides of a block."""
    return Side(walk, block, layers), Side(dense, twin, layers.of_twin(twin))


def altered(model, seed=0):
    """A copy of a model in which every Linear of the blocks is a little different."""
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in other.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                noise = torch.randn(module.weight.shape, generator=draw) * module.weight.float().std()
                module.weight += (0.5 * noise).to(module.weight.dtype)
    return other


def strong(model, scale=5):
    """Blocks that do more than hand their input on; biases that are not zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not any(part in name for part in ("emb", "wte", "wpe", "lm_head")):
                parameter *= scale
            elif name.endswith("bias"):
                parameter += torch.linspace(-0.3, 0.5, len(parameter)).to(parameter.dtype)
    return model


def opened_strong(folder, config, save_model, ids, index=0, dtype=torch.float32, batch_tokens=None):
    model = strong(save_model(folder, config, dtype))
    model.save_pretrained(folder)
    return model, *opened(folder, ids, index, batch_tokens)[1:]


def inputs_of(model, name, ids):
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: found.append(args[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return found[0].double().flatten(0, 1)  # (tokens, in)
