"""A recipe that removes blocks, or units of every block, resolved for one model: plan, run and journal read the same job."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import Format, Job, resolve_job
from paredown.compress.methods.base import BlockMethod, Group, GroupMethod
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.model.carried import FromBlock, Shared
from paredown.compress.model.expert_groups import check_chosen, check_experts, expert_groups
from paredown.compress.model.groups import channel_groups
from paredown.compress.model.reshape_keys import with_keys
from paredown.compress.model.stream import check_walkable, start
from paredown.compress.numerics.moments import INPUT_NEEDS, Need, gradients_read
from paredown.compress.recipe import Recipe

PROBE = 16  # tokens that groups are found with
FINDERS = {"channels": channel_groups, "experts": expert_groups}
# by kind of unit: what a block must have to lose some, and what to do instead
WANTED = {
    "channels": "each must be written by linear layers, and read by one. Remove blocks (paredown_depth), or use a low-rank "
    "method.",
    "experts": "a router must choose among experts whose weights lie in one parameter. Remove channels (paredown_width) or "
    "blocks (paredown_depth).",
}


@dataclass(frozen=True)
class ShapeJob:
    """What is removed from which model."""

    source: ModelSource
    recipe: Recipe
    method: GroupMethod | BlockMethod
    blocks: Sequence[Block]
    drop: int = 0  # blocks that go
    groups: Mapping[int, Sequence[Group]] = field(default_factory=dict)  # by block, of a method that removes units
    units: Mapping[str, int] = field(default_factory=dict)  # by key of the config: how many stay in each group
    format: Format = "dense"

    @property
    def gradients(self) -> frozenset[Need]:
        """Which moments of the gradient at a reader's output the method reads."""
        return gradients_read(self.method.needs)

    @property
    def collected(self) -> frozenset[Need]:
        """What is measured of a reader's input: for the method, and for the error in the report."""
        needs = self.method.needs & INPUT_NEEDS
        return needs if Need.GRAM in needs else needs | {Need.SECOND_MOMENT}

    @property
    def refits(self) -> bool:
        """Whether layers that write to the residual stream are fitted to the dense model's."""
        return isinstance(self.method, BlockMethod) and self.method.refits

    @property
    def follows_dense(self) -> bool:
        """Whether the calibration text goes through the dense blocks beside the smaller ones."""
        return self.refits or self.recipe.reconstruct is not None

    @property
    def all_groups(self) -> list[Group]:
        return [group for groups in self.groups.values() for group in groups]

    @property
    def form(self) -> str:
        """What comes out, in words."""
        if self.drop:
            return f"{len(self.blocks) - self.drop} of {len(self.blocks)} blocks"
        sizes = {group.config_key: group.units for group in self.all_groups}
        return " and ".join(f"{key} {self.units[key]} in place of {size}" for key, size in sizes.items())

    @property
    def numbers(self) -> int:
        """Parameters of all blocks."""
        return sum(block_numbers(block) for block in self.blocks)

    @property
    def kept_numbers(self) -> int:
        """How many of these stay; of blocks that differ, about."""
        gone = sum((g.units - self.units[g.config_key]) * unit_numbers(self.source, g) for g in self.all_groups)
        return self.numbers - gone - round(self.numbers * self.drop / len(self.blocks))


def block_numbers(block: Block) -> int:
    return sum(t.numel() for t in block.module.state_dict().values())


