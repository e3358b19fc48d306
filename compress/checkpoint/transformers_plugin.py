"""Packed checkpoints in transformers: `import paredown.compress`, then `from_pretrained` as for any model.

transformers gets two plugins. A quantizer swaps our modules in before weights are loaded. A model type of our own,
`paredown_llama` and so on for every family, makes a process without our import fail with a clear error: with the
quantizer alone, transformers would warn, fill the packed layers with random numbers and continue.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from paredown.compress.checkpoint import bitmask_import
from paredown.compress.checkpoint.tensor_files import all_finite
from paredown.compress.errors import PareError
from paredown.compress.storage.fuse import fuse
from paredown.compress.storage.install import install, read_specs
from paredown.compress.storage.kinds import FORMAT_VERSION
from paredown.compress.storage.modules import PACKED
from paredown.compress.storage.spec import Spec

MODEL_TYPE_PREFIX = "paredown_"
QUANT_METHOD = "paredown"  # of config.json's quantization_config


@cache
def register() -> None:
    """Register our quantizer and our model types with transformers. Cheap: classes are built when a checkpoint needs them."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(QUANT_METHOD)
    class PackedWeightsConfig(QuantizationConfigMixin):  # type: ignore[misc]
        """`modules`: spec of each packed weight by name; `verbatim`: tensors of the files that the model class lacks."""

        def __init__(
            self, modules: dict[str, Any] | None = None, verbatim: list[str] | None = None, version: int = 0, **_: Any
        ) -> None:
            if version != FORMAT_VERSION:
                advice = "upgrade paredown" if version > FORMAT_VERSION else "compress the model again"
                raise PareError(
                    f"this checkpoint has format {version}, and this paredown reads {FORMAT_VERSION}: {advice}."
                )
            self.quant_method, self.version = QUANT_METHOD, version
            self.modules, self.verbatim = modules or {}, verbatim or []

    @register_quantizer(QUANT_METHOD)
    class PackedWeightsQuantizer(HfQuantizer):  # type: ignore[misc]
        """Swaps the packed modules into the model while it is on `meta`."""

        requires_calibration = True

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            install(model, read_specs(self.quantization_config.modules))

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            fuse(model)
            return model

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        AutoConfig.register(packed_model_type(model_type), _stub(model_type))


def packed_model_type(model_type: str) -> str:
    """`paredown_llama` for `llama`."""
    return MODEL_TYPE_PREFIX + model_type


def dense_model_type(model_type: str) -> str:
    """`llama` for `paredown_llama` and for `llama`."""
    return model_type.removeprefix(MODEL_TYPE_PREFIX)


def packed_modules(config: Any) -> dict[str, Spec]:
    """Specs of the packed weights in a config, by name; empty for a dense model.

    Raises PareError for a checkpoint that another tool quantised: its weights cannot be edited.
    """
    settings, stored = getattr(config, "quantization_config", None), bitmask_import.stranded_format(config)
    if stored in bitmask_import.PARTS or (stored is not None and settings is not None):
        raise PareError(
            f"the checkpoint carries compressed-tensors' removed sparsity settings (format {stored}). "
            "Convert it first with: paredown export OLD -o NEW"
        )
    if settings is None:
        return {}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("quant_method") != QUANT_METHOD:
        raise PareError(
            f"the checkpoint is quantised ({settings.get('quant_method')}): there are no plain weights to edit. "
            "Name the original checkpoint in bfloat16, float16 or float32."
        )
    return read_specs(settings["modules"])


def packed_config(config: Any, specs: Mapping[str, Spec], verbatim: list[str] | None = None) -> Any:
    """The config of a packed checkpoint: that of the dense family, with the specs of the packed weights."""
    classes = packed_classes(config.model_type)
    packed = classes[0].from_dict({**_plain(config), "architectures": [classes[1].__name__]})
    packed.quantization_config = {
        "quant_method": QUANT_METHOD,
        "version": FORMAT_VERSION,
        "modules": {name: spec.to_json() for name, spec in specs.items()},
        "verbatim": list(verbatim or []),
    }
    return packed


