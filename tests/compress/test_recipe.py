"""Recipes: strict, all faults at once, and every shipped one works."""

import pytest
import yaml
from pydantic import ValidationError

from paredown.compress.errors import PareError
from paredown.compress.methods import WeightMethod
from paredown.compress.recipe import Recipe, shipped_recipes


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_every_shipped_recipe_loads_builds_and_cites(name):
    recipe = Recipe.load(name)
    assert recipe.name == name and recipe.citation and "arXiv" in recipe.citation and recipe.description
    assert isinstance(recipe.build(), WeightMethod) and recipe.evaluate.perplexity == ("stdlib",)
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


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_an_unquoted_pattern_in_a_file_is_told_to_be_quoted(written, pattern):
    with pytest.raises(PareError, match=f'Quote it: sparsity: "{pattern}"'):
        Recipe.load(written(f"method: wanda\noptions:\n  sparsity: {pattern}\n"))
    quoted = Recipe.load(written(f'method: wanda\noptions: {{sparsity: "{pattern}"}}\n'))
    assert str(quoted.build().sparsity) == pattern


def test_unknown_recipes_and_methods_are_told_the_nearest():
    with pytest.raises(PareError, match=r"no recipe is called 'wanda-5O'.*Did you mean 'wanda-50'.*paredown recipes"):
        Recipe.load("wanda-5O")
    with pytest.raises(PareError, match=r"unknown method 'wnada'.*Did you mean 'wanda'"):
        Recipe.load("wanda-50", ["method=wnada"])
    with pytest.raises(PareError, match=r"recipe file .*none.yaml does not exist"):
        Recipe.load("none.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a mapping"),
        ("- wanda", "a mapping"),
        ("method: [", "no valid YAML"),
        (b"method: caf\xe9", "no UTF-8"),
        ("method: wanda\nmethd: x", "methd: there is no such key. Did you mean 'method'"),
        ("method: wanda\n3: x", "3"),
        ("method: wanda\noptions: {3: x}", "no option 3"),
        ("method: wanda\noptions: [0.5]", "options: "),
        ("method: wanda\ntargets: {skipp: []}", "targets.skipp.*Did you mean 'skip'"),
        ("method: wanda\ntargets: lm_head", "targets: "),
        ("method: wanda\ncalibration: {sequences: 0}", "calibration.sequences.*found 0"),
        ("method: wanda\ncalibration: {sequences: many}", "calibration.sequences.*found 'many'"),
        ("method: wanda\nevaluate: {perplexity: stdlib}", "evaluate.perplexity"),
        ("method: wanda\nidle: drop", "idle: "),
    ],
)
def test_files_with_a_fault_are_refused_and_the_fault_is_named(written, text, said):
    with pytest.raises(PareError, match=f"(?s){said}"):
        Recipe.load(written(text))


@pytest.mark.parametrize("override", ["evaluate.perplexity=[a", "sparsity='2", "sparsity={"])
def test_an_override_that_is_no_yaml_is_refused(override):
    with pytest.raises(PareError, match=r"--set .*no valid YAML"):
        Recipe.load("wanda-50", [override])


@pytest.mark.parametrize("key", ["sparsity", "options.sparsity"])
@pytest.mark.parametrize(("typed", "built"), [("2:4", "2:4"), (" 1:4 ", "1:4"), ("'2:4'", "2:4"), ("0.7", "0.7")])
def test_patterns_need_no_quotes_on_the_command_line(key, typed, built):
    assert str(Recipe.load("wanda-50", [f"{key}={typed}"]).build().sparsity) == built


def test_a_bare_name_is_an_option_unless_it_is_a_key_of_the_recipe():
    recipe = Recipe.load("wanda-sparsegpt-2of4", ["mask=magnitude", "damping=0.1", "idle=dense"])
    assert recipe.options["mask"] == "magnitude" and recipe.options["damping"] == 0.1 and recipe.idle == "dense"
    with pytest.raises(PareError, match=r"no option 'dampng'.*Did you mean 'damping'"):
        Recipe.load("sparsegpt-50", ["dampng=0.1"])


def test_the_last_override_wins_and_the_shipped_recipe_stays_as_it_was():
    assert Recipe.load("wanda-50", ["sparsity=0.6", "sparsity=0.7"]).build().sparsity == 0.7
    assert Recipe.load("wanda-50").build().sparsity == shipped_recipes()["wanda-50"].build().sparsity == 0.5


def test_a_recipe_cannot_be_changed_and_takes_the_defaults_of_the_field():
    recipe = Recipe.parse({"method": "wanda"})
    assert recipe.targets.skip == ("lm_head",) and recipe.calibration.source == "stdlib"
    assert (recipe.calibration.sequences, recipe.calibration.length, recipe.evaluate.length) == (128, 2048, 2048)
    with pytest.raises(ValidationError):
        recipe.method = "magnitude"


def test_a_folder_that_is_called_as_a_recipe_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "wanda-50").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("wanda-50").method == "wanda"


def test_a_key_that_stands_twice_is_a_fault(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("method: wanda\noptions: {sparsity: 0.5}\noptions: {sparsity: 0.7}\n")
    with pytest.raises(PareError, match=r"the key 'options' stands twice(.|\n)*line 3"):
        Recipe.load(str(path))
