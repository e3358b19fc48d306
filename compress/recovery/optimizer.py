"""The optimizers that a recovery has, and their states as tensors, from which training goes on to the same numbers.

`adamw` is torch's (Loshchilov & Hutter 2019, arXiv 1711.05101). `adamw8bit` is that of bitsandbytes, whose two moments take a
byte each, in blocks of 256 numbers with a scale of their own (Dettmers et al. 2022, arXiv 2110.02861); those of tensors with
fewer than 4,096 numbers stay in float32.
"""

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from paredown.compress.errors import PareError

Kind = Literal["adamw", "adamw8bit"]
BETAS = (0.9, 0.95)  # steps are few
MOMENT_BYTES: dict[Kind, int] = {"adamw": 8, "adamw8bit": 2}  # of a trained number; the scales of 8 bits are left out
PACKAGE = "bitsandbytes"


def make(kind: Kind, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Over groups of tensors whose gradients the caller sets; each group gets its learning rate before a step."""
    if kind == "adamw":
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=BETAS, weight_decay=0.0)
    return optimizer


def check_optimizer(kind: Kind, device: torch.device) -> None:
    """Raise PareError if it is not installed, or takes no step on the device."""
    if kind == "adamw":
        return
    advice = "Type: pip install 'bitsandbytes>=0.50', or leave recover: distill.optimizer at adamw."
    if find_spec(PACKAGE) is None:
        raise PareError(f"optimizer: adamw8bit needs the package {PACKAGE}, which is not installed. {advice}")
    tensor = torch.zeros(1 << 13, device=device)
    tensor.grad = torch.ones_like(tensor)
    try:
        make(kind, [{"params": [tensor]}]).step()
    except Exception as fault:  # each release refuses a device in a way of its own
        what = f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"
        raise PareError(
            f"{PACKAGE} {version(PACKAGE)} takes no step on the device {device.type} ({what}). {advice}"
        ) from fault


def saved(optimizer: torch.optim.Optimizer, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All that it knows of the masters, as tensors `optimizer/KEY/NAME`; a whole number as an int64."""
    return {
        f"optimizer/{key}/{name}": torch.as_tensor(value)
        for name, master in masters.items()
        for key, value in optimizer.state.get(master, {}).items()
    }


def restore(optimizer: torch.optim.Optimizer, masters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """The tensors KEY/NAME of what `saved` gave, copied to where the masters are, in the place of all that it knows."""
    optimizer.state.clear()
    for full, value in tensors.items():
        key, _, name = full.partition("/")
        master, whole = masters[name], value.dim() == 0 and value.dtype == torch.int64
        optimizer.state.setdefault(master, {})[key] = value.item() if whole else value.to(master.device, copy=True)