def unit_numbers(source: ModelSource, group: Group) -> int:
    """Parameters of one unit."""
    shapes = {part: source.parameters[part.name].shape for part in group.parts}
    return sum(part.width * prod(shape) // shape[part.dim] for part, shape in shapes.items())


def resolve(source: ModelSource, recipe: Recipe, format: Format = "packed") -> "Job | ShapeJob":
    """The job of a recipe, whatever its method edits. Raises PareError as `resolve_job` and `resolve_shapes` do.

    What removes blocks or units leaves an ordinary checkpoint, whatever the `format`.
    """
    method = recipe.build()
    if isinstance(method, GroupMethod | BlockMethod):
        return resolve_shapes(source, recipe, method)
    return resolve_job(source, recipe, format)


def resolve_shapes(source: ModelSource, recipe: Recipe, method: GroupMethod | BlockMethod) -> ShapeJob:
    """Raises PareError for keys of a recipe that mean nothing here, and for a model without what is to be removed.

    Groups are found by running one block of each kind, whose weights are read.
    """
    _check(recipe)
    check_walkable(source)
    all_blocks = blocks(source)
    if isinstance(method, BlockMethod):
        return ShapeJob(source, recipe, method, all_blocks, _blocks_to_drop(method, len(all_blocks)))
    groups = find_groups(source, all_blocks, method.kind)
    units = _units_to_keep(source, method, sum(map(block_numbers, all_blocks)), groups)
    return ShapeJob(source, recipe, method, all_blocks, groups=groups, units=units)


def _check(recipe: Recipe) -> None:
    """Raises PareError for a key that says something of single weights."""
    plain = Recipe(method=recipe.method)
    for key in ("targets", "allocation", "order", "idle", "router_weight"):
        if getattr(recipe, key) != getattr(plain, key):
            raise PareError(
                f"{recipe.method} removes whole units or blocks, and {key} is about single weights: leave it out."
            )


def _blocks_to_drop(method: BlockMethod, count: int) -> int:
    stay = method.blocks if method.blocks is not None else round(count * (method.kept or 1.0))
    if not 0 < stay < count:
        raise PareError(
            f"of {count} blocks {stay} would stay: ask for 1 to {count - 1} with blocks, or for another kept."
        )
    return count - stay


@torch.no_grad()
def find_groups(
    source: ModelSource, all_blocks: Sequence[Block], kind: Literal["channels", "experts"] = "channels"
) -> dict[int, list[Group]]:
    """The groups of each block that has some, with this `kind` of unit.

    They are found in the first block of each kind: blocks of the same shapes are alike. Those whose number of units no
    setting of the config says are left out, such as shared experts that are a multiple of another width. Raises PareError if
    none is left.
    """
    if kind == "experts":
        check_experts(source.config, source.family)
    ids = torch.arange(min(PROBE, int(source.config.get_text_config().vocab_size)))[None]
    stream, groups = start(source, ids), dict[int, list[Group]]()
    kinds: dict[Any, tuple[str, list[Group]]] = {}  # the prefix of the first block of a kind, and its groups
    leaves = [leaf for call in stream.calls[0] for leaf in call.leaves()]
    hands_on = any(isinstance(leaf, FromBlock | Shared) for leaf in leaves)  # blocks cannot run before earlier ones
    for block in all_blocks:
        shape = tuple((name, tensor.shape) for name, tensor in block.module.state_dict().items())
        if shape not in kinds or hands_on:
            with source.loaded(block):
                kinds[shape] = kinds.get(shape) or (block.prefix, FINDERS[kind](stream, block))
                if hands_on:
                    stream.advance(block)
        prefix, found = kinds[shape]
        if found:
            groups[block.index] = [_renamed(group, prefix, block.prefix) for group in found]
    groups = with_keys(source, groups)
    if not groups:
        raise PareError(f"no block of this {source.family} model has {kind} that can be removed: {WANTED[kind]}")
    named = {i: own for i, found in groups.items() if (own := [group for group in found if group.config_key])}
    if not named:
        group = next(iter(groups.values()))[0]
        raise PareError(
            f"{group.name} has {group.units} {group.kind}, and no setting of a {source.family} config says so, so that an "
            "ordinary checkpoint cannot have fewer. Remove blocks (paredown_depth), or use a low-rank method."
        )
    return named


def _renamed(group: Group, old: str, new: str) -> Group:
    """The same group of another block."""

    def renamed(name: str) -> str:
        return (new + f"{name}.".removeprefix(old)).rstrip(".")  # a group may lie in the block itself

    parts = tuple(replace(part, name=renamed(part.name)) for part in group.parts)
    return replace(group, name=renamed(group.name), parts=parts, reader=group.reader and renamed(group.reader))


def _units_to_keep(
    source: ModelSource, method: GroupMethod, numbers: int, groups: Mapping[int, Sequence[Group]]
) -> dict[str, int]:
    """How many units stay in each group, by its key: the same share of all groups.

    `numbers` of parameters of all blocks. Raises PareError if the groups hold fewer than are to go.
    """
    members = [group for found in groups.values() for group in found]
    sizes = {group.config_key: group.units for group in members}
    largest = max(sizes.values())
    if method.units is not None:
        share = method.units / largest
    elif method.of_units:
        share = method.kept or 1.0
    else:
        in_groups = sum(group.units * unit_numbers(source, group) for group in members)
        share = 1 - numbers * (1 - (method.kept or 1.0)) / in_groups
    units = {key: round(size * share / method.multiple) * method.multiple for key, size in sizes.items()}
    if method.units is not None:
        units |= {key: method.units for key, size in sizes.items() if size == largest}
    if bad := next((key for key, count in units.items() if not 0 < count < sizes[key]), None):
        raise PareError(
            f"of the {sizes[bad]} units of {bad} {max(units[bad], 0)} would stay (a multiple of {method.multiple}): ask for "
            "another kept or units, or for a smaller multiple (--set multiple=8)."
        )
    if method.kind == "experts":
        for key, count in units.items():
            check_chosen(source.config, key, count)
    return units
