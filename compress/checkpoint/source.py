"""A Hugging Face model as a config, a skeleton without weights, and safetensors that are read when they are needed."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paredown.compress.checkpoint import bitmask_import, companions, transformers_plugin
from paredown.compress.checkpoint.configs import load_config, only_logits, stored_dtype
from paredown.compress.checkpoint.leftovers import find_leftovers
from paredown.compress.checkpoint.origins import Origin, check_shapes, find_origins, reverted, transforms_of
from paredown.compress.checkpoint.purpose import check_purpose
from paredown.compress.checkpoint.skeleton import skeleton
from paredown.compress.checkpoint.tensor_files import INDEX, SINGLE, TensorFiles
from paredown.compress.checkpoint.ties import settle_ties
from paredown.compress.errors import PareError
from paredown.compress.storage.shapes import Shapes
from paredown.compress.storage.spec import Spec


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
        self.config = load_config(self.folder, self.files.entries)
        if self.stranded:
            self.config, self.files = bitmask_import.as_dense(self.config, self.files)
        self.modules: dict[str, Spec]
        self.shapes: Shapes  # what in the model is not as the config says
        self.modules, self.shapes = transformers_plugin.packed_parts(self.config)
        self.dtype = self.dtype or stored_dtype(self.config, self.files.entries)
        for name in self.config.sub_configs:
            if (part := getattr(self.config, name, None)) is not None:
                part.dtype = self.dtype  # as `from_pretrained` does
        self.model = skeleton(only_logits(self.config), self.modules, self.dtype, self.shapes)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":  # computed by the class: no checkpoint has it
                    module._buffers[name] = buffer.to(self.device)
        self._find_weights()

    def _find_weights(self) -> None:
        """Where each weight lies in the files. Raises PareError if the files and config.json contradict each other."""
        found = find_origins(self.model, self.files.entries, converted=not self.packed)
        self.origins: dict[str, Origin] = found.of
        purpose = check_purpose(self.model, self.config.architectures, found.of, list(found.unknown))
        apart = settle_ties(self.model, found.of, self.files)
        if apart and not self.tied:
            self.config.tie_word_embeddings = self.config.get_text_config().tie_word_embeddings = False
        self._check_complete()
        try:
            check_shapes(self.origins, self.parameters, self.files.entries)
        except PareError as fault:
            raise PareError(f"{self.folder}: {fault}") from fault
        left = find_leftovers(self.model, found.unknown)
        self.verbatim = left.copied
        self.remarks = [*purpose, *left.remarks(self.model), *_tie_remarks(apart, self.files)]

    @property
    def packed(self) -> bool:
        """Whether the files are in our format: their names are those of the model class."""
        return transformers_plugin.is_packed(self.config)

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
    def bytes_left(self) -> int:
        """Bytes of the tensors that are not written again: layers that config.json leaves out, copies of tied weights."""
        used = {key for name in self.parameters for key in self.origins[name].keys}.union(self.verbatim)
        return sum(e.bytes for key, e in self.files.entries.items() if key not in used)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The weights `names` of the skeleton, sorted by name, on CPU, in their stored dtypes.

        Raises PareError naming a tensor whose shape is not the skeleton's, or that is not finite.
        """
        weights: dict[str, Tensor] = {}
        ordered = sorted(set(names))  # so that every process writes them in the same order
        stored = self.files.read({key for name in ordered for key in self.origins[name].keys})
        for name in ordered:
            if name not in weights:
                weights.update(self._convert(name, self.origins[name], stored))
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
        """Put the weights `prefix + name` on the device and into the skeleton, in the dtype that the class asks for."""
        stored = {prefix + name: self.tied.get(prefix + name, prefix + name) for name in names}
        weights = self.read(stored.values())
        for name, original in stored.items():
            set_tensor(self.model, name, weights[original].to(self.device, self._dtypes[original]))

    def release(self, prefix: str, names: Iterable[str]) -> None:
        """Free the weights `prefix + name`: the skeleton's are on `meta` again."""
        for name in names:
            original = self.tied.get(prefix + name, prefix + name)
            set_tensor(self.model, prefix + name, self.parameters[original])

    def as_stored(self, names: Iterable[str], changed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The weights `names` under the names and in the layout of the files, those in `changed` with new values.

        Weights that the files hold as one tensor come together. Raises PareError if a changed one cannot be stored so.
        """
        origins = {self.origins[name].keys: (self.origins[name], name) for name in names}
        for origin, name in origins.values():
            weights = origin.weights or (name,)
            if changed.keys().isdisjoint(weights):
                yield from self.files.read(origin.keys).items()
            elif origin.converter is None:
                yield origin.keys[0], changed[name]
            else:
                unchanged = self.read(weight for weight in weights if weight not in changed)
                values = unchanged | {weight: changed[weight] for weight in weights if weight in changed}
                renamings = [t for t in transforms_of(self.model) if not hasattr(t, "operations") and t.was_used()]
                yield from reverted(self.model, values, [origin.converter, *renamings], origin.keys).items()

    def provenance(self) -> dict[str, Any]:
        """Which model this is, for paredown.json."""
        return {"id": self.id, "revision": self.revision, "tokenizer_sha256": self.tokenizer_sha256()}

    def tokenizer_sha256(self) -> str:
        """One digest of the names and contents of the tokenizer's files."""
        return companions.tokenizer_sha256(self.folder)

    def _convert(self, name: str, origin: Origin, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = origin.convert(name, stored, self.model)
        for weight, tensor in weights.items():
            if weight in self.parameters and tensor.shape != self.parameters[weight].shape:
                raise PareError(
                    f"{self.folder}: {weight!r}, made of {origin.keys[0]!r}, has shape {tuple(tensor.shape)}, config.json "
                    f"wants {tuple(self.parameters[weight].shape)}. The weights and the config are not of the same model."
                )
        return weights

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        """The dtype in which `from_pretrained` loads each weight: some classes keep a few in float32."""
        plan = self.model._get_dtype_plan(self.dtype)
        patterns = [(re.compile(pattern.replace("*", ".*")), dtype) for pattern, dtype in plan.items()]
        return {
            name: next((dtype for pattern, dtype in patterns if pattern.search(name)), tensor.dtype)
            for name, tensor in self.parameters.items()
        }

    def _check_complete(self) -> None:
        missing = sorted(set(self.parameters) - set(self.origins))
        if missing:
            raise PareError(
                f"{self.folder}: {len(missing)} tensors of a {self.config.model_type} model are missing, first "
                f"{missing[0]!r}. The weights and config.json are not of the same model, or the download is incomplete."
            )


def _tie_remarks(apart: list[str], files: TensorFiles) -> Iterator[str]:
    if apart:
        yield (
            f"config.json says that {apart[0]} is tied to another weight, and the files hold two different tensors: they "
            "stay apart, as transformers reads them"
        )
    if files.ignored_index:
        yield f"{SINGLE} is read, and {INDEX} beside it is not, as in transformers"


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace one parameter or buffer by `tensor`, without copying."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
