"""What a model class computes and no checkpoint has: rotary tables, masks, scales."""

from typing import Any

import torch
from torch import Tensor

from paredown.compress.errors import PareError

SMALL = 256 << 20  # bytes of computed buffers that any model may have


@torch.no_grad()
def fill_buffers(model: Any) -> None:
    """Compute the buffers of a model on `meta` that its checkpoints do not hold, as `from_pretrained` does.

    They are on CPU then. Raises PareError before it takes memory if they would be larger than the model itself.
    """
    buffers: dict[str, Tensor] = dict(model.named_non_persistent_buffers())
    weights: dict[str, Tensor] = model.state_dict(keep_vars=True)
    sizes = {name: t.numel() * t.itemsize for name, t in buffers.items()}
    if sum(sizes.values()) > max(SMALL, sum(t.numel() * t.itemsize for t in weights.values())):
        largest = max(sizes, key=lambda name: sizes[name])
        raise PareError(
            f"a model of this config computes tables of {sum(sizes.values()) / 1e9:.1f} GB, more than its weights; the "
            f"largest is {largest} {list(buffers[largest].shape)}. Is a length in config.json too large?"
        )
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    for weight in weights.values():  # which a class's initialisation leaves alone then
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()
