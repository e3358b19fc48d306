"""Which weights of a model are compressed: the recipe's patterns, and the layers that control others.

A layer that chooses experts, tokens or streams, or says how fast a state is forgotten, is tiny, and an error in it costs
far more than its bytes. It is known by its role: by the module that it is a part of, or by its few outputs.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, Protocol, TypeVar

from paredown.compress.errors import PareError, did_you_mean

# Words in the names of modules, or at the end of their classes' names, all of whose linears control others.
ROLES = {
    "router": "a router: choosing the wrong expert costs more than it saves",
    "gating": "a router: choosing the wrong expert costs more than it saves",
    "indexer": "an indexer: it chooses the tokens that attention sees",
    "scorer": "an indexer: it chooses the tokens that attention sees",
    "altup": "a mixer of residual streams",
    "hyperconnection": "a mixer of residual streams",
    "hyperhead": "a mixer of residual streams",
    "gatedresidual": "a mixer of residual streams",
    "gate": "a gate with a few outputs, or a part of one",
}
BARE = {"dt_proj"}  # used as a bare matrix by the state-space scan, not called as a layer
# words in the names of linears that may have as few outputs as there are heads, and are projections all the same
PROJECTIONS = {"q", "k", "v", "o", "kv", "qkv", "query", "key", "value", "up", "down"}
FEW = 4  # a linear with a few outputs has at least as many times more inputs


class Named(Protocol):
    """Anything with a full dotted name that may control others."""

    @property
    def name(self) -> str: ...
    @property
    def control(self) -> str | None: ...


N = TypeVar("N", bound=Named)


def bare(name: str) -> bool:
    """Whether a linear of this name is used as a bare matrix, so that nothing may take its place."""
    return name.rpartition(".")[2] in BARE


def control(path: str, classes: Sequence[str], shape: tuple[int, int], counts: frozenset[int]) -> str | None:
    """Why a linear (out, in) is compressed only if a recipe names it; None for an ordinary one.

    `path` is its dotted name within its block, `classes` are the names of the classes of the modules along the path, the
    linear's own at the end. `counts` are those of `control_counts`.
    """
    *parents, leaf = path.split(".")
    words = [word for part in [*parents, leaf] for word in part.split("_")]
    for role, why in ROLES.items():
        found = any(part.split("_")[-1] == role for part in parents) if role == "gate" else role in words
        if found or any(name.lower().endswith(role) for name in classes):
            return why
    few = shape[0] == 1 or (shape[0] in counts and shape[0] * FEW <= shape[1])
    return "a gate with a few outputs" if few and not PROJECTIONS & set(leaf.split("_")) else None


def control_counts(config: Any) -> frozenset[int]:
    """How many outputs layers have that control others: one for each expert or head, two for each head."""
    experts, heads = set[int](), set[int]()
    for key, value in _counts(config.get_text_config().to_dict()):
        (experts if "expert" in key else heads).add(value)
    return frozenset(experts | {total + 1 for total in experts} | heads | {2 * total for total in heads})


def _counts(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Numbers of heads and experts in a config, by key."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _counts({str(inner): v for inner, v in value.items()})
        elif re.search(r"head|expert", key) and re.search(r"(^|_)(num|n)(_|$)", key) and "per" not in key.split("_"):
            values = value if isinstance(value, list | tuple) else [value]
            yield from ((key, v) for v in values if isinstance(v, int) and v > 0)


def select(views: Sequence[N], include: Sequence[str], skip: Sequence[str], head: str) -> tuple[list[N], list[N]]:
    """Split `views` into those to compress and the rest. Patterns are globs, matched as `matches` does.

    Layers that control others are chosen only by a pattern that matches no ordinary layer. The output head is in no block
    and is never compressed, but `skip` may name it (`head`, or `lm_head`). Raises PareError for a pattern that matches
    nothing.
    """
    names = [v.name for v in views]
    for pattern in [*include, *skip]:
        if not any(matches(n, pattern) for n in names) and not (matches(head, pattern) or pattern == "lm_head"):
            parts = sorted({part for n in names for part in n.split(".") if not part.isdigit()})
            raise PareError(
                f"the target pattern {pattern!r} matches no linear layer.{did_you_mean(pattern, parts)} "
                f"Layers are named like {names[0]!r}; parts that a pattern can match: {', '.join(parts)}."
            )
    ordinary = [v.name for v in views if v.control is None]
    naming = [p for p in include if not any(matches(n, p) for n in ordinary)]
    chosen = [
        v
        for v in views
        if any(matches(v.name, p) for p in (include if v.control is None else naming))
        and not any(matches(v.name, p) for p in skip)
    ]
    names_chosen = {v.name for v in chosen}
    return chosen, [v for v in views if v.name not in names_chosen]


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches the whole name or consecutive dotted parts of it: `q_proj`, `layers.0.*`, `self_attn.*`."""
    return fnmatch(name, pattern) or fnmatch(f".{name}.", f"*.{pattern}.*")
