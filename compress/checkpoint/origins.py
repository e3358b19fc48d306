"""Which tensors of the files make up each weight of the model class: transformers' own renamings, without reading data."""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from paredown.compress.checkpoint.tensor_files import Entry
from paredown.compress.errors import PareError

# operations that only cut, join and turn tensors: as many numbers come out as went in
REARRANGING = frozenset(
    {"MergeModulelist", "SplitModulelist", "Concatenate", "Chunk", "Split", "Interleave", "Transpose", "PermuteForRope"}
)

_NUMBER = re.compile("[0-9]{1,9}")


@dataclass(frozen=True)
class Origin:
    """The tensors of the checkpoint that a weight of the model class is made of."""

    keys: tuple[str, ...]  # their names in the checkpoint
    converter: Any | None = None  # transformers' WeightConverter, where it takes more than another name
    patterns: tuple[str, ...] = ()  # of the converter, one per key
    weights: tuple[str, ...] = ()  # of the converter: all that it makes of the keys

    def convert(self, name: str, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """The weight `name`, and all others of the same tensors. Raises PareError if the tensors do not fit together."""
        if self.converter is None:
            return {name: tensors[self.keys[0]]}
        converter = deepcopy(self.converter)
        for key, pattern in zip(self.keys, self.patterns, strict=True):
            converter.add_tensor(name, key, pattern, tensors[key])
        try:
            converted = converter.convert(name, model=model, config=model.config)
        except (RuntimeError, ValueError, IndexError, KeyError) as fault:
            raise PareError(
                f"{name!r} cannot be made of its {len(self.keys)} tensors, first {self.keys[0]!r}: {fault} "
                "The weights and the config are not of the same model, or the download is incomplete."
            ) from fault
        return {target: t[0] if isinstance(t, list) else t for target, t in converted.items()}


@dataclass
class Origins:
    """Where the weights of a model come from."""

    of: dict[str, Origin] = field(default_factory=dict)  # by the name of the weight; slices of one tensor share theirs
    unknown: dict[str, str] = field(
        default_factory=dict
    )  # keys that the class does not know -> what it would call them


def find_origins(model: Any, entries: Iterable[str], converted: bool) -> Origins:
    """Map the keys of a checkpoint to the weights of `model`, tied ones under each of their names.

    transformers >= 5 fuses the weights of experts while it loads: their keys become one Origin with the converter. A packed
    checkpoint, which is not `converted`, has the names of the class.
    """
    from transformers.core_model_loading import WeightConverter, rename_source_key

    state = model.state_dict()
    found = Origins()
    transforms = transforms_of(model) if converted else []
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(entries, key=natural):
        name, pattern = key, None
        if converted:
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if name not in state and key in state:
                name, pattern = key, None
        if name not in state:
            found.unknown[key] = name
        elif pattern is None:
            found.of[name] = Origin((key,))
        else:
            groups.setdefault(name, []).append((key, pattern))
    for name, members in groups.items():
        keys, patterns = zip(*members, strict=True)
        converter = by_pattern[patterns[0]]
        weights = _outputs(name, converter, state)
        found.of.update(dict.fromkeys(weights, Origin(keys, converter, patterns, weights)))
    return found


def check_shapes(found: Mapping[str, Origin], weights: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> None:
    """Raises PareError naming the first of the `weights` that the files hold in another shape than config.json wants."""
    for name, weight in weights.items():
        origin, wanted = found[name], tuple(weight.shape)
        first = origin.keys[0]
        if origin.converter is None and entries[first].shape != wanted:
            raise PareError(
                f"tensor {first!r} has shape {entries[first].shape}, config.json wants {wanted}. "
                "The weights and the config are not of the same model."
            )
        stored = sum(entries[key].numbers for key in origin.keys)
        if _rearranges(origin) and stored != (needed := sum(weights[w].numel() for w in origin.weights)):
            raise PareError(
                f"{name!r} is made of {len(origin.keys)} tensors, first {first!r}, which hold {stored} numbers; "
                f"config.json wants {needed}. The weights and the config are not of the same model, or the download is "
                "incomplete."
            )


def _rearranges(origin: Origin) -> bool:
    """Whether the converter gives as many numbers as it takes, all of them to weights that we know of."""
    converter = origin.converter
    return (
        converter is not None
        and len(origin.weights) == len(converter.target_patterns)
        and all(type(operation).__name__ in REARRANGING for operation in converter.operations)
    )


def reverted(
    model: Any, weights: Mapping[str, Tensor], transforms: Sequence[Any] | None, keys: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """The inverse of `Origin.convert` by these `transforms`, None for all of the family: tensors as files hold them, by name.

    Raises PareError if they are not among `keys`, or if numbers were lost. Of fewer experts they are the first.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model._weight_conversions = list(transforms) if transforms else None
    stored: dict[str, Tensor] = revert_weight_conversion(model, dict(weights))
    before, after = (sum(t.numel() for t in tensors.values()) for tensors in (weights, stored))
    if before != after or (keys is not None and not stored.keys() <= set(keys)):
        raise PareError(
            f"{min(weights)} cannot be stored as ordinary {model.config.model_type} checkpoints hold it: "
            "write --format packed, or leave it out with targets.skip."
        )
    return stored


def transforms_of(model: Any) -> list[Any]:
    """transformers' renamings and converters for a model, always the same objects: they remember whether they were used."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not hasattr(model, "_paredown_transforms"):
        model._paredown_transforms = get_model_conversion_mapping(model)
    return model._paredown_transforms  # type: ignore[no-any-return]


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which `experts.10` follows `experts.9`."""
    return [(int(part), "") if _NUMBER.fullmatch(part) else (-1, part) for part in name.split(".")]


def _outputs(name: str, converter: Any, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """All weights that a converter gives, from the name of the first."""
    first = converter.target_patterns[0]
    return tuple(t for p in converter.target_patterns if (t := name.replace(first, p)) in state) or (name,)
