"""Reads a packed checkpoint into vLLM's model: the family's own loader, given ordinary tensors, and probes of packed ones."""

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import PPMissingLayer, is_pp_missing_parameter

from paredown.compress.errors import PareError
from paredown.compress.serving.probes import probe
from paredown.compress.serving.stream import Tensors, Unpacking
from paredown.compress.serving.vllm_config import PackedWeights
from paredown.compress.serving.vllm_linear import PLAIN
from paredown.compress.storage.shapes import Absent

logger = logging.getLogger("vllm.paredown")  # vLLM configures its own loggers only


class PackedLoader(DefaultModelLoader):  # type: ignore[misc]
    """As vLLM's, for checkpoints that are not ours. Of ours every tensor must come, and none that is unknown."""

    packed: PackedWeights | None = None

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """As vLLM's."""
        quant_config = vllm_config.quant_config
        self.packed = quant_config if isinstance(quant_config, PackedWeights) else None
        if self.packed is not None:
            self.enable_weights_track = True
        model: nn.Module = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        return model

    def create_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """As vLLM's, without the modules that the checkpoint says are absent."""
        model: nn.Module = super().create_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        if self.packed is not None:
            layers = vllm_config.compilation_config.static_forward_context
            for name in self.packed.shapes.absent:
                _remove(model, self.packed.place(name), layers)
        return model

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The tensors of an ordinary checkpoint."""
        weights = super().get_all_weights(model_config, model)
        if self.packed is None:
            yield from weights
            return
        packed, held = self.packed, set[str]()

        def hold(name: str, tensors: Tensors, added_bias: Tensor | None) -> Tensor | None:
            place = packed.place(name)
            if is_pp_missing_parameter(f"{place}.weight", model):
                return next(iter(tensors.values()))  # another process has this layer
            if place not in packed.held:
                return None
            matrix, index = packed.held[place]
            matrix.tensors, matrix.added_bias = dict(tensors), added_bias
            held.add(name)
            return probe(index, *matrix.shape)

        yield from Unpacking(packed.specs, packed.verbatim, packed.names, model_config.hf_config, hold)(weights)
        kept = len(held & packed.specs.keys())
        logger.info(
            "paredown: %d packed weights are used packed, %d were unpacked while they were read%s",
            kept,
            len(packed.specs) - kept,
            " (there is no kernel for masks on a CPU)" if packed.on_cpu and kept < len(packed.specs) else "",
        )


def _remove(model: nn.Module, name: str, layers: dict[str, Any]) -> None:
    """Put zeros in the place of a module, and take back what its attention has registered for a cache of its own."""
    path, _, leaf = name.rpartition(".")
    parent = dict(model.named_modules()).get(path)
    if isinstance(parent, PPMissingLayer):
        return
    if parent is None or leaf not in parent._modules:
        raise PareError(f"{type(model).__name__} has no module {name!r}, which the checkpoint says is absent. {PLAIN}")
    for own in [layer for layer in layers if layer.startswith(f"{name}.")]:
        del layers[own]
    parent._modules[leaf] = Silent(None)


class Silent(Absent):
    """Of vLLM's modules, which take positions first and return a bare tensor."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros like the hidden states."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[-1]
        return super().forward(hidden)
