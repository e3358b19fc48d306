"""How one weight is stored: an entry of `modules` in config.json, which is read and written here and nowhere else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from paredown.compress.errors import PareError

# What the packed weight replaces: a Linear, a Conv1D (its weight is (in, out)), or the parameter of fused experts, whose
# weights are (out, in) or (in, out).
Layout = Literal["linear", "conv1d", "experts", "experts_in_out"]
# dimensions of the shape, by layout
LAYOUTS: dict[str, int] = {"linear": 2, "conv1d": 2, "experts": 3, "experts_in_out": 3}
IN_JSON = {"rank": "rank", "values": "kept"}  # field -> key in config.json, of the fields that not every kind has
MOST_NUMBERS = 1 << 62  # of one weight: torch counts in 64 bits
DENSE = "dense"  # in a plan: a masked weight that would be no smaller packed. Never in a checkpoint.


@dataclass(frozen=True)
class Spec:
    """`kind` is one of `kinds.KINDS`; shape (out, in), of fused experts (experts, out, in)."""

    kind: str
    shape: tuple[int, ...]
    layout: Layout = "linear"
    rank: int | None = None  # of the factors
    values: int | None = None  # how many values the mask keeps
    bias: bool = False  # the packed layer has a bias that the dense layer does not have

    @property
    def size(self) -> int:
        """Numbers of the dense weight."""
        return prod(self.shape)

    @property
    def counts(self) -> dict[str, int]:
        """The rank and the number of values, by field name; without those that are None."""
        fields = {"rank": self.rank, "values": self.values}
        return {name: count for name, count in fields.items() if count is not None}

    def to_json(self) -> dict[str, Any]:
        """The entry of config.json, format 2."""
        optional: dict[str, Any] = {IN_JSON[name]: count for name, count in self.counts.items()}
        optional |= {"bias": True} if self.bias else {}
        return {"kind": self.kind, "layout": self.layout, "shape": list(self.shape), **optional}

    @classmethod
    def from_json(cls, name: str, raw: Mapping[str, Any]) -> "Spec":
        """From an entry of config.json. Raises PareError, naming the weight `name`, for missing keys and wrong values."""
        if not isinstance(raw, Mapping):
            raise PareError(f"packed weight {name!r}: its spec is {told(raw)}, and a table is wanted.")
        if missing := [key for key in ("kind", "layout", "shape") if key not in raw]:
            raise PareError(f"packed weight {name!r}: its spec lacks {', '.join(missing)}.")
        for key, (fits, wanted) in FIELDS.items():
            if key in raw and not fits(raw[key]):
                raise PareError(f"packed weight {name!r}: {key} must be {wanted}, not {told(raw[key])}.")
        layout, shape = raw["layout"], tuple(raw["shape"])
        if layout not in LAYOUTS:
            raise PareError(
                f"packed weight {name!r} has the unknown layout {told(layout)}, not one of {', '.join(LAYOUTS)}."
            )
        if len(shape) != LAYOUTS[layout] or prod(shape) > MOST_NUMBERS:
            raise PareError(f"packed weight {name!r}: layout {layout!r} does not go with shape {told(list(shape))}.")
        return cls(raw["kind"], shape, layout, raw.get("rank"), raw.get("kept"), raw.get("bias", False))


def told(found: object) -> str:
    """What was found, for a message: not more than a line of it."""
    try:
        text = repr(found)
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        text = f"a {type(found).__name__} that is too long to print"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_NUMBERS


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _is_shape(value: object) -> bool:
    return isinstance(value, list | tuple) and all(_is_count(size) and size > 0 for size in value)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


# what each field of an entry must be
FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "kind": (_is_name, "a name"),
    "layout": (_is_name, "a name"),
    "shape": (_is_shape, "a list of sizes"),
    "bias": (_is_flag, "true or false"),
    **dict.fromkeys(IN_JSON.values(), (_is_count, "a whole number")),
}
