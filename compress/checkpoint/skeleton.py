"""The model of a config without weights."""

from collections.abc import Mapping
from typing import Any

import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.architectures import model_class
from paredown.compress.checkpoint.buffers import fill_buffers
from paredown.compress.checkpoint.configs import explained
from paredown.compress.errors import PareError
from paredown.compress.storage.install import install
from paredown.compress.storage.shapes import Shapes
from paredown.compress.storage.spec import Spec


def skeleton(config: Any, modules: Mapping[str, Spec], dtype: torch.dtype, shapes: Shapes | None = None) -> Any:
    """The model with all parameters on `meta`, its computed buffers filled, and the packed `modules` installed.

    `shapes`: what in the model is not as the config says. Raises PareError, saying what it is, if it is no language model, or
    why its config cannot be built.
    """
    from transformers.initialization import meta_device_safe_creation_ops

    try:
        dense = transformers_plugin.dense_config(config)
        cls = model_class(dense)
        if cls.config_class is not type(dense) and cls.config_class is type(dense.get_text_config()):
            dense = dense.get_text_config()  # of a text model with the config of a multimodal one
        with torch.device("meta"), meta_device_safe_creation_ops():
            model = cls._from_config(dense, dtype=dtype)
        fill_buffers(model)
    except PareError:
        raise
    except Exception as fault:  # whatever a class does with a value that it did not expect
        told = explained(fault, vars(config))
        raise PareError(f"config.json cannot be built into a {config.model_type} model: {told}") from fault
    with torch.device("meta"):
        (shapes or Shapes()).apply(model)
        install(model, modules)
    return model.eval().requires_grad_(False)
