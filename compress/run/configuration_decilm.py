"""The configuration of a DeciLM model with blocks of their own sizes: NVIDIA's layout, which vLLM and llama.cpp read.

This file lies beside the weights, for readers that have no such class of their own. It needs transformers alone.
"""

from typing import Any

from transformers import LlamaConfig


class BlockSettings(dict[str, Any]):
    """The settings of a block, or of its attention or MLP, which are attributes too."""

    def __init__(self, settings: Any) -> None:
        super().__init__(
            (key, BlockSettings(value) if isinstance(value, dict) else value) for key, value in settings.items()
        )

    def __getattr__(self, name: str) -> Any:
        # `ffn_mult` is for readers that know no `intermediate_size`; others would round it
        if name not in self or (name == "ffn_mult" and "intermediate_size" in self):
            raise AttributeError(name)
        return self[name]

    def __reduce__(self) -> Any:
        return BlockSettings, (dict(self),)


class DeciLMConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama's configuration, with the settings of each block in `block_configs`."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **settings: Any) -> None:
        super().__init__(**settings)
        self.block_configs = [BlockSettings(block) for block in block_configs]
