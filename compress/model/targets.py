"""Which weights of a model are compressed: the recipe's patterns, and the layers that no recipe may compress."""

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Protocol, TypeVar

from paredown.compress.errors import PareError, did_you_mean

# Parts of names of linears that are never compressed, and why: they control others, and are tiny.
NEVER = {
    "router": "a router: choosing the wrong expert costs more than it saves",
    "shared_expert_gate": "a gate with one output",
    "dt_proj": "used as a bare matrix by the state-space scan, not called as a layer",
}


class Named(Protocol):
    """Anything with a full dotted name."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def never(name: str) -> str | None:
    """The reason why a linear of this name is never compressed; None if it may be."""
    return next((why for part, why in NEVER.items() if part in name.split(".")), None)


def select(views: Sequence[N], include: Sequence[str], skip: Sequence[str], head: str) -> tuple[list[N], list[N]]:
    """Split `views` into those to compress and the rest. Patterns are globs, matched as `matches` does.

    The output head is in no block and is never compressed, but `skip` may name it (`head`, or `lm_head`).
    Raises PareError for a pattern that matches nothing.
    """
    names = [v.name for v in views]
    for pattern in [*include, *skip]:
        if not any(matches(n, pattern) for n in names) and not (matches(head, pattern) or pattern == "lm_head"):
            parts = sorted({part for n in names for part in n.split(".") if not part.isdigit()})
            raise PareError(
                f"the target pattern {pattern!r} matches no linear layer.{did_you_mean(pattern, parts)} "
                f"Layers are named like {names[0]!r}; parts that a pattern can match: {', '.join(parts)}."
            )
    chosen = [
        v for v in views if any(matches(v.name, p) for p in include) and not any(matches(v.name, p) for p in skip)
    ]
    names_chosen = {v.name for v in chosen}
    return chosen, [v for v in views if v.name not in names_chosen]


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches the whole name or consecutive dotted parts of it: `q_proj`, `layers.0.*`, `self_attn.*`."""
    return fnmatch(name, pattern) or fnmatch(f".{name}.", f"*.{pattern}.*")
