"""What the tests of recovery share: tiny models that say something, a recipe of steps, and what a checkpoint holds."""

import transformers
from safetensors.torch import load_file

from paredown.compress.recipe import Recipe

LIVELY = transformers.LlamaConfig(  # its next tokens are not all alike
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=True,
)  # fmt: skip
FORMS = {
    "2:4": {}, "0.5": {"sparsity": 0.5}, "dense": {"format": "dense"},
    "lowrank": {"method": "svd", "options": {"kept": 0.7}},
    "pifa": {"method": "svd", "options": {"kept": 0.7, "storage": "pifa"}},
    "sum": {"method": "sparse_low_rank", "options": {"sparsity": 0.5, "rank": 4}},
    "blocks": {"method": "tail", "options": {"kept": 0.6}, "format": "dense"},
}  # fmt: skip


class Stopped(BaseException):
    """What a killed run ends by."""


def recipe_of(text, steps):
    """A recipe of steps alone that trains on a short text, and scores it too."""
    return Recipe.parse(
        {
            "calibration": {"source": str(text), "sequences": 8, "length": 32, "allow_scored": True},
            "evaluate": {"perplexity": [str(text)], "length": 32, "windows": 4},
            "recover": list(steps),
        }
    )


def weights(folder):
    """All tensors of a checkpoint by name, as they are stored."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