def dense_config(config: Any) -> Any:
    """The inverse of `packed_config`: the config of the dense family."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    dense_class = CONFIG_MAPPING[dense_model_type(config.model_type)]
    names = [name.removeprefix("Packed") for name in getattr(config, "architectures", None) or []]
    dense = dense_class.from_dict({**_plain(config), "architectures": names})
    dense._experts_implementation = getattr(config, "_experts_implementation", None)
    return dense


@cache
def packed_classes(model_type: str) -> tuple[type[Any], type[Any]]:
    """`PackedXConfig` and `PackedXForCausalLM` of a family, registered with transformers' auto classes."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    dense = CONFIG_MAPPING[model_type]
    base = MODEL_FOR_CAUSAL_LM_MAPPING[dense]
    config = type(f"Packed{dense.__name__}", (dense,), {"model_type": packed_model_type(model_type), **_HERE})
    model = type(f"Packed{base.__name__}", (_Strict, base), {"config_class": config, **_HERE})
    AutoModelForCausalLM.register(config, model)
    _register_tokenizer(dense, config)
    return config, model


def load(folder: str | Path, **options: Any) -> Any:
    """The model of a packed or a dense checkpoint, by `AutoModelForCausalLM.from_pretrained` with these `options`.

    Raises PareError for a packed checkpoint with tensors that are missing, unexpected, of a wrong shape or not finite.
    """
    from transformers import AutoModelForCausalLM

    register()
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options})


_HERE = {"__module__": __name__}


class _Strict:
    """A base of packed model classes: missing tensors, which transformers would fill with random numbers, are an error."""

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        model, info = super().from_pretrained(folder, *args, output_loading_info=True, **options)  # type: ignore[misc]
        _check(model, info, str(folder))
        return (model, info) if output_loading_info else model


def _check(model: Any, info: Mapping[str, Any], folder: str) -> None:
    again = "Fetch the checkpoint again, or check it with: paredown verify " + folder
    settings = model.config.quantization_config
    verbatim = settings["verbatim"] if isinstance(settings, dict) else settings.verbatim
    for fault in ("missing", "mismatched", "unexpected"):
        keys = info.get(f"{fault}_keys") or ()
        names = sorted(str(key) for key in keys if fault != "unexpected" or key not in verbatim)
        if names:
            raise PareError(f"{folder}: {fault} tensor {names[0]!r} ({len(names)} in all). {again}")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not all_finite(tensor):
            raise PareError(f"{folder}: tensor {name!r} holds NaN or infinite values. {again}")
    for name, module in model.named_modules():
        if isinstance(module, PACKED) and (damage := module.fault()):
            raise PareError(f"{folder}: {name}.{damage}. {again}")


def _stub(dense_type: str) -> type[Any]:
    """The class that AutoConfig has for our model type. It builds the real config class when it reads a checkpoint."""

    def from_dict(cls: type[Any], /, config_dict: dict[str, Any], **options: Any) -> Any:
        result = packed_classes(dense_type)[0].from_dict(config_dict, **options)
        config = result[0] if isinstance(result, tuple) else result  # a pair, if unused options are asked for
        config._experts_implementation = "eager"  # packed experts are unpacked one at a time
        return result

    name = f"Packed_{dense_type}_Config"
    return type(name, (), {"model_type": packed_model_type(dense_type), "from_dict": classmethod(from_dict), **_HERE})


def _plain(config: Any) -> dict[str, Any]:
    dropped = ("model_type", "quantization_config", "auto_map", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in dropped and not key.startswith("_")}


def _register_tokenizer(dense: type[Any], config: type[Any]) -> None:
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    tokenizers = TOKENIZER_MAPPING.get(dense, None)
    for tokenizer in tokenizers if isinstance(tokenizers, tuple) else (tokenizers,):
        if isinstance(tokenizer, type):
            AutoTokenizer.register(config, tokenizer)
            return
