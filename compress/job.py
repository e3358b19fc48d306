"""What a recipe comes to for one model, by names and shapes alone: all that can be refused before a weight is read is."""

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

from paredown.compress.allocation.budget import AllocationSpec
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.model.blocks import blocks, select
from paredown.compress.model.stream import name_of
from paredown.compress.numerics.moments import GRADIENT_NEEDS
from paredown.compress.recipe import Recipe


def targeted(source: ModelSource, recipe: Recipe) -> set[str]:
    """Names of the views that the recipe's patterns choose. Raises PareError for a pattern that matches nothing."""
    views = [view for block in blocks(source) for view in block.views()]
    head = name_of(source.model, "get_output_embeddings")
    return {v.name for v in select(views, [*recipe.targets.include], [*recipe.targets.skip], head)[0]}


def for_format(source: ModelSource, recipe: Recipe, method: Any, format: str) -> Any:
    """The method as a checkpoint of this format can hold it. Raises PareError where none can."""
    if format != "dense":
        return method
    if recipe.reconstruct and hasattr(method, "spec"):
        raise PareError(
            "reconstruction tunes factors, which a dense checkpoint cannot hold: write --format packed, "
            "then: paredown export OUT -o DENSE --format dense"
        )
    if not getattr(method, "affine", False):
        return method
    chosen = targeted(source, recipe)
    views = [v for block in blocks(source) for v in block.views() if v.name in chosen and v.expert is None]
    bare = [v.name for v in views if getattr(v.module, "bias", None) is None]
    if bare and method.adds_bias:
        raise PareError(
            f"{bare[0]} has no bias, and the affine form needs one, which an ordinary checkpoint cannot hold. "
            "Use --format packed, or --set affine=false."
        )
    return replace(method, affine=False) if bare else method


def spread(method: Any, asked: AllocationSpec | None, names: Iterable[str]) -> AllocationSpec:
    """How ranks are spread over the targeted layers: as the recipe asks, else as the method does by itself.

    Uniform where each layer settles its own rank. Raises PareError where the parts of a recipe do not go together.
    """
    uniform = AllocationSpec(strategy="uniform")
    if not isinstance(method, Factorized):
        if asked is not None:
            raise PareError("allocation spreads ranks over layers: it goes with low-rank methods only. Leave it out.")
        return uniform
    spec = asked or AllocationSpec(strategy=method.allocation, weights=getattr(method, "type_weights", {}))
    _check_weights(spec, names, every=asked is not None)
    if not (method.share or method.target_parameters):
        if spec.strategy != "uniform" and asked is not None:
            raise PareError(
                f"allocation {spec.strategy} spends one budget: ask by kept or target_parameters"
                + (", not rank or energy." if method.asked else "; this method chooses each rank by itself otherwise.")
            )
        return uniform
    if spec.strategy in ("global", "theoretical_loss") and not method.predicts:
        raise PareError(
            f"allocation {spec.strategy} spends by predicted losses, and this method has none: take sensitivity or per_type."
        )
    if spec.strategy == "sensitivity" and method.needs & GRADIENT_NEEDS:
        raise PareError("allocation sensitivity goes forward through the model: choose a method without gradients.")
    return spec


def _check_weights(spec: AllocationSpec, names: Iterable[str], every: bool) -> None:
    """Weights that nobody would hear of: of a recipe each one must match, of a method's own any."""
    last = sorted({name.rpartition(".")[2] for name in names})
    unheard = [p for p in spec.weights if spec.strategy != "per_type" or not any(fnmatch(name, p) for name in last)]
    if unheard and (every or len(unheard) == len(spec.weights)):
        raise PareError(
            f"allocation.weights {unheard[0]!r}: weights go with strategy per_type and name the last part of layers: "
            f"{', '.join(last)}. For instance: --set 'allocation={{strategy: per_type, weights: {{{last[0]}: 2}}}}'"
        )
