"""Tell the tables of transformers that choose a tokenizer or a processor by the model: a packed one like the dense one."""

from collections.abc import Iterable
from functools import cache
from typing import Any


def register_tokenizers(model_types: Iterable[str], prefix: str) -> None:
    """Let AutoTokenizer decide for the type `prefix + X` as for X wherever it goes by the model type's name."""
    from transformers.models.auto import tokenization_auto as tables
    from transformers.models.auto.auto_mappings import SPECIAL_MODEL_TYPE_TO_MODULE_NAME
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    for model_type in model_types:
        if (name := tables.TOKENIZER_MAPPING_NAMES.get(model_type)) is not None:
            tables.TOKENIZER_MAPPING_NAMES[prefix + model_type] = name
            # the tokenizer's class is looked for in the module of the type
            SPECIAL_MODEL_TYPE_TO_MODULE_NAME[prefix + model_type] = model_type_to_module_name(model_type)
        if model_type in tables.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
            tables.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(prefix + model_type)


def register_companions(dense: type[Any], packed: type[Any]) -> None:
    """Give the config class `packed` the tokenizer and the processors of the class `dense`."""
    for mapping in _mappings():
        if dense in mapping:
            enter(mapping, packed, mapping[dense])


def enter(mapping: Any, config: type[Any], value: Any) -> None:
    """Enter a config class of ours into a table of transformers, over what it has for it.

    Before version 5.19 its own `register` passes over classes with the `__module__` of transformers.
    """
    mapping.register(config, value, exist_ok=True)
    if mapping.get(config, None) is not value:
        mapping._extra_content[config] = value


@cache
def _mappings() -> tuple[Any, ...]:
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

    return (
        TOKENIZER_MAPPING, PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING, VIDEO_PROCESSOR_MAPPING, FEATURE_EXTRACTOR_MAPPING,
    )  # fmt: skip
