"""config.json as it is written: by transformers, and with the keys that older readers look for.

transformers 5 writes `rope_parameters` and `dtype`. transformers 4, llama.cpp and others read `rope_theta`, `rope_scaling`
and `torch_dtype`, and where these are missing take a default without a word.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from paredown.compress.checkpoint.companions import without_code

# of rotary embeddings, as configs of various families have named them
ROPE_KEYS = (
    "rope_theta", "rope_scaling", "rope_local_base_freq", "global_rope_theta", "local_rope_theta", "swa_rope_theta",
    "partial_rotary_factor", "rotary_pct", "rotary_emb_base", "rope_ratio", "rotary_dim",
)  # fmt: skip
OLD_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # of scaling, which older readers know too
OLD_NAMES = (("rope_theta", "partial_rotary_factor"), ("rotary_emb_base", "rotary_pct"))  # the second: GPT-NeoX
# of the base frequencies of full and of sliding attention: Gemma 3 and OLMo 3, ModernBERT
OLD_NESTED = (("rope_theta", "rope_local_base_freq"), ("global_rope_theta", "local_rope_theta"))
NESTED = ("full_attention", "sliding_attention")
NOT_SAVED = ("_name_or_path", "_commit_hash")

Settings = dict[str, Any]
OldKeys = Callable[[Mapping[str, Any]], Settings]  # from `rope_parameters` to old keys


def write_config_file(config: Any, folder: Path, original: Path, architecture: str) -> None:
    """Write a transformers config into `folder`, with old keys as the config.json `original` has them or as they follow.

    `architecture` is the name of the model class, where the config names none. Code is not named: none goes along.
    """
    config.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["architectures"] = written.get("architectures") or [architecture]
    old = json.loads(original.read_text(encoding="utf-8"))
    filled = _with_dtype(with_old_rope(config, _cleaned(without_code(written)), old))
    path.write_text(json.dumps(filled, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def with_old_rope(config: Any, settings: Settings, old: Mapping[str, Any]) -> Settings:
    """Settings with the old rope keys of the source's settings `old`, and with those that say what `rope_parameters` do.

    Which keys these are is tried: the class of `config` reads the same parameters from them alone. Where it reads some of
    them only, these are written too, unless it reads others with them.
    """
    wanted = _read_ropes(config, settings)
    if wanted is None or not any(wanted.values()):
        return settings
    given = _filled(settings, old, _nothing)
    styles = [*map(_flat, OLD_NAMES), *map(_nested, OLD_NESTED)]
    styles = sorted(styles, key=lambda style: not _says_all(config, settings, style))
    filled = [_filled(settings, old, style) for style in styles if _filled(settings, {}, style) != settings]
    return next((f for f in [*filled, given] if _read_ropes(config, f) == wanted), settings)


def _says_all(config: Any, settings: Settings, style: OldKeys) -> bool:
    """Whether the class reads base frequencies that are nobody's default from the old keys alone."""
    moved = _moved(settings)
    alone = _without(_filled(moved, {}, style), "rope_parameters")
    return _read_ropes(config, alone) == _read_ropes(config, moved)


def _moved(settings: Any) -> Any:
    """Settings with each base frequency changed, and no two alike."""
    if not isinstance(settings, dict):
        return settings
    moved = {key: _moved(value) for key, value in settings.items()}
    theta = settings.get("rope_theta")
    return {**moved, "rope_theta": theta + 1 + len(str(settings))} if isinstance(theta, int | float) else moved


def _nothing(parameters: Mapping[str, Any]) -> Settings:
    return {}


def _flat(names: tuple[str, str]) -> OldKeys:
    return lambda parameters: _old_form(parameters, *names)


def _nested(names: tuple[str, str]) -> OldKeys:
    """For different parameters of full and of sliding attention: older readers scale the first alone."""

    def keys(parameters: Mapping[str, Any]) -> Settings:
        full, sliding = (parameters.get(name) or {} for name in NESTED)
        old_full, theta = _old_form(full, names[0], "partial_rotary_factor"), sliding.get("rope_theta")
        return {**old_full, names[1]: theta} if old_full else {}

    return keys


def _old_form(parameters: Mapping[str, Any], theta: str, factor: str) -> Settings:
    """One set of parameters as its base frequency `theta`, the rotated share `factor` and `rope_scaling`; or nothing."""
    kind = parameters.get("rope_type", "default")
    if kind not in OLD_TYPES or parameters.get("rope_theta") is None:
        return {}
    outside = {"rope_theta": theta, "partial_rotary_factor": factor}
    scaling = {key: value for key, value in parameters.items() if key not in outside}
    keys = {name: parameters[key] for key, name in outside.items() if key in parameters}
    return {**keys, "rope_scaling": scaling if kind != "default" or len(scaling) > 1 else None}


def _filled(settings: Settings, old: Mapping[str, Any], style: OldKeys) -> Settings:
    """A config, and each config inside it, with old rope keys: those of the source, and those that follow."""
    parameters = settings.get("rope_parameters")
    keys = style(parameters) if isinstance(parameters, dict) else {}
    given = {key: old[key] for key in ROPE_KEYS if key in old}
    inner = {key: _filled(value, _inside(old, key), style) for key, value in _configs(settings)}
    return {**keys, **given, **settings, **inner}


def _without(settings: Settings, key: str) -> Settings:
    """A config, and each config inside it, without a key."""
    kept = {name: value for name, value in settings.items() if name != key}
    return {**kept, **{name: _without(value, key) for name, value in _configs(kept)}}


def _with_dtype(settings: Settings) -> Settings:
    """A config, and each config inside it, with `torch_dtype` beside `dtype`."""
    filled = {**settings, **{key: _with_dtype(value) for key, value in _configs(settings)}}
    return {**filled, "torch_dtype": filled["dtype"]} if isinstance(filled.get("dtype"), str) else filled


def _cleaned(settings: Settings) -> Settings:
    """A config, and each config inside it, without what says where it was read from."""
    kept = {key: value for key, value in settings.items() if key not in NOT_SAVED}
    return {**kept, **{key: _cleaned(value) for key, value in _configs(kept)}}


def _configs(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """The configs inside a config: of a multimodal model's parts."""
    yield from (
        (key, value)
        for key, value in settings.items()
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config"
    )


def _inside(old: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = old.get(key)
    return part if isinstance(part, dict) else {}


def _read_ropes(config: Any, settings: Settings) -> Settings | None:
    """All `rope_parameters` as the class of `config` reads the settings; None where it refuses them."""
    try:
        return _ropes(type(config).from_dict(config._decode_special_floats(deepcopy(settings))).to_dict())
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _ropes(settings: Settings, path: str = "") -> Settings:
    """The `rope_parameters` of a config and of those inside it, by where they stand."""
    ropes = {path: settings.get("rope_parameters")}
    for key, value in _configs(settings):
        ropes |= _ropes(value, f"{path}{key}.")
    return ropes
