"""Packed checkpoints through transformers' own door: `import paredown.compress`, then `from_pretrained` as always.

Two plugs. A quantizer swaps our modules in before weights are loaded. A model type of our own, `paredown_llama` and so
on for every family, makes a process without our import fail with a clear error: with the quantizer alone, transformers
would warn, fill the packed layers with random numbers and go on.
"""

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from paredown.compress.checkpoint import bitmask_import
from paredown.compress.checkpoint.tensor_files import all_finite
from paredown.compress.errors import PareError
from paredown.compress.storage import modules
from paredown.compress.storage.fuse import fuse
from paredown.compress.storage.kinds import FORMAT_VERSION

PREFIX = "paredown_"
METHOD = "paredown"


@cache
def register() -> None:
    """Make transformers know our quantizer and our model types. Cheap: classes are built when a checkpoint asks."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(METHOD)
    class PackedWeightsConfig(QuantizationConfigMixin):  # type: ignore[misc]
        """`modules`: spec of each packed weight by name; `verbatim`: tensors in the files that the class does not know."""

        def __init__(
            self, modules: dict[str, Any] | None = None, verbatim: list[str] | None = None, version: int = 0, **_: Any
        ) -> None:
            if version != FORMAT_VERSION:
                advice = "upgrade paredown" if version > FORMAT_VERSION else "compress the model again"
                raise PareError(
                    f"this checkpoint has format {version}, and this paredown reads {FORMAT_VERSION}: {advice}."
                )
            self.quant_method, self.version = METHOD, version
            self.modules, self.verbatim = modules or {}, verbatim or []

    @register_quantizer(METHOD)
    class PackedWeightsQuantizer(HfQuantizer):  # type: ignore[misc]
        """Swaps the packed modules into the model while it is on `meta`."""

        requires_calibration = True

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            modules.install(model, self.quantization_config.modules)

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
    return PREFIX + model_type


def dense_model_type(model_type: str) -> str:
    return model_type.removeprefix(PREFIX)


def packed_modules(config: Any) -> dict[str, Any]:
    """Specs of the packed weights that a config tells of, by name; empty for a dense model.

    Raises PareError for a checkpoint that is quantised by others: its weights cannot be edited.
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
    if settings.get("quant_method") != METHOD:
        raise PareError(
            f"the checkpoint is quantised ({settings.get('quant_method')}): there are no plain weights to edit. "
            "Name the original checkpoint in bfloat16, float16 or float32."
        )
    return dict(settings["modules"])


def packed_config(config: Any, modules: Mapping[str, Any], verbatim: list[str] | None = None) -> Any:
    """A dense family's config turned into that of a packed checkpoint."""
    classes = packed_classes(config.model_type)
    made = classes[0].from_dict({**_plain(config), "architectures": [classes[1].__name__]})
    made.quantization_config = {
        "quant_method": METHOD,
        "version": FORMAT_VERSION,
        "modules": deepcopy(dict(modules)),
        "verbatim": list(verbatim or []),
    }
    return made


def dense_config(config: Any) -> Any:
    """The inverse: the plain family's config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    dense = CONFIG_MAPPING[dense_model_type(config.model_type)]
    names = [name.removeprefix("Packed") for name in getattr(config, "architectures", None) or []]
    made = dense.from_dict({**_plain(config), "architectures": names})
    made._experts_implementation = getattr(config, "_experts_implementation", None)
    return made


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
    """`AutoModelForCausalLM.from_pretrained` for packed and dense checkpoints alike, strict for the packed ones."""
    from transformers import AutoModelForCausalLM

    register()
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options})


_HERE = {"__module__": __name__}


class _Strict:
    """Mixed into packed model classes: what transformers would fill with random numbers is an error here."""

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        model, told = super().from_pretrained(folder, *args, output_loading_info=True, **options)  # type: ignore[misc]
        _check(model, told, str(folder))
        return (model, told) if output_loading_info else model


def _check(model: Any, told: Mapping[str, Any], folder: str) -> None:
    again = "Fetch the checkpoint again, or check it with: paredown verify " + folder
    settings = model.config.quantization_config
    verbatim = settings["verbatim"] if isinstance(settings, dict) else settings.verbatim
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(name) for name in told.get(what) or () if what != "unexpected_keys" or name not in verbatim)
        if names:
            raise PareError(f"{folder}: {what.replace('_keys', '')} tensor {names[0]!r} ({len(names)} in all). {again}")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not all_finite(tensor):
            raise PareError(f"{folder}: tensor {name!r} holds NaN or infinite values. {again}")
    for name, module in model.named_modules():
        if isinstance(module, modules.PACKED) and (fault := module.fault()):
            raise PareError(f"{folder}: {name}.{fault}. {again}")


def _stub(dense_type: str) -> type[Any]:
    """What AutoConfig finds under our model type: it builds the real class only when a checkpoint is loaded."""

    def from_dict(cls: type[Any], /, config_dict: dict[str, Any], **options: Any) -> Any:
        made = packed_classes(dense_type)[0].from_dict(config_dict, **options)
        config = made[0] if isinstance(made, tuple) else made
        config._experts_implementation = "eager"  # packed experts are unpacked one at a time
        return made

    name = f"Packed_{dense_type}_Config"
    return type(name, (), {"model_type": packed_model_type(dense_type), "from_dict": classmethod(from_dict), **_HERE})


def _plain(config: Any) -> dict[str, Any]:
    dropped = ("model_type", "quantization_config", "auto_map", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in dropped and not key.startswith("_")}


def _register_tokenizer(dense: type[Any], config: type[Any]) -> None:
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    found = TOKENIZER_MAPPING.get(dense, None)
    for candidate in found if isinstance(found, tuple) else (found,):
        if isinstance(candidate, type):
            AutoTokenizer.register(config, candidate)
            return
