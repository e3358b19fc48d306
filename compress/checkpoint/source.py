"""A Hugging Face model as a config, a skeleton without weights, and lazily read safetensors."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.checkpoint import bitmask_import, transformers_plugin
from paredown.compress.checkpoint.tensor_files import Entry, TensorFiles
from paredown.compress.errors import PareError
from paredown.compress.storage.modules import install

# everything a model folder holds beside its weights; never python files, never pickles
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "tokenizer*")
# written anew by us, or describing weights that are no longer there
NOT_COMPANIONS = ("config.json", "*.index.json", "paredown.json", "report.json", "*.safetensors", "*.py", "*.bin")


@dataclass(frozen=True)
class Origin:
    """Where the tensors of one converter of the model class come from in the checkpoint."""

    keys: tuple[str, ...]
    converter: Any | None = None  # transformers' WeightConverter, when names alone do not map one to one
    patterns: tuple[str, ...] = ()


@dataclass
class ModelSource:
    """One model in a local folder: `model` is its skeleton on `meta`, `read` fetches weights by the skeleton's names.

    A packed checkpoint of ours is read like any other: its skeleton holds our packed modules.
    """

    folder: Path
    id: str
    revision: str | None = None
    dtype: torch.dtype | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stranded: bool = False  # read compressed-tensors' removed formats too, as if they were dense

    def __post_init__(self) -> None:
        self.files = TensorFiles(self.folder)
        self.config = load_config(self.folder)
        if self.stranded:
            self.config, self.files = bitmask_import.as_dense(self.config, self.files)
        self.modules: dict[str, Any] = transformers_plugin.packed_modules(self.config)
        self.dtype = self.dtype or stored_dtype(self.config, self.files.entries)
        self.model = skeleton(self.config, self.modules, self.dtype)
        for module in self.model.modules():  # rotary tables and the like: not in the checkpoint, computed by the class
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
        """All weights of the skeleton by name, tied ones once: on meta, with their shapes."""
        return {name: t for name, t in self.model.state_dict().items() if name not in self.tied}

    @cached_property
    def tied(self) -> dict[str, str]:
        """Name of a tied weight -> the weight that it repeats."""
        return dict(self.model.all_tied_weights_keys)

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """Name of a weight -> where it comes from. Several names may share one origin (a tensor that is split)."""
        return dict(_origins(self.model, self.files.entries, self.parameters, converted=not self.modules))

    @cached_property
    def verbatim(self) -> list[str]:
        """Checkpoint keys that the model class does not know (extra heads, old buffers): copied as they are."""
        used = {key for origin in self.origins.values() for key in origin.keys}
        return sorted(key for key in self.files.entries if key not in used and not self._repeats_tied(key))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Weights by the skeleton's names, in their order, on CPU, as stored (shapes checked).

        Raises PareError naming the tensor: missing, of a wrong shape, or not finite.
        """
        weights: dict[str, Tensor] = {}
        wanted = sorted(set(names))  # so that every process writes them alike
        for name in wanted:
            if name not in weights:
                weights.update(self._convert(name, self.origins[name]))
        for name in wanted:
            if weights[name].shape != self.parameters[name].shape:
                raise PareError(
                    f"{self.folder}: tensor {name!r} has shape {tuple(weights[name].shape)}, config.json wants "
                    f"{tuple(self.parameters[name].shape)}. The weights and the config are not of the same model."
                )
        return {name: weights[name] for name in wanted}

    def materialise(self, prefix: str, names: Iterable[str]) -> None:
        """Put the weights `prefix + name` on the device and into the skeleton, in the compute dtype."""
        for name, tensor in self.read(prefix + name for name in names).items():
            dtype = self.dtype if tensor.is_floating_point() and not self._in_fp32(name) else tensor.dtype
            set_tensor(self.model, name, tensor.to(self.device, torch.float32 if self._in_fp32(name) else dtype))

    def release(self, prefix: str, names: Iterable[str]) -> None:
        """Drop weights from memory: back to meta."""
        for name in names:
            set_tensor(self.model, prefix + name, self.parameters[prefix + name])

    def checkpoint_names(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `read`: the same weights under the names and in the layout of the original checkpoint."""
        from transformers.core_model_loading import revert_weight_conversion

        used = {id(o.converter): o.converter for o in self.origins.values() if o.converter is not None}
        self.model._weight_conversions = list(used.values()) + self._renamings or None
        return revert_weight_conversion(self.model, dict(weights))  # type: ignore[no-any-return]

    @cached_property
    def _renamings(self) -> list[Any]:
        return [t for t in _transforms(self.model) if not hasattr(t, "operations") and t.was_used()]

    def companions(self) -> list[Path]:
        """Tokenizer, generation config, chat template: files that belong to the model beside its weights."""
        named = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path for path in named if not any(path.match(pattern) for pattern in NOT_COMPANIONS))

    def provenance(self) -> dict[str, Any]:
        """Where the weights came from, as paredown.json holds it."""
        return {"id": self.id, "revision": self.revision, "tokenizer_sha256": self.tokenizer_sha256()}

    def tokenizer_sha256(self) -> str:
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
        made = converter.convert(name, model=self.model, config=self.model.config)
        return {target: t[0] if isinstance(t, list) else t for target, t in made.items()}

    def _in_fp32(self, name: str) -> bool:
        """Weights that the class keeps in float32 whatever the dtype (as `from_pretrained` does)."""
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


def load_config(folder: Path) -> Any:
    """config.json through transformers, without any code from the folder."""
    from transformers import AutoConfig

    transformers_plugin.register()
    if not (folder / "config.json").exists():
        raise PareError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as fault:
        raise PareError(
            f"{folder / 'config.json'} is not of a model type that this transformers knows: {first_line(fault)} "
            "Upgrade transformers, or name another model."
        ) from fault
    # keys that choose code never come from a checkpoint; experts run one by one so that each can be observed
    config._attn_implementation = None
    config._experts_implementation = "eager"
    return config


def skeleton(config: Any, modules: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model class with every parameter on `meta` and every computed buffer real; packed modules installed."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    dense = transformers_plugin.dense_config(config) if modules else config
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(dense, dtype=dtype, trust_remote_code=False)
    except ValueError as fault:
        raise PareError(f"{config.model_type} models are no causal language models: {first_line(fault)}") from fault
    with torch.device("meta"):
        install(model, modules)
    return model.eval().requires_grad_(False)


def stored_dtype(config: Any, entries: dict[str, Entry]) -> torch.dtype:
    """As `from_pretrained(dtype="auto")`: what config.json says, else the first floating tensor of the checkpoint."""
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    floats = (e.dtype for e in entries.values() if e.dtype.is_floating_point)
    return next(floats, torch.float32)


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace one parameter or buffer by `tensor`, without copying."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def first_line(fault: BaseException) -> str:
    return (str(fault).strip() or repr(fault)).splitlines()[0]


def _transforms(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not hasattr(model, "_paredown_transforms"):
        model._paredown_transforms = get_model_conversion_mapping(model)
    return model._paredown_transforms  # type: ignore[no-any-return]


def _origins(
    model: Any, entries: dict[str, Entry], parameters: dict[str, Tensor], converted: bool
) -> Iterator[tuple[str, Origin]]:
    """Run transformers' own renamings over the checkpoint's keys, without reading data.

    transformers >= 5 fuses per-expert weights while loading: such a group of keys becomes one Origin with its converter.
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
        for target in _targets(name, origin.converter, state):
            yield target, origin


def _targets(name: str, converter: Any, state: dict[str, Tensor]) -> list[str]:
    """All parameters that one converter fills, given the first."""
    first = converter.target_patterns[0]
    return [t for p in converter.target_patterns if (t := name.replace(first, p)) in state] or [name]


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which `experts.10` follows `experts.9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
