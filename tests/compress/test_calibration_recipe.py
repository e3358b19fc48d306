"""The calibration of a recipe: one text or several, every fault told, and changes from the command line."""

import pytest

from paredown.compress.errors import PareError
from paredown.compress.recipe import Recipe
from paredown.compress.run.open import resolve_recipe


def calibration(**raw):
    return Recipe.parse({"method": "wanda", "options": {"sparsity": 0.5}, "calibration": raw}).calibration


def test_one_text_several_and_none_are_read_and_written_alike():
    assert calibration().source == "stdlib" and calibration(source="a").texts[0].source == "a"
    several = calibration(sources=["a", {"source": "b", "weight": 2, "chat": True}])
    assert [(text.source, text.weight, text.chat) for text in several.texts] == [("a", 1, False), ("b", 2, True)]
    for spec in (several, calibration(), calibration(source="c", chat=True, generate={"top_p": 0.5})):
        plain = spec.model_dump(mode="json", exclude_none=True)
        assert calibration(**plain) == spec and ("source" in plain) == (spec.sources is None)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"source": "a", "sources": ["b"]}, "name either one source or a list of sources"),
        ({"sources": []}, "each of sources has a source"),
        ({"sources": ["a"], "chat": True}, "and chat if it holds conversations"),
        ({"sources": [{"source": "a", "weight": 0}]}, "sources.0.weight: Input should be greater than 0; found 0"),
        ({"sources": [{"source": "a", "weight": float("inf")}]}, "no finite number"),
        ({"sources": [{"weight": 1}]}, "sources.0.source: this key is required"),
        ({"sources": [{"source": "a", "wieght": 1}]}, "sources.0.wieght: .*Did you mean 'weight'"),
        ({"generate": {"top_p": 2}}, "generate.top_p: .*less than or equal to 1"),
    ],
)
def test_each_fault_is_told_in_a_sentence(raw, told):
    with pytest.raises(PareError, match=told):
        calibration(**raw)


def test_the_command_line_replaces_all_texts():
    mixed = ["calibration.sources=[{source: a.txt, weight: 2}, b.jsonl]"]
    assert [text.source for text in Recipe.load("wanda-50", mixed).calibration.texts] == ["a.txt", "b.jsonl"]
    assert Recipe.load("wanda-50", [*mixed, "calibration.source=c.txt"]).calibration.source == "c.txt"
    assert resolve_recipe("wanda-50", mixed, calibration="d.txt").calibration.named == "d.txt"
    assert resolve_recipe("wanda-50", mixed, allow_scored=True).calibration.allow_scored
