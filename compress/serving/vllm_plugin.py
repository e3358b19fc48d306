"""`vllm serve FOLDER` for checkpoints that paredown wrote: vLLM finds `register` by its entry point.

It is called in every process of vLLM's, may be called again, and must be cheap. Everything goes through vLLM's own
registries: of config formats, of quantisation methods and of loaders.
"""

import copyreg
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paredown.compress.serving.vllm_config import PackedWeights

REGISTRIES = ("vllm.transformers_utils.config", "vllm.model_executor.model_loader")


def register() -> None:
    """Teach this process of vLLM our checkpoints; all others are read as before."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.transformers_utils.config import register_config_parser

    from paredown.compress.checkpoint.packed_classes import QUANT_METHOD
    from paredown.compress.serving.vllm_config import PackedConfigParser, PackedWeights
    from paredown.compress.serving.vllm_loader import PackedLoader

    for name in REGISTRIES:
        logging.getLogger(name).addFilter(_is_no_news)
    register_config_parser("hf")(PackedConfigParser)
    register_quantization_config(QUANT_METHOD)(PackedWeights)
    for load_format in ("auto", "hf", "safetensors"):
        register_model_loader(load_format)(PackedLoader)
    copyreg.pickle(PackedWeights, _sent)


def _sent(weights: "PackedWeights") -> tuple[Any, ...]:
    """How the packed weights go to a process that vLLM starts, which may lack our entry point."""
    return _arrived, (weights.__dict__,)


def _arrived(state: dict[str, Any]) -> "PackedWeights":
    """The packed weights in such a process, which is taught our checkpoints too."""
    from paredown.compress.serving.vllm_config import PackedWeights

    register()
    weights = PackedWeights.__new__(PackedWeights)
    weights.__dict__.update(state)
    return weights


def _is_no_news(record: logging.LogRecord) -> bool:
    """False for what a registry says of our classes, which do for other checkpoints what those before them did."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    return not any(isinstance(a, type) and a.__module__.startswith("paredown.") for a in arguments)
