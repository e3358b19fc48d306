"""LoRA of peft over a packed layer: needs peft."""

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn

from paredown.compress.errors import PareError
from paredown.compress.storage.modules import PackedConv1D, PackedLinear

STARTS = (True, False, "gaussian", "orthogonal")  # those that leave the weight below as it is


class PackedLora(Linear):  # type: ignore[misc]
    """Two small matrices, which are trained, beside a packed layer, which is not."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        if config.init_lora_weights not in STARTS:
            raise PareError(
                f"init_lora_weights={config.init_lora_weights!r} would change the packed weight below the adapter. "
                f"Wanted is one of {', '.join(map(repr, STARTS))}."
            )
        super().__init__(base_layer, adapter_name, config=config, **options)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        if isinstance(module, PackedConv1D):
            return module.nx, module.nf
        assert isinstance(module, PackedLinear)
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone: others, such as DoRA, read or change the weight below."""
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises PareError: a packed weight has no room for another one's sum."""
        raise PareError(
            "an adapter cannot be merged into packed weights. Export the checkpoint with: paredown export OUT -o NEW "
            "--format dense, then load NEW, apply the adapter to it and merge there."
        )


def register(config: LoraConfig) -> None:
    """Let this config adapt packed layers, by peft's mapping of classes of others, which it calls experimental."""
    config._register_custom_module({PackedLinear: PackedLora, PackedConv1D: PackedLora})
