"""A Hugging Face model as a config, a skeleton without weights, and safetensors that are read when they are needed."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paredown.compress.checkpoint import bitmask_import, transformers_plugin
from paredown.compress.checkpoint.configs import load_config, stored_dtype
from paredown.compress.checkpoint.hub import COMPANIONS
from paredown.compress.checkpoint.skeleton import skeleton
from paredown.compress.checkpoint.tensor_files import Entry, TensorFiles
from paredown.compress.errors import PareError
from paredown.compress.storage.spec import Spec

# files that we write ourselves, that describe the old weights, or that are no plain data
NOT_COMPANIONS = ("config.json", "*.index.json", "paredown.json", "report.json", "*.safetensors", "*.py", "*.bin")


@dataclass(frozen=True)
class Origin:
    """The tensors of the checkpoint that a weight of the model class is made of."""

    keys: tuple[str, ...]  # their names in the checkpoint
    converter: Any | None = None  # transformers' WeightConverter, where it takes more than another name
    patterns: tuple[str, ...] = ()  # of the converter, one per key


class Part(Protocol):
    """A part of a model, such as a block: the weights `prefix + name` for each of `names`."""

    @property
    def prefix(self) -> str: ...
    @property
    def names(self) -> Sequence[str]: ...


@dataclass
class ModelSource:
    """One model in a local folder: `model` is its skeleton on `meta`, `read` gives weights by the skeleton's names.

    `dtype` is the dtype that weights get in the skeleton, by default the stored one. A packed checkpoint of ours is read
    like any other: its skeleton holds our packed modules. Raises PareError if the folder holds no causal language model,
    one quantised by another tool, or one with weights missing.
    """

    folder: Path
    id: str
    revision: str | None = None
    dtype: torch.dtype | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stranded: bool = False  # also read the formats that compressed-tensors removed, as if they were dense

    def __post_init__(self) -> None:
        self.files = TensorFiles(self.folder)
        self.config = load_config(self.folder)
        if self.stranded:
            self.config, self.files = bitmask_import.as_dense(self.config, self.files)
        self.modules: dict[str, Spec] = transformers_plugin.packed_modules(self.config)
        self.dtype = self.dtype or stored_dtype(self.config, self.files.entries)
        self.model = skeleton(self.config, self.modules, self.dtype)
        for (
            module
        ) in self.model.modules():  # rotary tables and the like, which the class computes: no checkpoint has them
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(self.device)
        self._check()

    @property
    def family(self) -> str:
        """The transformers model type of the dense model (`llama`, ...)."""
        return transformers_plugin.dense_model_type(self.config.model_type)

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """All weights of the skeleton by name, tied ones once, on `meta`."""
        return {name: t for name, t in self.model.state_dict().items() if name not in self.tied}

    @cached_property
    def tied(self) -> dict[str, str]:
        """Name of each tied weight -> name of the weight that it shares."""
        return dict(self.model.all_tied_weights_keys)

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """Name of each weight -> its tensors in the checkpoint. Weights that are slices of one tensor share an origin."""
        return dict(_origins(self.model, self.files.entries, self.parameters, converted=not self.modules))

    @cached_property
    def verbatim(self) -> list[str]:
        """Names in the checkpoint that the model class does not know (extra heads, old buffers): they are copied."""
        used = {key for origin in self.origins.values() for key in origin.keys}
        return sorted(key for key in self.files.entries if key not in used and not self._repeats_tied(key))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The weights `names` of the skeleton, sorted by name, on CPU, in their stored dtypes.

        Raises PareError naming a tensor whose shape is not the skeleton's, or that is not finite.
        """
        weights: dict[str, Tensor] = {}
        ordered = sorted(set(names))  # so that every process writes them in the same order
        for name in ordered:
            if name not in weights:
                weights.update(self._convert(name, self.origins[name]))
        for name in ordered:
            if weights[name].shape != self.parameters[name].shape:
                raise PareError(
                    f"{self.folder}: tensor {name!r} has shape {tuple(weights[name].shape)}, config.json wants "
                    f"{tuple(self.parameters[name].shape)}. The weights and the config are not of the same model."
                )
        return {name: weights[name] for name in ordered}

    @contextmanager
    def loaded(self, block: Part) -> Iterator[None]:
        """While the `with` block runs, the weights of one block of the model are on the device, in the compute dtype.

        Then they are freed, whatever happens. By then the block must have its own modules again, if some were replaced.
        """
        try:
            self.materialise(block.prefix, block.names)
            yield
        finally:
            self.release(block.prefix, block.names)

    def materialise(self, prefix: str, names: Iterable[str]) -> None:
        """Put the weights `prefix + name` on the device and into the skeleton, in the compute dtype."""
        for name, tensor in self.read(prefix + name for name in names).items():
            dtype = self.dtype if tensor.is_floating_point() and not self._in_fp32(name) else tensor.dtype
            set_tensor(self.model, name, tensor.to(self.device, torch.float32 if self._in_fp32(name) else dtype))

    def release(self, prefix: str, names: Iterable[str]) -> None:
        """Free the weights `prefix + name`: the skeleton's are on `meta` again."""
        for name in names:
            set_tensor(self.model, prefix + name, self.parameters[prefix + name])

    def checkpoint_names(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `read`: the same weights under the names and in the layout of the checkpoint."""
        from transformers.core_model_loading import revert_weight_conversion

        used = {id(o.converter): o.converter for o in self.origins.values() if o.converter is not None}
        self.model._weight_conversions = list(used.values()) + self._renamings or None
        return revert_weight_conversion(self.model, dict(weights))  # type: ignore[no-any-return]

    @cached_property
    def _renamings(self) -> list[Any]:
        return [t for t in _transforms(self.model) if not hasattr(t, "operations") and t.was_used()]

    def companions(self) -> list[Path]:
        """The files of the model beside its weights and config: tokenizer, generation config, chat template, ..."""
        files = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path for path in files if not any(path.match(pattern) for pattern in NOT_COMPANIONS))

    def provenance(self) -> dict[str, Any]:
        """Which model this is, for paredown.json."""
        return {"id": self.id, "revision": self.revision, "tokenizer_sha256": self.tokenizer_sha256()}

    def tokenizer_sha256(self) -> str:
        """One digest of the names and contents of the tokenizer's files."""
        digest = hashlib.sha256()
        for path in self.companions():
            if "tokenizer" in path.name or path.name.startswith(("vocab", "merges", "special_tokens")):
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def _convert(self, name: str, origin: Origin) -> dict[str, Tensor]:
        tensors = self.files.read(origin.keys)
        if origin.converter is None:
            return {name: tensors[origin.keys[0]]}
        converter = deepcopy(origin.converter)
        for key, pattern in zip(origin.keys, origin.patterns, strict=True):
            converter.add_tensor(name, key, pattern, tensors[key])
        converted = converter.convert(name, model=self.model, config=self.model.config)
        return {target: t[0] if isinstance(t, list) else t for target, t in converted.items()}

    def _in_fp32(self, name: str) -> bool:
        """Whether the class keeps this weight in float32 whatever the dtype, as `from_pretrained` does."""
        patterns = set(self.model._keep_in_fp32_modules_strict or ())
        if self.dtype == torch.float16:
            patterns |= set(self.model._keep_in_fp32_modules or ())
        return any(re.search(rf"(^|\.){re.escape(p)}(\.|$)", name) for p in patterns)

    def _repeats_tied(self, key: str) -> bool:
        return key in self.tied or f"{self.model.base_model_prefix}.{key}" in self.tied

    def _check(self) -> None:
        missing = sorted(set(self.parameters) - set(self.origins))
        if missing:
            raise PareError(
                f"{self.folder}: {len(missing)} tensors of a {self.config.model_type} model are missing, first "
                f"{missing[0]!r}. The weights and config.json are not of the same model, or the download is incomplete."
            )


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace one parameter or buffer by `tensor`, without copying."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _transforms(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not hasattr(model, "_paredown_transforms"):
        model._paredown_transforms = get_model_conversion_mapping(model)
    return model._paredown_transforms  # type: ignore[no-any-return]


def _origins(
    model: Any, entries: dict[str, Entry], parameters: dict[str, Tensor], converted: bool
) -> Iterator[tuple[str, Origin]]:
    """Map the checkpoint's keys to weights with transformers' own renamings, without reading data.

    transformers >= 5 fuses the weights of experts while it loads: their keys become one Origin with the converter.
    """
    from transformers.core_model_loading import WeightConverter, rename_source_key

    if not converted:
        yield from ((name, Origin((name,))) for name in entries if name in parameters)
        return
    transforms = _transforms(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(entries, key=natural):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if pattern is not None:
            groups.setdefault(name, []).append((key, pattern))
        elif name in parameters:
            yield name, Origin((key,))
    for name, members in groups.items():
        keys, patterns = zip(*members, strict=True)
        origin = Origin(keys, by_pattern[patterns[0]], patterns)
        for target in _outputs(name, origin.converter, state):
            yield target, origin


def _outputs(name: str, converter: Any, state: dict[str, Tensor]) -> list[str]:
    """All weights that a converter gives, from the name of the first."""
    first = converter.target_patterns[0]
    return [t for p in converter.target_patterns if (t := name.replace(first, p)) in state] or [name]


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which `experts.10` follows `experts.9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
