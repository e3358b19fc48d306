"""The matrices of a LoRA adapter in a folder, a layer at a time."""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.numerics.merge import Update
from paredown.compress.serving.adapter_config import INSTEAD, WEIGHTS, AdapterConfig

PREFIX = "base_model.model."  # of all names in an adapter's file
PARTS = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_B.bias": "bias"}


@dataclass(frozen=True)
class AdapterFiles:
    """What `config.folder` holds, by the names of the model's layers."""

    config: AdapterConfig

    @cached_property
    def layers(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Layer -> part -> shape. Raises PareError for a tensor that is no part of a plain LoRA pair, and for a lone one."""
        layers: dict[str, dict[str, tuple[int, ...]]] = {}
        with self._open() as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(map(re.escape, PARTS))})", key)
                if found is None:
                    raise PareError(
                        f"the adapter {self.config.folder} holds {key!r}, which is no part of a LoRA pair. {INSTEAD}"
                    )
                layers.setdefault(found[1], {})[PARTS[found[2]]] = tuple(file.get_slice(key).get_shape())
        for layer, parts in layers.items():
            if not {"up", "down"} <= parts.keys():
                raise PareError(f"the adapter {self.config.folder} holds one matrix alone of {layer}. Save it again.")
        if not layers:
            raise PareError(f"the adapter {self.config.folder} holds no tensors. Save it again.")
        return dict(sorted(layers.items()))

    def read(self, layer: str) -> tuple[Update, Tensor | None]:
        """A layer's update, float32, and what its bias gains (out,). Raises PareError for numbers that are not finite."""
        with self._open() as file:
            own = {PARTS[part]: file.get_tensor(f"{PREFIX}{layer}.{part}").float() for part in self._parts(layer)}
        if not all(bool(torch.isfinite(t).all()) for t in own.values()):
            raise PareError(
                f"the adapter's update of {layer} is not finite: it was saved from a training that diverged."
            )
        scale = self.config.scale(layer)
        return Update(own["up"] * scale, own["down"]), own["bias"] * scale if "bias" in own else None

    def sha256(self) -> str:
        """A digest of the file of the matrices."""
        with (self.config.folder / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _parts(self, layer: str) -> list[str]:
        return [part for part, name in PARTS.items() if name in self.layers[layer]]

    def _open(self) -> safe_open:
        path = self.config.folder / WEIGHTS
        try:
            return safe_open(path, "pt")
        except (SafetensorError, OSError) as fault:
            raise PareError(f"{path} cannot be read ({fault}). Save the adapter again.") from fault
