"""The model of a config without weights."""

from collections.abc import Mapping
from typing import Any

import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.configs import first_line
from paredown.compress.errors import PareError
from paredown.compress.storage.install import install
from paredown.compress.storage.spec import Spec


def skeleton(config: Any, modules: Mapping[str, Spec], dtype: torch.dtype) -> Any:
    """The model with all parameters on `meta`, its computed buffers filled, and the packed `modules` installed.

    Raises PareError if it is no causal language model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    dense = transformers_plugin.dense_config(config) if modules else config
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(dense, dtype=dtype, trust_remote_code=False)
    except ValueError as fault:
        raise PareError(f"{config.model_type} models are no causal language models: {first_line(fault)}") from fault
    with torch.device("meta"):
        install(model, modules)
    return model.eval().requires_grad_(False)
