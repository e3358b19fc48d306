"""Packed checkpoints in transformers: `import paredown.compress`, then `from_pretrained` as for any model.

transformers gets two plugins. A quantizer swaps our modules in before weights are loaded. A model type of our own,
`paredown_llama` and so on for every family, makes a process without our import fail with a clear error: with the
quantizer alone, transformers would warn, fill the packed layers with random numbers and continue. A class of the family
that is called by its name does not read the model type: it fails on the notice in config.json (see `packed_classes`).
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from paredown.compress.checkpoint import bitmask_import
from paredown.compress.checkpoint.architectures import auto_class, model_types
from paredown.compress.checkpoint.auto_tables import register_tokenizers
from paredown.compress.checkpoint.packed_classes import (
    MODEL_TYPE_PREFIX,
    QUANT_METHOD,
    dense_model_type,
    dense_twin,
    packed_model_type,
    packed_twin,
    stub,
)
from paredown.compress.errors import PareError
from paredown.compress.storage.kinds import FORMAT_VERSION
from paredown.compress.storage.shapes import Shapes
from paredown.compress.storage.spec import Spec

__all__ = [
    "dense_config",
    "dense_model_type",
    "is_packed",
    "load",
    "packed_config",
    "packed_model_type",
    "packed_modules",
    "packed_parts",
    "register",
]


def register() -> None:
    """Register our quantizer and our model types with transformers. Cheap: classes are built when a checkpoint needs them."""
    import transformers  # noqa: F401 - first, for importing it may register them

    _register()


@cache
def _register() -> None:
    from transformers import AutoConfig

    from paredown.compress.checkpoint import quantizer  # noqa: F401 - registers itself

    families = model_types()
    for model_type in families:
        AutoConfig.register(packed_model_type(model_type), stub(model_type))
    register_tokenizers(families, MODEL_TYPE_PREFIX)


def packed_modules(config: Any) -> dict[str, Spec]:
    """Specs of the packed weights in a config, by name; empty for a dense model. Raises PareError as `packed_parts` does."""
    return packed_parts(config)[0]


def packed_parts(config: Any) -> tuple[dict[str, Spec], Shapes]:
    """Specs of the packed weights in a config, by name, and what in the model is not as the config says; else empty.

    Raises PareError for a checkpoint that another tool quantised, whose weights cannot be edited, and for one of ours
    that has another format or is damaged.
    """
    from paredown.compress.checkpoint.quantizer import read_settings

    settings, stored = getattr(config, "quantization_config", None), bitmask_import.stranded_format(config)
    if stored in bitmask_import.PARTS or (stored is not None and settings is not None):
        raise PareError(
            f"the checkpoint carries compressed-tensors' removed sparsity settings (format {stored}). "
            "Convert it first with: paredown export OLD -o NEW"
        )
    if settings is None:
        return {}, Shapes()
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("quant_method") != QUANT_METHOD:
        raise PareError(
            f"the checkpoint is quantised ({settings.get('quant_method')}): there are no plain weights to edit. "
            "Name the original checkpoint in bfloat16, float16 or float32."
        )
    return read_settings(settings)


def packed_config(
    config: Any, specs: Mapping[str, Spec], verbatim: list[str] | None = None, shapes: Shapes | None = None
) -> Any:
    """The config of a packed checkpoint: that of the dense family, with the specs of the packed weights.

    `shapes`: what in the model is not as the config says.
    """
    packed = packed_twin(dense_config(config))
    packed.quantization_config = {
        "quant_method": QUANT_METHOD,
        "version": FORMAT_VERSION,
        "modules": {name: spec.to_json() for name, spec in specs.items()},
        "verbatim": list(verbatim or []),
        **(shapes or Shapes()).to_json(),
    }
    return packed


def dense_config(config: Any) -> Any:
    """The inverse of `packed_config`: the config of the dense family; a dense one is its own."""
    return dense_twin(config) if is_packed(config) else config


def is_packed(config: Any) -> bool:
    """Whether a config has a model type of ours."""
    return bool(config.model_type != dense_model_type(config.model_type))


def load(folder: str | Path, *, unpack: bool | None = None, **options: Any) -> Any:
    """The model of a packed or a dense checkpoint, by `from_pretrained` of the auto class that has it, with these `options`.

    `unpack`: on a CPU, packed weights stay unpacked in memory once they were used, so that a pruned model is as fast as the
    dense one; None: if they take at most half of the free memory.
    Raises PareError for a packed checkpoint with tensors that are missing, unexpected, of a wrong shape or not finite.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from paredown.compress.storage.unpacked import keep_unpacked

    register()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    auto = AutoModelForCausalLM if is_packed(config) else auto_class(config)
    model = auto.from_pretrained(folder, **{"dtype": "auto", **options})
    if unpack is not None:
        keep_unpacked(model, unpack)
    return model
