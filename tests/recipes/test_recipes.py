"""Every shipped recipe: it does what its name says, cites whose work it is, and quotes what YAML would misread."""

import re
from importlib.resources import files

import pytest
import torch
import yaml

from paredown.compress.methods import methods
from paredown.compress.recipe import Recipe, shipped_recipes
from paredown.compress.sparsity import NofM
from paredown.compress.statistics import NEEDS, InputStats

FILES = {f.name.removesuffix(".yaml"): f for f in files("paredown.recipes").iterdir() if f.name.endswith(".yaml")}
PAPERS = {
    "magnitude": ["1506.02626"], "wanda": ["2306.11695"], "sparsegpt": ["2301.00774"], "masked": ["2306.11695"],
}  # fmt: skip


@pytest.fixture(params=sorted(FILES))
def name(request):
    return request.param


def promised(name):
    """The sparsity that a recipe's name promises."""
    if found := re.search(r"-(\d+)of(\d+)$", name):
        return NofM(int(found[1]), int(found[2]))
    return int(re.search(r"-(\d+)$", name)[1]) / 100


def test_the_shipped_recipes_are_the_files_of_the_folder():
    assert list(shipped_recipes()) == sorted(FILES) and len(FILES) >= 9


def test_every_method_has_a_recipe():
    assert {recipe.method for recipe in shipped_recipes().values()} == set(PAPERS) <= set(methods())


def test_a_recipe_says_its_name_what_it_does_and_whose_work_it_is(name):
    recipe = Recipe.load(name)
    assert recipe.name == name and recipe.description
    assert re.findall(r"arXiv (\d{4}\.\d{5})", recipe.citation) == PAPERS[recipe.method]


def test_a_recipe_has_the_sparsity_of_its_name(name):
    assert Recipe.load(name).build().sparsity == promised(name)


def test_a_recipe_removes_what_it_promises(name):
    torch.manual_seed(0)
    method = Recipe.load(name).build()
    stats = InputStats(32, NEEDS)
    stats.update(torch.randn(200, 32) @ torch.randn(32, 32))
    weight = torch.randn(24, 32).bfloat16()
    edit, sparsity = method.compress(weight, stats), promised(name)
    if isinstance(sparsity, NofM):
        assert edit.keep.view(24, -1, sparsity.m).sum(-1).eq(sparsity.n).all()
    else:
        assert edit.kept == weight.numel() - round(sparsity * weight.numel())
    assert torch.equal(edit.weight != 0, edit.keep & (edit.weight != 0)) and edit.weight.dtype == weight.dtype
    assert 0 < edit.relative_error(weight, stats) < 1


def test_a_recipe_asks_for_no_statistics_that_do_not_exist(name):
    assert Recipe.load(name).build().needs <= NEEDS


def test_a_recipe_calibrates_and_scores_without_a_network_and_leaves_the_head(name):
    recipe = Recipe.load(name)
    assert recipe.calibration.source == "stdlib" and recipe.evaluate.perplexity == ("stdlib",)
    assert (recipe.calibration.sequences, recipe.calibration.length, recipe.evaluate.length) == (128, 2048, 2048)
    assert "lm_head" in recipe.targets.skip


def test_a_file_writes_out_every_default_it_stands_on(name):
    raw = yaml.safe_load(FILES[name].read_text())
    assert list(raw) == ["name", "description", "citation", "method", "options", "targets", "calibration", "evaluate"]
    assert set(raw["calibration"]) == {"source", "sequences", "length", "seed"} and "sparsity" in raw["options"]


def test_a_pattern_is_quoted_in_the_file(name):
    sparsity = yaml.safe_load(FILES[name].read_text())["options"]["sparsity"]
    assert isinstance(sparsity, str if "of" in name.rsplit("-", 1)[1] else float)


def test_a_recipe_survives_the_way_into_a_report_and_back(name):
    recipe = Recipe.load(name)
    assert Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe == shipped_recipes()[name]
