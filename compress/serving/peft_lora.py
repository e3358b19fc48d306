"""LoRA of peft over a packed layer: needs peft."""

import warnings
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from paredown.compress.errors import PareError
from paredown.compress.numerics.merge import Update, merge_packed
from paredown.compress.serving.adapter_config import check_plain
from paredown.compress.storage.modules import PackedConv1D, PackedLinear


class PackedLora(Linear):  # type: ignore[misc]
    """Two small matrices, which are trained, beside a packed layer, which is not.

    Merged, the layer stores the sum in the form that it has: see `numerics.merge` for what that leaves out.
    """

    _before: dict[str, Tensor] | None = None  # what the layer stored before adapters were merged

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any) -> None:
        """Raises PareError for what is no plain LoRA."""
        check_plain(config.to_dict(), f"the adapter {adapter_name!r}")
        if config.lora_bias and self._layer.bias is None:
            raise PareError("lora_bias=True needs layers with a bias, and this one has none: a merge would lose it.")
        super().update_layer(adapter_name, r, lora_alpha, config, **options)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        if isinstance(module, PackedConv1D):
            return module.nx, module.nf
        assert isinstance(module, PackedLinear)
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone: others, such as DoRA, read or change the weight below."""
        return {(): None}

    @property
    def _layer(self) -> PackedLinear | PackedConv1D:
        return cast(PackedLinear | PackedConv1D, self.get_base_layer())

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add all adapters at once, so that a factored weight is factored anew but once; what it was stays for `unmerge`.

        Raises PareError for numbers that the layer's dtype cannot hold, whether `safe_merge` or not; nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        layer = self._layer
        old = {**layer.tensors(), **({} if layer.bias is None else {"bias": layer.bias})}
        update = Update.joined(
            [Update(self.lora_B[n].weight.float() * self.scaling[n], self.lora_A[n].weight.float()) for n in names]
        )
        new, _ = merge_packed(layer.spec, layer.tensors(), update)
        if any(self.lora_bias[name] for name in names):
            gained = [self.lora_B[n].bias.float() * self.scaling[n] for n in names if self.lora_bias[n]]
            new["bias"] = (old["bias"].float() + torch.stack(gained).sum(0)).to(old["bias"].dtype)
        self._before = self._before or old
        self._store(new)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """The layer stores what it stored before, to the last bit."""
        if self._before is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._store(self._before)
        self._before = None
        self.merged_adapters.clear()

    def _store(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            own = name in self._layer._parameters and not isinstance(tensor, nn.Parameter)
            setattr(self._layer, name, nn.Parameter(tensor, requires_grad=False) if own else tensor)


def register(config: LoraConfig) -> None:
    """Let this config adapt packed layers, by peft's mapping of classes of others, which it calls experimental."""
    config._register_custom_module({PackedLinear: PackedLora, PackedConv1D: PackedLora})
