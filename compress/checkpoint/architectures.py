"""Which class of transformers holds the model of a config, and a sentence for every model that is no language model."""

from collections.abc import Iterator
from typing import Any

from paredown.compress.errors import PareError

# what the last part of a class's name says of its models
OTHER_HEADS = {
    "ForSequenceClassification": "a classifier or reward model: its last layer gives scores, not tokens",
    "ForTokenClassification": "a classifier of tokens",
    "ForMultipleChoice": "a classifier",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMaskedLM": "a model that fills gaps in a text, not one that continues it",
    "ForPreTraining": "a model with the heads of its pre-training",
    "RewardModel": "a reward model: its last layer gives scores, not tokens",
    "ForImageClassification": "a vision model",
    "ForCTC": "a speech recogniser",
}
# tables of transformers (the part of their name before _MAPPING_NAMES), and what their models are
OTHER_TASKS = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM": "encoder-decoder models",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ": "encoder-decoder models for speech",
    "MODEL_FOR_MASKED_LM": "encoders: they fill gaps in a text and do not continue it",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION": "models that compare images with texts",
    "MODEL_FOR_IMAGE_CLASSIFICATION": "vision models without text",
    "MODEL_FOR_CTC": "speech recognisers",
    "MODEL_FOR_AUDIO_CLASSIFICATION": "audio models without text",
    "MODEL_FOR_TEXT_TO_WAVEFORM": "models that write sound",
    "MODEL_FOR_OBJECT_DETECTION": "vision models without text",
}
WANTED = (
    "paredown compresses models that continue a text: decoder-only language models, and those inside multimodal ones."
)


def model_class(config: Any) -> type[Any]:
    """The class that config.json's `architectures` names, or the one that transformers has for such a config.

    Raises PareError, saying what the model is, if it is no causal language model and none with images or sound beside
    the text.
    """
    found = list(candidates(config))
    named = dense_names(config)
    match = next((cls for cls in found if cls.__name__ in named), None)
    if config.is_encoder_decoder and match not in causal(config):
        raise PareError(f"{config.model_type} is an encoder-decoder model: {_first(named)}{WANTED}")
    if not found:
        raise PareError(f"{config.model_type} models are {_task(config.model_type)}. {WANTED}")
    if match is not None:
        return match
    if head := next((what for name in named for end, what in OTHER_HEADS.items() if name.endswith(end)), None):
        raise PareError(f"config.json names {named[0]}, {head}. {WANTED}")
    # a text model and a multimodal one may share a config: the config is then of the multimodal one
    return next((cls for cls in found if cls.config_class is type(config)), found[0])


def candidates(config: Any) -> Iterator[type[Any]]:
    """The classes that continue a text and take such a config (or config class); first that of AutoModelForCausalLM."""
    config_class = config if isinstance(config, type) else type(config)
    for mapping in _mappings():
        yield from _classes(mapping, config_class)


def causal(config: Any) -> list[type[Any]]:
    """Those among `candidates` that AutoModelForCausalLM makes."""
    return _classes(_mappings()[0], type(config))


def auto_class(config: Any) -> Any:
    """The class of transformers, AutoModelForCausalLM or another, whose `from_pretrained` gives `model_class(config)`."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    autos = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    wanted = model_class(config)
    return next(auto for auto in autos if wanted in _classes(auto._model_mapping, type(config)))


def dense_names(config: Any) -> list[str]:
    """`architectures` of config.json, as the family's own checkpoints name them."""
    names = getattr(config, "architectures", None)
    return [name.removeprefix("Packed") for name in names or () if isinstance(name, str)] if names else []


def model_types() -> list[str]:
    """All model types whose models `model_class` can give."""
    from transformers.models.auto import modeling_auto as tables

    names = (
        tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        tables.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    return list(dict.fromkeys(model_type for table in names for model_type in table))


def _mappings() -> tuple[Any, ...]:
    from transformers.models.auto import modeling_auto as tables

    return (
        tables.MODEL_FOR_CAUSAL_LM_MAPPING,
        tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        tables.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )


def _classes(mapping: Any, config_class: type[Any]) -> list[type[Any]]:
    found = mapping.get(config_class, None)
    return [cls for cls in (found if isinstance(found, list | tuple) else [found]) if cls is not None]


def _first(names: list[str]) -> str:
    return f"config.json names {names[0]}. " if names else ""


def _task(model_type: str) -> str:
    from transformers.models.auto import modeling_auto as tables

    for table, what in OTHER_TASKS.items():
        if model_type in getattr(tables, f"{table}_MAPPING_NAMES"):
            return what
    return "no language models that transformers can let continue a text"
