"""Recipes: strict, all faults at once, and every shipped one works."""

import pytest
import yaml

from paredown.compress.errors import PareError
from paredown.compress.recipe import Recipe, shipped_recipes


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_every_shipped_recipe_loads_builds_and_cites(name):
    recipe = Recipe.load(name)
    assert recipe.name == name and recipe.citation and "arXiv" in recipe.citation and recipe.description
    assert recipe.build().needs and recipe.evaluate.perplexity == ("stdlib",)
    assert Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_overrides_need_no_quotes_and_know_the_options():
    recipe = Recipe.load("sparsegpt-2of4", ["sparsity=4:8", "calibration.sequences=16", "targets.skip=[q_proj]"])
    assert recipe.options["sparsity"] == "4:8" and recipe.calibration.sequences == 16
    assert (
        recipe.targets.skip == ("q_proj",)
        and Recipe.load("wanda-50", ["options.sparsity=0.6"]).options["sparsity"] == 0.6
    )


@pytest.mark.parametrize("override", ["sparsity", "=3", "method.name=3"])
def test_overrides_that_make_no_sense_are_refused(override):
    with pytest.raises(PareError, match="--set"):
        Recipe.load("wanda-50", [override])


def test_faults_of_keys_and_of_options_come_together():
    with pytest.raises(
        PareError, match=r"(?s)evaluate.lenght: there is no such key. Did you mean 'length'.*sparsity 7"
    ):
        Recipe.parse({"method": "wanda", "options": {"sparsity": 7}, "evaluate": {"lenght": 3}})
    with pytest.raises(PareError, match="method: this key is required"):
        Recipe.parse({"options": {}})
