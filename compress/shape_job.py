"""A recipe that removes blocks, or units of every block, resolved for one model: plan, run and journal read the same job."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import Format, Job, resolve_job
from paredown.compress.methods.base import BlockMethod, Group, GroupMethod, Kind, SublayerMethod
from paredown.compress.model.blocks import Block, blocks
from paredown.compress.model.expert_groups import check_chosen, check_experts, expert_groups
from paredown.compress.model.groups import channel_groups
from paredown.compress.model.head_groups import head_groups
from paredown.compress.model.reshape_keys import Value, check_accepted, smaller_values, with_keys
from paredown.compress.model.stream import check_walkable, start, visited
from paredown.compress.model.sublayers import Sublayer, find_sublayers
from paredown.compress.numerics.moments import INPUT_NEEDS, Need, gradients_read
from paredown.compress.recipe import Recipe
from paredown.compress.storage.shapes import UNEVEN

PROBE = 16  # tokens that groups are found with
FINDERS = {"channels": channel_groups, "kv_groups": head_groups, "ssm_heads": head_groups, "experts": expert_groups}
# by kind of unit: what a block must have to lose some, and what to do instead
WANTED = {
    "channels": "each must be written by linear layers, and read by one. Remove blocks (paredown_depth), or use a low-rank "
    "method.",
    "kv_groups": "attention must have several keys and values that can change places, each with query heads of its own; "
    "multi-query attention has one for all. Remove channels (leave unit out), or blocks (paredown_depth).",
    "ssm_heads": "a state space must have several heads, a convolution and no norm over all of them, as in Falcon-H1 and "
    "Nemotron-H. Remove channels (leave unit out), or blocks (paredown_depth).",
    "experts": "a router must choose among experts whose weights lie in one parameter. Remove channels (paredown_width) or "
    "blocks (paredown_depth).",
}


@dataclass(frozen=True)
class ShapeJob:
    """What is removed from which model."""

    source: ModelSource
    recipe: Recipe
    method: GroupMethod | BlockMethod | SublayerMethod
    blocks: Sequence[Block]
    drop: int = 0  # blocks that go
    groups: Mapping[int, Sequence[Group]] = field(default_factory=dict)  # by block, of a method that removes units
    # how many stay in each group: by key of the config, or by name of a group of an uneven job, before any survey
    units: Mapping[str, int] = field(default_factory=dict)
    format: Format = "dense"
    sublayers: Sequence[Sublayer] = ()  # that may go
    left_out: Sequence[Group] = ()  # whose number of units no setting of the config says

    @property
    def uneven(self) -> bool:
        """Whether what comes out has sizes of its own in single blocks, which only our packed format can say."""
        return self.format == "packed"

    def stays(self, group: Group) -> int:
        """How many of its units a group keeps; of a method that chooses it by what they cost: if all keep the same share."""
        return self.units[group.config_key or group.name]

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
    def remarks(self) -> list[str]:
        """What stays as it is though it has such units, in one sentence or none."""
        names = [group.name for group in self.left_out]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        why = "no setting of the config says how many there are of these alone"
        return [f"{names[0]}{more}: their {self.left_out[0].kind} stay, because {why}"] if names else []

    @property
    def form(self) -> str:
        """What comes out, in words."""
        if self.drop:
            return f"{len(self.blocks) - self.drop} of {len(self.blocks)} blocks"
        if isinstance(self.method, SublayerMethod):
            return f"blocks of which some have no attention or no MLP, {self.goes:,} parameters fewer or about"
        if self.uneven:
            before, after = (sum(counts) for counts in ((g.units for g in self.all_groups), self.units.values()))
            return f"about {after:,} of {before:,} {self.all_groups[0].kind}, in each block a number of its own"
        return " and ".join(f"{key} {now} in place of {before}" for key, (before, now) in self.counts.items())

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """By key of the config how many units, or of what these have, there are in a block and will be; none if `uneven`.

        Where blocks differ it is the first one's.
        """
        found: dict[str, tuple[int, int]] = {}
        for group in self.all_groups if not self.uneven else ():
            for key, each in ((group.config_key, 1), *group.further):
                found.setdefault(key, (each * group.units, each * self.stays(group)))
        return found

    @property
    def values(self) -> dict[str, Value]:
        """What keys of the config become; of an `uneven` job none is other than it was."""
        return {} if self.uneven else smaller_values(self.source.config, self.all_groups, self.units)

    @property
    def numbers(self) -> int:
        """Parameters of all blocks."""
        return sum(block_numbers(block) for block in self.blocks)

    @property
    def kept_numbers(self) -> int:
        """How many of these stay; of blocks that differ, about."""
        gone = sum((g.units - self.stays(g)) * unit_numbers(self.source, g) for g in self.all_groups)
        return self.numbers - self.goes - gone - round(self.numbers * self.drop / len(self.blocks))

    @property
    def goes(self) -> int:
        """How many parameters a method that removes sublayers is asked to remove, about."""
        if not isinstance(self.method, SublayerMethod):
            return 0
        if self.method.drop is not None:
            return self.method.drop * sum(s.numbers for s in self.sublayers) // max(len(self.sublayers), 1)
        return round(self.numbers * (1 - (self.method.kept or 1.0)))


def block_numbers(block: Block) -> int:
    return sum(t.numel() for t in block.module.state_dict().values())


def unit_numbers(source: ModelSource, group: Group) -> int:
    """Parameters of one unit."""
    shapes = {part: source.parameters[part.name].shape for part in group.parts}
    return sum(part.width * prod(shape) // shape[part.dim] for part, shape in shapes.items())


def resolve(source: ModelSource, recipe: Recipe, format: Format = "packed") -> "Job | ShapeJob":
    """The job of a recipe, whatever its method edits. Raises PareError as `resolve_job` and `resolve_shapes` do.

    What removes blocks or units leaves an ordinary checkpoint wherever a config describes it, whatever the `format`.
    """
    method = recipe.build()
    if isinstance(method, GroupMethod | BlockMethod | SublayerMethod):
        return resolve_shapes(source, recipe, method)
    return resolve_job(source, recipe, format)


def resolve_shapes(source: ModelSource, recipe: Recipe, method: GroupMethod | BlockMethod | SublayerMethod) -> ShapeJob:
    """Raises PareError for keys of a recipe that mean nothing here, and for a model without what is to be removed.

    Groups and sublayers are found by running one block of each kind, whose weights are read.
    """
    _check(recipe)
    if source.modules:
        raise PareError(
            f"{source.id} has packed weights, of which blocks and units cannot be removed: remove these first and compress "
            "what remains, or make it dense with paredown export."
        )
    check_walkable(source)
    all_blocks = blocks(source)
    format: Format = "packed" if source.shapes else "dense"
    if isinstance(method, BlockMethod):
        return ShapeJob(source, recipe, method, all_blocks, _blocks_to_drop(method, len(all_blocks)), format=format)
    if isinstance(method, SublayerMethod):
        return _without_sublayers(source, recipe, method, all_blocks)
    if method.uneven:
        format = "packed"
    groups, left_out = sized_groups(source, all_blocks, method.kind, format == "packed")
    units = _units_to_keep(source, method, sum(map(block_numbers, all_blocks)), groups, format == "packed")
    job = ShapeJob(source, recipe, method, all_blocks, groups=groups, units=units, format=format, left_out=left_out)
    check_accepted(source, job.values)
    return job


def _without_sublayers(
    source: ModelSource, recipe: Recipe, method: SublayerMethod, all_blocks: Sequence[Block]
) -> ShapeJob:
    """Raises PareError if fewer sublayers may go than are to."""
    wanted = {"any": (True, False), "attention": (True,), "mlp": (False,)}[method.which]
    found = [s for s in find_sublayers(source, all_blocks) if s.mixes in wanted]
    job = ShapeJob(source, recipe, method, all_blocks, format="packed", sublayers=found)
    if len(found) < (method.drop or 0) or sum(s.numbers for s in found) < job.goes:
        raise PareError(
            f"{len(found)} sublayers of {source.id} may go ({method.which}), with {sum(s.numbers for s in found):,} of its "
            f"blocks' {job.numbers:,} parameters: ask for a larger kept, or a smaller drop."
        )
    return job


def check_ordinary(job: "Job | ShapeJob") -> None:
    """Raises PareError for a job that cannot leave an ordinary checkpoint."""
    if job.source.shapes or (isinstance(job, ShapeJob) and job.uneven):
        raise not_ordinary(job.source)


def not_ordinary(source: ModelSource) -> PareError:
    """The refusal to write an ordinary checkpoint of a model whose blocks have sizes of their own."""
    return PareError(
        f"{source.id}: its blocks have sizes of their own, or lack a part, and no config of a {source.family} model says so: "
        f"leave --format dense out ({UNEVEN})."
    )


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


def find_groups(
    source: ModelSource, all_blocks: Sequence[Block], kind: Kind = "channels", uneven: bool = False
) -> dict[int, list[Group]]:
    """As `sized_groups`, without those that are left out."""
    return sized_groups(source, all_blocks, kind, uneven)[0]


@torch.no_grad()
def sized_groups(
    source: ModelSource, all_blocks: Sequence[Block], kind: Kind = "channels", uneven: bool = False
) -> tuple[dict[int, list[Group]], list[Group]]:
    """The groups of each block that has some, with this `kind` of unit, and those that are left out.

    They are found in the first block of each kind: blocks of the same shapes are alike. Those whose number of units no
    setting of the config says are left out, such as shared experts that are a multiple of another width, unless what comes
    out is `uneven`: then no setting is asked, and the key of all is "". Raises PareError if none is left.
    """
    if kind == "experts":
        check_experts(source.config, source.family)
    ids = torch.arange(min(PROBE, int(source.config.get_text_config().vocab_size)))[None]
    stream, groups = start(source, ids), dict[int, list[Group]]()
    kinds: dict[Any, tuple[str, list[Group]]] = {}  # the prefix of the first block of a kind, and its groups

    def shape_of(block: Block) -> Any:
        return tuple((name, tensor.shape) for name, tensor in block.module.state_dict().items())

    for block in visited(source, stream, all_blocks, lambda block: shape_of(block) not in kinds):
        kinds[shape_of(block)] = block.prefix, [g for g in FINDERS[kind](stream, block) if g.kind == kind]
    for block in all_blocks:
        prefix, found = kinds[shape_of(block)]
        if found:
            groups[block.index] = [_renamed(group, prefix, block.prefix) for group in found]
    groups = groups if uneven else with_keys(source, groups)
    if not groups:
        raise PareError(f"no block of this {source.family} model has {kind} that can be removed: {WANTED[kind]}")
    named = {i: own for i, found in groups.items() if (own := [g for g in found if g.config_key or uneven])}
    if not named:
        group = next(iter(groups.values()))[0]
        kept = " and keeps the size of each" if group.are_heads else ""
        raise PareError(
            f"{group.name} has {group.units} {group.kind}, and no setting of a {source.family} config says so{kept}, so that "
            "an ordinary checkpoint cannot have fewer. Remove blocks (paredown_depth), or use a low-rank method."
        )
    return named, [group for found in groups.values() for group in found if not (group.config_key or uneven)]


def _renamed(group: Group, old: str, new: str) -> Group:
    """The same group of another block."""

    def renamed(name: str) -> str:
        return (new + f"{name}.".removeprefix(old)).rstrip(".")  # a group may lie in the block itself

    parts, inner = (tuple(replace(part, name=renamed(part.name)) for part in own) for own in (group.parts, group.inner))
    reader = group.reader and renamed(group.reader)
    return replace(group, name=renamed(group.name), parts=parts, reader=reader, inner=inner)


def _units_to_keep(
    source: ModelSource, method: GroupMethod, numbers: int, groups: Mapping[int, Sequence[Group]], uneven: bool = False
) -> dict[str, int]:
    """How many units stay in each group, by its key, in an `uneven` job by its name: the same share of all groups.

    `numbers` of parameters of all blocks. Raises PareError if the groups hold fewer than are to go.
    """
    members = [group for found in groups.values() for group in found]
    sizes = {group.config_key or group.name: group.units for group in members}
    largest = max(sizes.values())
    if method.units is not None:
        share = method.units / largest
    elif method.of_units:
        share = method.kept or 1.0
    else:
        in_groups = sum(group.units * unit_numbers(source, group) for group in members)
        share = 1 - numbers * (1 - (method.kept or 1.0)) / in_groups
    step = method.step
    units = {key: round(size * share / step) * step for key, size in sizes.items()}
    if method.units is not None:
        units |= {key: method.units for key, size in sizes.items() if size == largest}
    if uneven and share > 0:  # small groups keep the least that they can
        units = {key: min(max(count, step), sizes[key]) for key, count in units.items()}
    full = set(units) if units == sizes or not uneven else set()  # those that must not stay whole
    if bad := next((k for k, count in units.items() if count <= 0 or (k in full and count >= sizes[k])), None):
        finer = ", or for a smaller multiple (--set multiple=8)" if step > 1 else ""
        raise PareError(
            f"of the {sizes[bad]} units of {bad} {max(units[bad], 0)} would stay (a multiple of {step}): ask for "
            f"another kept or units{finer}."
        )
    if method.kind == "experts":
        for key, count in units.items():
            check_chosen(source.config, key, count)
    return units
