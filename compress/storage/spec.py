"""How one weight is stored: an entry of `modules` in config.json, which is read and written here and nowhere else."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from paredown.compress.errors import PareError

# What the packed weight replaces: a Linear, a Conv1D (its weight is (in, out)), or the 3-D parameter of fused experts.
Layout = Literal["linear", "conv1d", "experts"]
LAYOUTS: dict[str, int] = {"linear": 2, "conv1d": 2, "experts": 3}  # dimensions of the shape, by layout
IN_JSON = {"rank": "rank", "values": "kept"}  # field -> key in config.json, of the fields that not every kind has
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
        if missing := [key for key in ("kind", "layout", "shape") if key not in raw]:
            raise PareError(f"packed weight {name!r}: its spec lacks {', '.join(missing)}.")
        for key in IN_JSON.values():
            if key in raw and (not isinstance(raw[key], int) or isinstance(raw[key], bool)):
                raise PareError(f"packed weight {name!r}: {key} must be a whole number, not {raw[key]!r}.")
        layout, shape = raw["layout"], tuple(raw["shape"])
        if layout not in LAYOUTS:
            raise PareError(
                f"packed weight {name!r} has the unknown layout {layout!r}, not one of {', '.join(LAYOUTS)}."
            )
        if len(shape) != LAYOUTS[layout]:
            raise PareError(f"packed weight {name!r}: layout {layout!r} does not go with shape {list(shape)}.")
        return cls(raw["kind"], shape, layout, raw.get("rank"), raw.get("kept"), bool(raw.get("bias", False)))
