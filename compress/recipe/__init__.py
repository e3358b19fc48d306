"""Recipes: what is done to a model."""

from paredown.compress.recipe.reading import shipped_names
from paredown.compress.recipe.recipe import STAGES, Order, Recipe, shipped_recipes
from paredown.compress.recipe.recovery import DistillSpec, HiddenSpec, LoraSpec, ReconstructSpec, RecoverStep, TaidSpec
from paredown.compress.recipe.spec import CalibrationSpec, EvaluateSpec, GenerateSpec, SourceSpec, Targets

__all__ = [
    "STAGES",
    "CalibrationSpec",
    "DistillSpec",
    "EvaluateSpec",
    "GenerateSpec",
    "HiddenSpec",
    "LoraSpec",
    "Order",
    "Recipe",
    "ReconstructSpec",
    "RecoverStep",
    "SourceSpec",
    "TaidSpec",
    "Targets",
    "shipped_names",
    "shipped_recipes",
]
