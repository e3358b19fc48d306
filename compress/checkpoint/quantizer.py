"""The plugin by which transformers reads packed weights: it swaps our modules in before it loads them."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from paredown.compress.checkpoint.packed_classes import QUANT_METHOD, PackedModel
from paredown.compress.errors import PareError
from paredown.compress.storage.fuse import fuse
from paredown.compress.storage.install import install, read_specs
from paredown.compress.storage.kinds import FORMAT_VERSION
from paredown.compress.storage.shapes import Shapes
from paredown.compress.storage.spec import Spec, told
from paredown.compress.storage.unpacked import align, keep_unpacked


def read_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Spec], Shapes]:
    """The packed weights that a `quantization_config` names, and the sizes and absent modules that it tells.

    Raises PareError for another format than ours, for settings that are not of that form, and for a damaged spec.
    """
    version = settings.get("version", 0)
    if version != FORMAT_VERSION:
        newer = isinstance(version, int | float) and version > FORMAT_VERSION
        advice = "upgrade paredown" if newer else "compress the model again"
        raise PareError(f"this checkpoint has format {version}, and this paredown reads {FORMAT_VERSION}: {advice}.")
    modules, verbatim = settings.get("modules"), settings.get("verbatim") or []
    if not isinstance(modules, Mapping):
        raise PareError(_damaged("modules", "a table of packed weights", modules))
    if not isinstance(verbatim, list) or not all(isinstance(name, str) for name in verbatim):
        raise PareError(_damaged("verbatim", "a list of names", verbatim))
    return read_specs(modules), Shapes.from_json(settings)


def _damaged(key: str, wanted: str, found: object) -> str:
    return (
        f"quantization_config.{key} in config.json is {told(found)}, wanted is {wanted}: "
        "config.json is damaged. Fetch the checkpoint again."
    )


@register_quantization_config(QUANT_METHOD)
class PackedWeightsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`modules`: spec of each packed weight by name; `verbatim`: tensors of the files that the model class lacks.

    And `sizes` and `absent` where the model is not all as its config says: see `storage.shapes`.
    """

    def __init__(self, **settings: Any) -> None:
        _, shapes = read_settings(settings)
        self.quant_method, self.version = QUANT_METHOD, FORMAT_VERSION
        self.modules, self.verbatim = settings["modules"], settings.get("verbatim") or []
        self.__dict__.update(shapes.to_json())


@register_quantizer(QUANT_METHOD)
class PackedWeightsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Gives the model its own shapes, and swaps the packed modules in, while it is on `meta`."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        if not issubclass(type(model), PackedModel):
            raise PareError(
                f"{type(model).__name__} cannot load a packed checkpoint: it would fill tensors that are missing with random "
                "numbers. Load it with AutoModelForCausalLM.from_pretrained."
            )
        modules, shapes = read_settings(vars(self.quantization_config))
        shapes.apply(model)
        install(model, modules)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        _compute_as_dense(model)
        align(model)
        fuse(model)
        keep_unpacked(model)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def _compute_as_dense(model: Any) -> None:
    """Mamba's mixers use `dt_proj` as a bare matrix, and in a model that is marked as quantised round it otherwise. It is
    never packed: without the mark they compute what the dense model does."""
    if any("dt_proj" in module._modules for module in model.modules()):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
