"""config.json of a model folder: read without any code from the folder, and checked."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.config_sizes import check_sizes
from paredown.compress.checkpoint.tensor_files import INDEX, SINGLE, Entry
from paredown.compress.errors import PareError

MOST_BYTES = 256 << 20  # of a config.json; that of a packed model names every packed weight
MOST_TOLD = 300  # characters of another library's message
ROPE_NUMBERS = (
    "rope_theta", "factor", "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings",
)  # fmt: skip


def load_config(folder: Path, entries: Mapping[str, Entry] | None = None) -> Any:
    """config.json through transformers, without any code from the folder.

    `entries` are the tensors of the files, with which its sizes are compared before anything is built from them.
    Raises PareError if there is no config.json, if a value in it is of no use, or if transformers does not know its model
    type.
    """
    from transformers import AutoConfig, PreTrainedConfig

    transformers_plugin.register()
    path = folder / "config.json"
    settings = _settings(path)
    if entries is not None:
        check_sizes(path, settings, entries)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # a checkpoint must not choose code; experts run one by one, so that each can be observed
        config._attn_implementation = None
        config._experts_implementation = "eager"
        text = config.get_text_config()
    except Exception as fault:  # whatever a class does with a value that it did not expect
        raise PareError(_unreadable(path, settings, fault)) from fault
    if not isinstance(text, PreTrainedConfig):
        raise PareError(
            f"{path} holds settings of a text model inside those of a {config.model_type} model, which has none: "
            f"{str(text)[:MOST_TOLD]}"
        )
    return config


def only_logits(config: Any) -> Any:
    """A copy of a config whose model returns its logits by name and nothing beside, whatever the checkpoint asks for."""
    copy = deepcopy(config)
    for part in (copy, copy.get_text_config()):
        part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False
    return copy


def stored_dtype(config: Any, entries: Mapping[str, Entry]) -> torch.dtype:
    """As `from_pretrained(dtype="auto")`: the dtype in config.json, else that of the first floating-point tensor."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    floats = (e.dtype for e in entries.values() if e.dtype.is_floating_point)
    return next(floats, torch.float32)


def first_line(fault: BaseException) -> str:
    """Of its message, or of its repr where it has none; of a config's validation what was wrong with which field."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()] or [repr(fault)]
    line = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    line = line.removeprefix("TypeError: ").removeprefix("ValueError: ")
    return line if len(line) <= MOST_TOLD else line[:MOST_TOLD] + "..."


def explained(fault: BaseException, settings: Mapping[str, Any]) -> str:
    """The first line of a fault, its kind where that is needed to understand it, and the settings that it speaks of."""
    line = first_line(fault)
    spoken_of = [f"{k}: {v!r}" for k, v in settings.items() if isinstance(v, str) and len(v) > 1 and repr(v) in line]
    kind = "" if isinstance(fault, ValueError) or "StrictDataclass" in type(fault).__name__ else type(fault).__name__
    return (f"{kind}: {line}" if kind else line) + (f" ({', '.join(spoken_of[:3])})" if spoken_of else "")


def _settings(path: Path) -> dict[str, Any]:
    """config.json as it stands."""
    if not path.exists():
        raise PareError(f"{path.parent} has no config.json: it is not a Hugging Face model folder.")
    again = "Fetch the checkpoint again."
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise PareError(f"{path} is no file of settings: it is a folder, or too large. {again}")
        settings = json.loads(path.read_text(encoding="utf-8"))
    except PareError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError) as fault:
        raise PareError(f"{path} cannot be read as JSON ({first_line(fault)}). {again}") from fault
    if not isinstance(settings, dict):
        raise PareError(f"{path} holds a {type(settings).__name__}, and a mapping of settings is wanted. {again}")
    _check_settings(path, settings)
    return settings


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """What transformers does not check, though it decides what is read."""
    names = settings.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise PareError(
            f"{path} says architectures: {str(names)[:MOST_TOLD]}, and a list of names of classes is wanted."
        )
    for key in ("quantization_config", "compression_config"):
        if not isinstance(settings.get(key), dict | None):
            raise PareError(f"{path} says {key}: {str(settings[key])[:MOST_TOLD]}, and a mapping is wanted.")
    for key in ("rope_parameters", "rope_scaling"):
        for name, value in _leaves(settings.get(key)):
            if name in ROPE_NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float | None)):
                raise PareError(f"{path} says {key}.{name}: {str(value)[:MOST_TOLD]!r}, and a number is wanted.")
    single = (path.parent / SINGLE).is_file()
    weights = settings.get("transformers_weights")
    if weights is not None and weights != (SINGLE if single else INDEX):
        raise PareError(
            f"{path} names {str(weights)[:MOST_TOLD]!r} as the file of its weights (transformers_weights), and only "
            f"{SINGLE} or {INDEX} are read. Rename that file, and remove the key."
        )


def _leaves(settings: Any) -> Iterator[tuple[str, Any]]:
    """What a mapping holds, and the mappings in it: Gemma 3 has one for each kind of layer."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        yield key, value
        if isinstance(value, dict):
            yield from value.items()


def _blamed(config_class: Any, settings: Mapping[str, Any]) -> str | None:
    """The first key without which the config can be read."""
    for key in settings:
        with suppress(Exception):
            config_class.from_dict({name: value for name, value in settings.items() if name != key})
            return key
    return None


def _unreadable(path: Path, settings: Mapping[str, Any], fault: Exception) -> str:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = settings.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        told = explained(fault, settings)
        if "Field '" not in told and (key := _blamed(CONFIG_MAPPING[model_type], settings)):
            told = f"{key}: {str(settings[key])[:MOST_TOLD]!r} ({told})"
        return f"{path} cannot be read as the config of a {model_type} model: {told}"
    return (
        f"{path} is not of a model type that this transformers knows: {first_line(fault)} "
        "Upgrade transformers, or name another model."
    )
