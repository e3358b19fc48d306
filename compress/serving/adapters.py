"""Adapters of peft on packed layers."""

from typing import TYPE_CHECKING

from paredown.compress.errors import PareError

if TYPE_CHECKING:
    from peft import LoraConfig


def enable_peft(config: "LoraConfig") -> "LoraConfig":
    """Let a LoRA config adapt packed layers too, and return it: `get_peft_model(model, enable_peft(LoraConfig(...)))`.

    Name the layers in `target_modules`: peft's "all-linear" does not see packed ones. peft saves nothing of this with an
    adapter: `PeftModel.from_pretrained(model, folder, config=enable_peft(LoraConfig.from_pretrained(folder)))` loads it.
    `merge_and_unload` leaves packed layers packed: a mask multiplies the update, factors are computed anew at their rank.
    Dense layers are merged as peft does, zeros or not. Raises PareError if peft is not installed.
    """
    try:
        from paredown.compress.serving.peft_lora import register
    except ModuleNotFoundError as fault:
        raise PareError("LoRA on packed layers needs peft. Install it with: pip install 'peft>=0.21,<0.22'") from fault
    register(config)
    return config
