"""What vLLM must know of a packed checkpoint before it builds the model: its config, and which layers hold packed weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform
from vllm.transformers_utils.config import HFConfigParser

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.packed_classes import QUANT_METHOD
from paredown.compress.checkpoint.quantizer import read_settings
from paredown.compress.serving.stream import Names
from paredown.compress.serving.vllm_linear import Matrix, PackedLinearMethod, SizedLinearMethod
from paredown.compress.storage.kinds import MASKS, kind_of
from paredown.compress.storage.shapes import Shapes
from paredown.compress.storage.spec import Spec

# layers that a loader of their own fills, row by row: their weights are unpacked
FILLED_OTHERWISE = ("in_proj", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z")


class PackedConfigParser(HFConfigParser):  # type: ignore[misc]
    """Gives a packed checkpoint the config of its dense family: vLLM asks for model types and architectures by name."""

    def parse(self, model: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """As of any config; ours keeps its `quantization_config`."""
        settings, config = super().parse(model, *args, **kwargs)
        if transformers_plugin.is_packed(config):
            packed, config = config, transformers_plugin.dense_config(config)
            config.name_or_path, config.dtype = packed.name_or_path, packed.dtype
        return settings, config


class PackedWeights(QuantizationConfig):  # type: ignore[misc]
    """The packed weights of a checkpoint, and the layers of this process that hold them."""

    def __init__(self, specs: Mapping[str, Spec], shapes: Shapes, verbatim: Sequence[str]) -> None:
        super().__init__()
        self.specs, self.shapes, self.verbatim = dict(specs), shapes, frozenset(verbatim)
        self.names = Names()
        self.mappers: list[WeightsMapper] = []
        self.held: dict[str, tuple[Matrix, int]] = {}  # by vLLM's name: a weight, and which of its layer's it is
        self.on_cpu = current_platform.is_cpu()
        self._known: tuple[int, dict[str, str]] = (-1, {})  # places, and of how many mappers they are

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedWeights":
        specs, shapes = read_settings(config)
        return cls(specs, shapes, config.get("verbatim") or [])

    @staticmethod
    def get_name() -> str:
        return QUANT_METHOD

    @staticmethod
    def get_supported_act_dtypes() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read how ordinary checkpoints of the family name their tensors, which is what vLLM's loaders expect."""
        self.names = Names.read(model_name, revision)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.mappers.append(hf_to_vllm_mapper)

    def place(self, name: str) -> str:
        """vLLM's name of a layer of ours."""
        full = f"{name}.weight"
        place = self.names.renamed.get(full, full).removesuffix(".weight")
        for mapper in self.mappers:
            place = next(iter(mapper.apply_list([place])), place)
        return place

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """For linear layers with packed weights or of their own sizes ours, for others vLLM's; None for what is no linear."""
        if not isinstance(layer, LinearBase):
            return None
        matrices = self._matrices(prefix)
        if any(m.spec is not None and self._stays_packed(m.spec) for m in matrices.values()):
            self.held |= {name: (matrix, index) for index, (name, matrix) in enumerate(matrices.items())}
            return PackedLinearMethod(list(matrices.values()), self.on_cpu)
        if any(m.sized for m in matrices.values()):
            return SizedLinearMethod([m.sized for m in matrices.values()])
        return UnquantizedLinearMethod()

    def _matrices(self, prefix: str) -> dict[str, Matrix]:
        """The weights of the checkpoint that a layer of vLLM's holds, in order, by vLLM's names; none if all are ordinary."""
        ours, (path, dot, leaf) = self._places(), prefix.rpartition(".")
        if leaf in FILLED_OTHERWISE:
            return {}
        # a layer that has a spec of its own comes joined from the checkpoint, as Phi-3's qkv_proj
        leaves = [leaf] if prefix in ours else self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{path}{dot}{name}" for name in leaves]
        return {name: self._matrix(ours.get(name, "")) for name in names} if any(n in ours for n in names) else {}

    def _places(self) -> dict[str, str]:
        """vLLM's name of each layer that is not as its config says -> ours."""
        if self._known[0] != len(self.mappers):
            sized = [name.removesuffix(".weight") for name in self.shapes.sizes]
            names = [name for name in [*self.specs, *sized] if f"{name}.weight" not in self.names.converted]
            self._known = len(self.mappers), {self.place(name): name for name in names}
        return self._known[1]

    def _matrix(self, name: str) -> Matrix:
        return Matrix(name, self.specs.get(name), self.shapes.sizes.get(f"{name}.weight"))

    def _stays_packed(self, spec: Spec) -> bool:
        """On a CPU there is no kernel for masks. A bias that the family's layers lack needs a layer of ours."""
        has_mask = any(kind_of(spec.kind).tensors.keys() >= mask.tensors.keys() for mask in MASKS.values())
        return spec.bias or not (self.on_cpu and has_mask)
