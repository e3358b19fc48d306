"""A recipe resolved for one model, by names and shapes alone: plan, survey and run read the same job.

Whatever can be refused before a weight is read is refused here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, prod
from typing import Any, Literal

from torch import Tensor

from paredown.compress.allocation.base import (
    ALLOCATIONS,
    Allocation,
    Budget,
    Grain,
    Layer,
    Options,
    Sensitivities,
)
from paredown.compress.allocation.spec import AllocationSpec
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.methods.base import Choice, WeightMethod
from paredown.compress.model.blocks import Block, View, blocks, by_owner
from paredown.compress.model.rest import name_of
from paredown.compress.model.routing import is_told_weights
from paredown.compress.model.stream import check_walkable, element_size
from paredown.compress.model.targets import select
from paredown.compress.numerics.moments import GRADIENT_NEEDS, INPUT_NEEDS, PAIRED_NEEDS, Need, Stats, gradients_read
from paredown.compress.recipe import Recipe

Format = Literal["packed", "dense"]


@dataclass(frozen=True)
class Job:
    """What is done to which weights of which model."""

    source: ModelSource
    recipe: Recipe
    method: WeightMethod  # as a checkpoint of this format can hold its edits
    format: Format
    strategy: str
    allocation: Allocation
    blocks: Sequence[Block]
    targets: Sequence[View]  # in the order of the model
    left_out: Sequence[View]  # linears that the recipe's patterns skip

    @property
    def collected(self) -> frozenset[Need]:
        """What is measured of a layer's input during the walk: for the method, and for the error in the report."""
        needs = self.method.needs & PAIRED_NEEDS
        return needs if Need.GRAM in needs else needs | {Need.SECOND_MOMENT}

    @property
    def gradients(self) -> frozenset[Need]:
        """Which moments of output gradients the method reads."""
        return gradients_read(self.method.needs)

    @property
    def surveyed(self) -> frozenset[Need]:
        """What is measured of each layer of the dense model before the walk: gradients, and for the allocation."""
        allocation, needs = self.allocation, self.gradients
        if allocation.reads in ("losses", "sensitivities"):
            needs |= self.method.needs & INPUT_NEEDS
        if allocation.reads != "losses" or self.method.weighs:
            needs |= allocation.needs
        return needs - {Need.SECOND_MOMENT} if Need.GRAM in needs else needs

    def surveyed_of(self, ids: Tensor) -> Tensor:
        """Those of the windows `ids` (windows, length) on which the dense model is surveyed."""
        return ids[: self.method.gradient_windows] if self.surveyed & GRADIENT_NEEDS else ids

    @property
    def is_surveyed(self) -> bool:
        """Whether anything is measured of the dense model before the walk."""
        return self.method.surveys_angles or bool(self.gradients) or self.allocation.reads != "shapes"

    @property
    def reads_pairs(self) -> bool:
        """Whether the survey gives the method tokens themselves."""
        return self.allocation.reads == "losses" and self.method.reads_pairs

    @property
    def paired(self) -> bool:
        """Whether the method compares the dense model's inputs with the compressed one's."""
        return Need.CROSS in self.method.needs

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's hidden states go through the blocks beside the compressed one's."""
        return self.paired or self.recipe.reconstruct is not None

    @property
    def element_size(self) -> int:
        """Bytes of one number of a weight."""
        return element_size(self.source)

    def targets_within(self, angles: Sequence[float] | None = None) -> list[View]:
        """The targets in the blocks that the method chooses. Without angles how many is known, and not which."""
        angles = [0.0] * len(self.blocks) if angles is None else angles
        inside = tuple(self.blocks[i].prefix for i in self.method.chosen_blocks(angles))
        return [view for view in self.targets if view.name.startswith(inside)]

    def allocate(
        self,
        views: Sequence[View],
        choices: Mapping[str, Sequence[Choice]] | None = None,
        tokens: int = 0,
        sensitivities: Sensitivities | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> Options | None:
        """The option of each of these layers under the job's one budget; None where each layer settles its own.

        `choices` or `scores` are those that were measured, by layer; without them shapes alone decide. `tokens` of the
        calibration. Raises PareError if the budget cannot be met.
        """
        asked = self.method.budget
        if not asked.shared or (self.strategy == "uniform" and asked.parameters is None):
            return None
        owners, measured = by_owner(views), choices or scores
        layers = [
            self.layer(owner, members, choices[owner] if choices else self.choices_of(members))
            for owner, members in owners.items()
            if not measured or owner in measured
        ]
        kept = self.share_for(sum(layer.size for layer in layers))
        chosen = self.allocation.allocate(Budget(layers, kept, tokens, sensitivities or {}, scores or {}))
        return {v.name: option for owner, option in chosen.items() for v in owners[owner]}

    def layer(self, owner: str, members: Sequence[View], choices: Sequence[Choice]) -> Layer:
        """A layer, or all experts of a fused weight, as an allocation sees it."""
        first, count = members[0], len(members)
        block = next((block.index for block in self.blocks if owner.startswith(block.prefix)), 0)
        grain = Grain(count * first.shape[0], count) if self.method_of(first).shares == "any" else None
        return Layer(owner, count * prod(first.shape), choices, block, grain)

    def choices_of(
        self, members: Sequence[View], stats: Mapping[str, Stats] | None = None, tokens: int = 1
    ) -> list[Choice]:
        """The choices for a layer, or for all experts of a fused weight, which get the same option: numbers and losses added.

        With `stats` by view name, losses are predicted, each for the share of all `tokens` that reaches the weight.
        """
        method = self.method_of(members[0])
        if stats is None:
            total = method.choices(members[0].shape)
        else:
            lists = []
            for view in members:
                if view.name in stats:
                    share = 1.0 if view.expert is None else stats[view.name].inputs.count / tokens
                    own = method.choices(view.shape, view.weight, stats[view.name])
                    lists.append([replace(choice, loss=choice.loss * share) for choice in own])
            total = [replace(same[0], loss=fsum(c.loss for c in same)) for same in zip(*lists, strict=True)]
        return [replace(choice, numbers=choice.numbers * len(members)) for choice in total]

    def share_for(self, targeted: int) -> float:
        """The share of so many targeted numbers that may stay. Raises PareError if none leaves the parameters asked for."""
        asked = self.method.budget
        if asked.parameters is None:
            assert asked.share is not None
            return asked.share
        total = sum(t.numel() for t in self.source.parameters.values())
        kept = (asked.parameters - (total - targeted)) / targeted
        if not 0 < kept < 1:
            raise PareError(
                f"target_parameters {asked.parameters:,} cannot be met: the model has {total:,}, of which "
                f"{targeted:,} are targeted. Ask for a number between {total - targeted:,} and {total:,}."
            )
        return kept

    def method_of(self, view: View) -> WeightMethod:
        """The method as it treats this layer, and as this kind of layer can hold its edits."""
        method = self.method.for_layer(view.name)
        return method if view.expert is None else method.for_experts()

    def method_for(self, view: View, options: Options | None) -> WeightMethod | None:
        """The method with what the allocation gives a layer; None where the layer stays dense."""
        method = self.method_of(view)
        if options is None:
            return method
        option: Any = options.get(view.name)
        return None if option is None else method.at(option)


def resolve_job(source: ModelSource, recipe: Recipe, format: Format = "packed") -> Job:
    """Raises PareError for a pattern that matches nothing, and where parts of the recipe, or recipe and format, clash."""
    method = recipe.build()
    assert isinstance(method, WeightMethod)
    all_blocks = blocks(source)
    check_walkable(source)
    views = [view for block in all_blocks for view in block.views()]
    head = name_of(source.model, "get_output_embeddings")
    targets, left_out = select(views, recipe.targets.include, recipe.targets.skip, head)
    if method.chain:
        _check_whole_experts(targets, left_out)
    if format == "dense":
        method = _without_packing(method, recipe, targets)
    strategy, allocation = _allocation(method, recipe.allocation, targets)
    job = Job(source, recipe, method, format, strategy, allocation, all_blocks, targets, left_out)
    _check_text(job)
    return job


def _check_text(job: Job) -> None:
    """Raises PareError where a job has no use for what its recipe says of the calibration text."""
    recipe = job.recipe
    if job.paired and recipe.order == "independent":
        raise PareError(
            f"order independent gives a layer the dense model's inputs, and {recipe.method} compares them with those of "
            "the compressed model: leave order out."
        )
    if recipe.calibration.domain is not None and not job.surveyed & GRADIENT_NEEDS:
        raise PareError(
            f"calibration.domain is the text of gradients, and {recipe.method} reads none: leave it out, or name the "
            "text as calibration.source."
        )
    if recipe.router_weight:
        _check_router([view for view in job.targets if view.expert is not None])


def _check_router(experts: Sequence[View]) -> None:
    """Raises PareError where the router weights of tokens are asked for and not known."""
    if not experts:
        raise PareError("router_weight is for experts, and no targeted layer is one of a fused weight: leave it out.")
    if untold := next((view for view in experts if not is_told_weights(view.module)), None):
        raise PareError(
            f"{type(untold.module).__name__} is not called with the router's weights, which router_weight asks for: leave "
            "it out."
        )


def _check_whole_experts(targets: Sequence[View], left_out: Sequence[View]) -> None:
    """Raises PareError where only some experts of a fused weight are factored: their factors are stored together."""
    owners = {view.owner: view for view in left_out if view.expert is not None}
    if part := next((view for view in targets if view.owner in owners), None):
        raise PareError(
            f"{part.name} is to be factored and {owners[part.owner].name} is not, but the experts of one fused weight are "
            f"stored together: name all of {part.owner} in targets, or none."
        )


def _without_packing(method: WeightMethod, recipe: Recipe, targets: Sequence[View]) -> WeightMethod:
    """The method as an ordinary checkpoint can hold its edits."""
    if recipe.reconstruct and method.chain:
        raise PareError(
            "reconstruction tunes factors, which a dense checkpoint cannot hold: write --format packed, "
            "then: paredown export OUT -o DENSE --format dense"
        )
    bare = next((view for view in targets if view.expert is None and view.bias is None), None)
    if bare is None:
        return method
    without = method.without_bias()
    if without is None:
        raise PareError(
            f"{bare.name} has no bias, and the affine form needs one, which an ordinary checkpoint cannot hold. "
            "Use --format packed, or --set affine=false."
        )
    return without


def _allocation(method: WeightMethod, asked: AllocationSpec | None, targets: Sequence[View]) -> tuple[str, Allocation]:
    """How one budget is spread over the layers: as the recipe asks, else as the method does by itself.

    Uniform where each layer settles its own option.
    """
    uniform = "uniform", AllocationSpec(strategy="uniform").build()
    if method.strategy is None:
        if asked is not None:
            raise PareError("this method offers no choices, so that an allocation has nothing to spread. Leave it out.")
        return uniform
    spec = asked or AllocationSpec(strategy=method.strategy, **method.spread)
    allocation = spec.build()
    allocation.check(sorted({view.name.rpartition(".")[2] for view in targets}), asked=asked is not None)
    if method.shares == "few":
        _check_picks(method, allocation, spec.strategy)
    if not method.budget.shared:
        if spec.strategy != "uniform" and asked is not None:
            raise PareError(
                f"allocation {spec.strategy} spends one budget: ask by kept or target_parameters"
                + (
                    ", not rank or energy."
                    if method.budget.asked
                    else "; this method chooses each rank by itself otherwise."
                )
            )
        return uniform
    if allocation.reads == "losses" and not method.predicts:
        raise PareError(
            f"allocation {spec.strategy} spends by predicted losses, and this method has none: take sensitivity or per_type."
        )
    return spec.strategy, allocation


def _check_picks(method: WeightMethod, allocation: Allocation, strategy: str) -> None:
    """Raises PareError unless this allocation can spend the budget of a method that has few choices for each layer."""
    picking = sorted(name for name, cls in ALLOCATIONS.classes().items() if issubclass(cls, Allocation) and cls.picks)
    if method.budget.shared:
        if not allocation.picks:
            raise PareError(
                f"allocation {strategy} spreads fractions, and an n:m pattern is the same wherever it is: kept leaves "
                f"some layers dense, which {' and '.join(picking)} choose. Write allocation: {{strategy: {picking[-1]}}}, or "
                "ask for a fraction such as sparsity: 0.5."
            )
    elif strategy != "uniform":
        raise PareError(
            f"allocation {strategy} has nothing to spread: an n:m pattern is the same in every layer. Say with kept, "
            "such as --set kept=0.6, how much may stay so that some layers stay dense, or ask for a fraction such as 0.5."
        )
