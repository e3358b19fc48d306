"""Classes of packed checkpoints: for every family a config and its models, made when a checkpoint needs them.

A packed class carries the family's `__module__`. transformers asks it whether a class is its own, and takes all others
for custom code: it would leave out buffers that a parent module fills, and renamings of tensors.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from paredown.compress.checkpoint.architectures import candidates, dense_names, model_class
from paredown.compress.checkpoint.auto_tables import enter, register_companions
from paredown.compress.checkpoint.tensor_files import all_finite
from paredown.compress.errors import PareError
from paredown.compress.storage.modules import PACKED

MODEL_TYPE_PREFIX = "paredown_"
QUANT_METHOD = "paredown"  # of config.json's quantization_config
# A key of config.json that every config class of transformers reads as numbers: any class but ours fails on this text.
NOTICE = {"import paredown.compress, then load this checkpoint with AutoModelForCausalLM.from_pretrained": ""}
NOTICE_KEY = "id2label"


def packed_model_type(model_type: str) -> str:
    """`paredown_llama` for `llama`."""
    return MODEL_TYPE_PREFIX + model_type


def dense_model_type(model_type: str) -> str:
    """`llama` for `paredown_llama` and for `llama`."""
    return model_type.removeprefix(MODEL_TYPE_PREFIX)


class PackedConfig:
    """A base of packed config classes: config.json also says that it takes our import to read it."""

    model_type: str

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """As of any config; registers the model classes that `architectures` names."""
        result = super().from_dict(_without_notice(config_dict), **options)  # type: ignore[misc]
        config = result[0] if isinstance(result, tuple) else result  # a pair, if unused options are asked for
        config._experts_implementation = "eager"  # packed experts are unpacked one at a time
        for name in dense_names(config):
            packed_model_class(dense_model_type(cls.model_type), name)
        return result

    def to_json_string(self, use_diff: bool = True) -> str:
        """As of any config, with the notice."""
        raw = json.loads(super().to_json_string(use_diff))  # type: ignore[misc]
        if "quantization_config" in raw:
            kept = {NOTICE_KEY: raw[NOTICE_KEY]} if NOTICE_KEY in raw else {}
            raw = {**raw, NOTICE_KEY: NOTICE, "quantization_config": {**raw["quantization_config"], **kept}}
        return json.dumps(raw, indent=2, sort_keys=True) + "\n"

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        return (_new_config, (dense_model_type(self.model_type),), *reduced[2:])


class PackedModel:
    """A base of packed model classes: missing tensors, which transformers would fill with random numbers, are an error."""

    dense_class: type[Any]
    config_class: type[Any]

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As of any model. Raises PareError for tensors that are missing, unexpected, of a wrong shape or damaged."""
        _check_quantization(folder, options.get("quantization_config"))
        model, info = super().from_pretrained(folder, *args, output_loading_info=True, **options)  # type: ignore[misc]
        again = f"Fetch the checkpoint again, or check it with: paredown verify {folder}"
        if damage := _wrong_name(model, info) or _wrong_value(model):
            raise PareError(f"{folder}: {damage}. {again}")
        return (model, info) if output_loading_info else model

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        family = dense_model_type(self.config_class.model_type)
        return (_new_model, (family, self.dense_class.__name__), *reduced[2:])


def _check_quantization(folder: Any, asked: Any) -> None:
    """Raises PareError for settings of another quantiser; those of config.json come back from some who load a model."""
    settings = asked if asked is None or isinstance(asked, Mapping) else asked.to_dict()
    if settings is not None and settings.get("quant_method") != QUANT_METHOD:
        raise PareError(
            f"{folder} holds packed weights, which cannot be quantised as well. Quantise its dense export: "
            f"paredown export {folder} -o NEW --format dense"
        )


