"""The experts of a mixture as units that can be removed, found by trying which parameters have an entry for each of them."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import torch

from paredown.compress.errors import PareError
from paredown.compress.methods.base import Group, Part
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.groups import coupled, holds
from paredown.compress.model.stream import Stream
from paredown.compress.model.trial import Module32, Trial

# keys that say in how many groups experts lie, of which a token reaches a few: what is removed would have to be the same
# number in each
GROUPED = ("n_group", "num_expert_group")
# keys that say how many experts a token gets
CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
    "num_selected_experts",
)  # fmt: skip
LEFT_OUT = 2  # at most so many parameters have an entry for each expert by chance


@torch.no_grad()
def expert_groups(stream: Stream, block: Block) -> list[Group]:
    """The groups of experts of a block, whose weights are in memory; [] if it has none.

    Experts are those of fused parameters. Beside these, parameters of the module that holds them have an entry for each
    expert: rows of a router, biases, corrections of a choice; the router's matrix is the last part. What is called a group
    has passed these trials on the first batch of the `stream`, which does not move: the output stays as it is where all
    parts are permuted alike, and does not where the router alone is. Shared experts are no part. `config_key` is "". The
    hidden channels of an expert, `inner`, are found alike.
    """
    views = [view for view in block.views() if view.expert == 0]
    owners: dict[int, list[View]] = {}
    for view in views:
        owners.setdefault(id(view.module), []).append(view)
    if not owners:
        return []
    trial = Trial.of(stream, block)
    found = (_group_of(trial, own) for own in owners.values())
    return [group for group in found if group is not None and holds(stream, block, group)]


def check_experts(config: Any, family: str) -> None:
    """Raises PareError for a family whose experts lie in groups: a permutation of all experts mixes them up."""
    text = config.get_text_config()
    for key in GROUPED:
        if (count := getattr(text, key, None)) is not None and count > 1:
            raise PareError(
                f"the experts of this {family} model lie in {count} groups ({key}), of which a token reaches a few: experts "
                "cannot be removed one by one. Remove blocks (paredown_depth) or channels (paredown_width) instead."
            )


def check_chosen(config: Any, key: str, left: int) -> None:
    """Raises PareError if fewer experts are `left` than a token gets."""
    text = config.get_text_config()
    chosen = max((v for name in CHOSEN if isinstance(v := getattr(text, name, None), int)), default=1)
    if left < chosen:
        raise PareError(
            f"of the {getattr(text, key)} experts ({key}) {left} would stay, and each token gets {chosen}: ask for another "
            "kept or units."
        )


def _group_of(trial: Trial, own: Sequence[View]) -> Group | None:
    """The experts whose weights lie in one module, with the router of the nearest module around it that has one."""
    experts = own[0].experts
    owner = own[0].owner.removeprefix(trial.block.prefix).rpartition(".")[0]
    ordinary = {v.name for v in trial.block.views() if v.expert is None and v.control is None}
    path = owner
    while path:
        path = path.rpartition(".")[0]
        if path not in trial.calls:
            continue
        module = Module32(trial, path)
        inner = owner.removeprefix(f"{path}." if path else "")
        prefix = trial.block.prefix + (f"{path}." if path else "")
        layouts = _layouts(module, inner, experts, {name.removeprefix(prefix) for name in ordinary})
        parts = next((p for p in layouts if coupled(module, p, experts)), None)
        if parts is not None:
            channels = _inner(module, [v for v in own if v.tensor.dim() == 3], prefix)
            named, inside = ([replace(p, name=prefix + p.name) for p in some] for some in (parts, channels))
            return Group(prefix.rstrip("."), "experts", experts, tuple(named), "", "", inner=tuple(inside))
    return None


def _inner(module: Module32, own: Sequence[View], prefix: str) -> tuple[Part, ...]:
    """Where the hidden channels of each expert lie in the parameters of all of them, by names within the module.

    One matrix reads them, and the others write them: side by side if a matrix writes two of each, or one half after the
    other. () where nothing can be permuted so.
    """
    for reader in own:
        channels = reader.shape[1]
        writers = [v for v in own if v is not reader and v.shape[0] in (channels, 2 * channels)]
        last = Part(reader.owner.removeprefix(prefix), 2 if reader.layout == "experts" else 1)
        for biased, halves in product((True, False), repeat=2):
            parts = [part for v in writers for part in _written(module, v, channels, halves, biased, prefix)]
            if parts and coupled(module, [*parts, last], channels):
                return (*parts, last)
    return ()


def _written(module: Module32, writer: View, channels: int, halves: bool, biased: bool, prefix: str) -> Iterator[Part]:
    """Where one matrix writes the channels of each expert, and its bias, whose name begins like that of the matrix."""
    name, copies = writer.owner.removeprefix(prefix), writer.shape[0] // channels
    dims = {name: 1 if writer.layout == "experts" else 2}
    if biased:
        dims |= {n: 1 for n, t in module.tensors.items() if n.startswith(f"{name}_") and t.dim() == 2}
    for stored, dim in dims.items():
        if halves:
            yield from (Part(stored, dim, first=first) for first in range(0, copies * channels, channels))
        else:
            yield Part(stored, dim, copies)


def _layouts(module: Module32, owner: str, experts: int, ordinary: Set[str]) -> Iterator[tuple[Part, ...]]:
    """What may have an entry for each expert, by names within the module; a router's matrix is the last part.

    Some other parameter may have as many entries by chance: one or two are left out, and `ordinary` layers, such as those of
    a shared expert, are none. A router may know one expert more, which does nothing.
    """
    inside = f"{owner}."
    own = [
        Part(name, 0, len(tensor) // experts)
        for name, tensor in module.tensors.items()
        if name.startswith(inside) and tensor.dim() and len(tensor) % experts == 0
    ]
    others = {name: t for name, t in module.tensors.items() if not name.startswith(inside) and t.dim() in (1, 2)}
    around = {name: t for name, t in others.items() if name.rpartition(".")[0] not in ordinary}
    for size in (experts, experts + 1):
        fitting = [Part(name, list(t.shape).index(size)) for name, t in around.items() if size in t.shape]
        fitting.sort(key=lambda part: around[part.name].numel())  # a router's matrix is the largest
        for left_out in range(min(LEFT_OUT, len(fitting)) + 1):
            for some in combinations(fitting, len(fitting) - left_out):
                if some and around[some[-1].name].dim() == 2:
                    yield (*own, *some)
