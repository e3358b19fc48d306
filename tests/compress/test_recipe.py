"""Recipes: strict, all faults at once, and every shipped one works."""

import re

import pytest
import yaml
from pydantic import ValidationError

from paredown.compress.errors import PareError
from paredown.compress.methods import Method
from paredown.compress.recipe import Recipe, shipped_recipes


@pytest.mark.parametrize("name", [name for name, recipe in shipped_recipes().items() if recipe.compresses])
def test_every_shipped_recipe_loads_builds_and_cites(name):
    recipe = Recipe.load(name)
    assert recipe.name == name and re.search(r"arXiv|ICLR|baseline", recipe.citation) and recipe.description
    assert all(isinstance(one.build(), Method) for one in recipe.each_stage or [recipe])
    assert recipe.evaluate.perplexity == ("stdlib",)
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


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{[a]: b}", "no key"),
        ("{{a: b}: c}", "no key"),
        ("&a [*a]", "deep in each other"),
        ("[" * 100 + "]" * 100, "deep in each other"),
        ("[" * 3000, "deep in each other"),
        ("[" + ",".join("x" * 20_002) + "]", "more than 10,000 values"),
        ("9" * 5000, "cannot be read"),
        ("0x" + "f" * 5000, "20,000 bits is too large"),
        ("9" * 30, "bits is too large"),
        (".nan", "no finite number"),
        ("-.inf", "no finite number"),
        ("nan", "no finite number"),
        ("1.0e+999", "no finite number"),
        ("2020-01-01", "neither a word nor a number"),
        ("2020-13-45", "cannot be read"),
        ("!!binary aGk=", "neither a word nor a number"),
        ("!!int ''", "cannot be read"),
        ("!!python/object:os.system x", "could not determine a constructor"),
        ("x" * 20_000, "20,000 characters is too long"),
        ('"\\0"', "a character that no text has"),
        ('"\\ud800"', "a character that no text has"),
        ("{a: 1, a: 2}", "stands twice"),
    ],
)
def test_values_that_no_recipe_needs_are_one_sentence_in_a_file_and_on_the_command_line(written, value, said):
    for load in (
        lambda: Recipe.load(written(f"method: wanda\noptions: {{sparsity: 0.5}}\ndescription: {value}\n")),
        lambda: Recipe.load("wanda-50", [f"sparsity={value}"]),
    ):
        with pytest.raises(PareError, match=f"(?s){said}") as fault:
            load()
        assert len(str(fault.value).encode()) < 1000


def test_aliases_that_grow_without_end_are_refused_and_others_are_not(written):
    with pytest.raises(PareError, match="more than 10,000 values, those that an alias repeats counted each time"):
        Recipe.load(written(f"method: wanda\n{BOMB}"))
    text = "method: wanda\noptions: {sparsity: 0.5}\ncalibration: {length: &n 64}\nevaluate: {length: *n}\n"
    assert Recipe.load(written(text)).evaluate.length == 64


@pytest.mark.parametrize("value", ["true", "'3'", "3.0", "-1", "[3]", "~", "2000000000000"])
@pytest.mark.parametrize("key", ["calibration.sequences", "calibration.length", "evaluate.length"])
def test_counts_are_whole_numbers_and_nothing_that_passes_for_them(key, value):
    with pytest.raises(PareError, match=key):
        Recipe.load("wanda-50", [f"{key}={value}"])


def test_what_is_no_recipe_file_is_one_sentence(written, tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(PareError, match="is a folder"):
        Recipe.load(str(tmp_path / "folder.yaml"))
    with pytest.raises(PareError, match="more than 262,144 bytes"):
        Recipe.load(written("#" * 300_000))
    for name in ("x" * 5000, "x" * 5000 + ".yaml", "a\0b.yaml"):
        with pytest.raises(PareError):
            Recipe.load(name)
    with pytest.raises(PareError, match="no UTF-8"):
        Recipe.load(written("method: wanda".encode("utf-16")))
    with pytest.raises(PareError, match="plugin"):
        Recipe.load("wanda-50", [f"plugins=[{'x' * 5000}.py]"])


def test_the_rule_for_the_bos_is_one_key_for_the_whole_recipe():
    assert Recipe.load("wanda-50").bos == "auto" and Recipe.load("wanda-50", ["bos=none"]).bos == "none"
    with pytest.raises(PareError, match="bos"):
        Recipe.load("wanda-50", ["bos=never"])


def test_a_key_that_stands_twice_is_a_fault(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("method: wanda\noptions: {sparsity: 0.5}\noptions: {sparsity: 0.7}\n")
    with pytest.raises(PareError, match=r"the key 'options' stands twice(.|\n)*line 3"):
        Recipe.load(str(path))