@cache
def packed_config_class(model_type: str) -> type[Any]:
    """`PackedXConfig` of a family, registered with the tokenizers and processors of its dense config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    dense = CONFIG_MAPPING[model_type]
    own = {"model_type": packed_model_type(dense.model_type), "__module__": dense.__module__}
    config = type(f"Packed{dense.__name__}", (PackedConfig, dense), own)
    register_companions(dense, config)
    return config


@cache
def packed_model_class(model_type: str, architecture: str) -> type[Any]:
    """`PackedXForCausalLM` of a family, registered with the auto classes that know `architecture`.

    Raises PareError if the family has no model of that name.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    dense, config = CONFIG_MAPPING[model_type], packed_config_class(model_type)
    base = next((cls for cls in candidates(dense) if cls.__name__ == architecture), None)
    if base is None:
        raise PareError(
            f"config.json names the architecture Packed{architecture}, which {model_type} models do not have. "
            "Fetch the checkpoint again."
        )
    own = {"config_class": config, "dense_class": base, "__module__": base.__module__}
    model = type(f"Packed{architecture}", (PackedModel, base), own)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        known = auto._model_mapping.get(dense, ())
        names = [cls.__name__ for cls in (known if isinstance(known, list | tuple) else [known])]
        # a multimodal model is also found where lm-eval and others look for any language model
        if architecture in names or auto is AutoModelForCausalLM:
            before = auto._model_mapping.get(config, ())
            enter(auto._model_mapping, config, (*before, model))
    return model


def stub(dense_type: str) -> type[Any]:
    """The class that AutoConfig has for our model type. It builds the real config class when it reads a checkpoint."""

    def from_dict(cls: type[Any], /, config_dict: dict[str, Any], **options: Any) -> Any:
        return packed_config_class(dense_type).from_dict(config_dict, **options)

    own = {"model_type": packed_model_type(dense_type), "from_dict": classmethod(from_dict), "__module__": __name__}
    return type(f"Packed_{dense_type}_Config", (), own)


def packed_twin(config: Any) -> Any:
    """The config of the packed family with the settings of a dense one; the weights that are packed are not yet named."""
    cls = model_class(config)
    if cls.config_class is not type(config) and cls.config_class is type(config.get_text_config()):
        config = config.get_text_config()  # of a text model with the config of a multimodal one
    family = type(config).model_type
    packed = packed_model_class(family, cls.__name__)
    return packed_config_class(family).from_dict({**plain(config), "architectures": [packed.__name__]})


def dense_twin(config: Any) -> Any:
    """The inverse of `packed_twin`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    dense_class = CONFIG_MAPPING[dense_model_type(config.model_type)]
    dense = dense_class.from_dict({**plain(config), "architectures": dense_names(config)})
    dense._experts_implementation = getattr(config, "_experts_implementation", None)
    return dense


def plain(config: Any) -> dict[str, Any]:
    """The settings of a config that packed and dense checkpoints share."""
    dropped = ("model_type", "quantization_config", "auto_map", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in dropped and not key.startswith("_")}


def _without_notice(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What was read from config.json, as it is without the notice, and without code, which does not go where it is saved."""
    result = {key: value for key, value in raw.items() if key != "auto_map"}
    settings = result.get("quantization_config")
    if result.get(NOTICE_KEY) == NOTICE:
        del result[NOTICE_KEY]
        if isinstance(settings, Mapping) and NOTICE_KEY in settings:
            result["quantization_config"] = {key: value for key, value in settings.items() if key != NOTICE_KEY}
            result[NOTICE_KEY] = settings[NOTICE_KEY]
    return result


def _wrong_name(model: Any, info: Mapping[str, Any]) -> str | None:
    """Tensors that are missing, unexpected or of a wrong shape, as transformers found them while it loaded the model."""
    settings = model.config.quantization_config
    verbatim = settings["verbatim"] if isinstance(settings, dict) else settings.verbatim
    for fault in ("missing", "mismatched", "unexpected"):
        keys = info.get(f"{fault}_keys") or ()
        names = sorted(str(key) for key in keys if fault != "unexpected" or key not in verbatim)
        if names:
            return f"{fault} tensor {names[0]!r} ({len(names)} in all)"
    return None


def _wrong_value(model: Any) -> str | None:
    """A tensor that is not finite, or damaged index data."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not all_finite(tensor):
            return f"tensor {name!r} holds NaN or infinite values"
    for name, module in model.named_modules():
        if isinstance(module, PACKED) and (damage := module.fault()):
            return f"{name}.{damage}"
    return None


def _new_config(model_type: str) -> Any:
    cls = packed_config_class(model_type)
    return object.__new__(cls)


def _new_model(model_type: str, architecture: str) -> Any:
    cls = packed_model_class(model_type, architecture)
    return object.__new__(cls)
