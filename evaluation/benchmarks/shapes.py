"""Models that the benchmarks measure by their shape alone, with random weights: settings of transformers' LlamaConfig."""

from typing import Any

import torch
from torch import Tensor

DTYPE = torch.bfloat16

LLAMA_3 = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-3.2-1b": {
        **LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "llama-1b": {  # with untied embeddings about 1B parameters, 2 GB in bf16
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20,
        "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    },
    "tiny": {  # takes the bundled tokenizer's tokens
        "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024,
    },
}  # fmt: skip


def linears(shape: str) -> list[tuple[int, int]]:
    """(out, in) of every linear of one block, in the order in which it calls them."""
    settings = SHAPES[shape]
    hidden, inner = settings["hidden_size"], settings["intermediate_size"]
    keys = hidden // settings["num_attention_heads"] * settings["num_key_value_heads"]
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    return [*attention, (inner, hidden), (inner, hidden), (hidden, inner)]


def random_parameter(parameter: Tensor, device: torch.device) -> Tensor:
    """Ones for a norm, else normal numbers that keep the size of what they multiply with."""
    if parameter.dim() == 1:
        return torch.ones(parameter.shape, dtype=DTYPE, device=device)
    drawn = torch.randn(parameter.shape, dtype=DTYPE, device=device)  # (vocabulary, in)
    return drawn.mul_(parameter.shape[-1] ** -0.5)
