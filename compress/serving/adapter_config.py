"""What the folder of a LoRA adapter of peft says of it: adapter_config.json. Imports neither torch nor peft."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paredown.compress.errors import PareError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# ways to begin that leave the weight below the adapter as it is
STARTS: tuple[bool | str, ...] = (True, False, "gaussian", "orthogonal")
# what makes of a pair more than a low-rank sum, by the key of the config
VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "velora_config", "monteclora_config", "arrow_config",
    "kasa_config",
)  # fmt: skip
# and what an adapter may hold beside the pairs of linear layers
BESIDE = ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication")
INSTEAD = "Export the checkpoint with: paredown export OUT -o NEW --format dense, and merge there by peft."


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter: its folder, the model that it names as its base, and the scale of its updates."""

    folder: Path
    base: str  # as peft wrote it: often a folder of another machine
    rank: int
    alpha: float
    ranks: Mapping[str, int]  # by pattern of the names of layers, as peft reads these
    alphas: Mapping[str, float]
    rslora: bool  # the scale is alpha / sqrt(rank)

    def scale(self, layer: str) -> float:
        """By which the product of a layer's two matrices is multiplied."""
        rank, alpha = _by_pattern(self.ranks, layer, self.rank), _by_pattern(self.alphas, layer, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_config(folder: Path) -> AdapterConfig:
    """Raises PareError if the folder holds no LoRA adapter, or one that is more than a low-rank sum of linear layers."""
    path = folder.expanduser() / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PareError(
            f"{folder} holds no {CONFIG}: name the folder that peft's save_pretrained wrote, with --adapter."
        ) from None
    except (OSError, ValueError, RecursionError) as fault:
        raise PareError(f"{path} cannot be read ({fault}). Save the adapter again.") from fault
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        found = raw.get("peft_type") if isinstance(raw, dict) else raw
        raise PareError(f"{path}: peft_type is {found!r:.60}, and only LORA adapters can be merged.")
    check_plain(raw, "the adapter")
    if beside := [key for key in BESIDE if raw.get(key)]:
        raise PareError(f"the adapter has {beside[0]}, and only pairs of linear layers can be merged. {INSTEAD}")
    if raw.get("bias", "none") != "none":
        raise PareError(
            f"the adapter trains the model's own biases (bias={raw['bias']!r}); wanted is 'none'. {INSTEAD}"
        )
    if not (folder.expanduser() / WEIGHTS).is_file():
        raise PareError(f"{folder} has no {WEIGHTS}. Save the adapter with: model.save_pretrained(FOLDER)")
    try:
        return AdapterConfig(
            folder.expanduser(),
            str(raw.get("base_model_name_or_path") or ""),
            int(raw["r"]),
            float(raw["lora_alpha"]),
            dict(raw.get("rank_pattern") or {}),
            dict(raw.get("alpha_pattern") or {}),
            bool(raw.get("use_rslora")),
        )
    except (KeyError, TypeError, ValueError) as fault:
        raise PareError(
            f"{path} does not say r and lora_alpha as peft does ({fault!r}). Save the adapter again."
        ) from fault


def check_plain(settings: Mapping[str, Any], who: str) -> None:
    """Raise PareError, naming the setting, for an adapter that is more than a low-rank sum."""
    if (start := settings.get("init_lora_weights", True)) not in STARTS:
        raise PareError(
            f"init_lora_weights={start!r} changes the weight below {who}. Wanted is one of {', '.join(map(repr, STARTS))}."
        )
    if found := [key for key in VARIANTS if settings.get(key)]:
        raise PareError(
            f"{who} has {found[0]}, which packed layers do not support: plain LoRA and use_rslora are. {INSTEAD}"
        )


def _by_pattern(patterns: Mapping[str, float], layer: str, usual: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), usual)
