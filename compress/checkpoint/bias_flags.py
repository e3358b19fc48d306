"""Settings of a config, such as `mlp_bias` or `attention_bias`, that give layers of its model a bias."""

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from paredown.compress.checkpoint.skeleton import skeleton
from paredown.compress.errors import PareError

NAMES = (
    "attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qkv_bias", "use_attention_bias", "add_bias_linear",
    "enable_bias", "mamba_proj_bias", "bias",
)  # fmt: skip


def with_biases(config: Any, layers: Collection[str]) -> tuple[Any, dict[str, Tensor]] | None:
    """The config of a dense model in which these layers, by full name, have a bias; None where its family has no setting.

    And all biases that such a model has and the config's own has not, by full name, on `meta`: those of further layers, and
    of `layers`, among them. Whether a setting does that and nothing else is tried, on models without weights.
    """
    wanted = {f"{name}.bias" for name in layers}
    text, before = config.get_text_config(), _weights(config)
    flags = [flag for flag in NAMES if getattr(text, flag, None) is False]
    useful = [flag for flag in flags if wanted & set(_gained(_with(config, [flag]), before) or ())]
    changed = _with(config, useful)
    gained = _gained(changed, before)
    return (changed, gained) if gained is not None and wanted <= set(gained) else None


def _gained(config: Any, before: Mapping[str, torch.Size]) -> dict[str, Tensor] | None:
    """The biases that a config adds to the weights `before`; None if it changes anything else."""
    try:
        model = skeleton(config, {}, torch.float32)
    except PareError:
        return None
    weights = model.state_dict()
    gained = {name: tensor for name, tensor in weights.items() if name not in before}
    same = all(name in weights and weights[name].shape == shape for name, shape in before.items())
    return gained if same and all(name.endswith(".bias") for name in gained) else None


def _weights(config: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in skeleton(config, {}, torch.float32).state_dict().items()}


def _with(config: Any, flags: Collection[str]) -> Any:
    changed = deepcopy(config)
    for flag in flags:
        setattr(changed.get_text_config(), flag, True)
    return changed
