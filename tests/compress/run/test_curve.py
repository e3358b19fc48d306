"""The plan's curve of shares: from the same survey as a run, and refused where there is none."""

import json

import pytest

from paredown.compress.errors import PareError
from paredown.compress.recipe import Recipe
from paredown.compress.run.curve import loss_curve


@pytest.fixture
def curve_of(tiny_model, text_file):
    """`curve_of(method, option=value, ...)`: the curve of a tiny Llama."""

    def run(method, **options):
        recipe = Recipe.parse(
            {
                "method": method,
                "options": options,
                "calibration": {"source": str(text_file), "sequences": 4, "length": 32},
            }
        )
        return loss_curve(tiny_model, recipe)

    return run


def test_widths_are_predicted_to_lose_less_the_more_stays_and_uneven_ones_least(curve_of):
    curve = curve_of("paredown_width", kept=0.8, multiple=4, shrink=0.0)
    assert [row["kept"] for row in curve.rows[:3]] == [0.95, 0.9, 0.85] and len(curve.rows) >= 5
    for key in ("equal", "by cost"):
        losses = [row[key] for row in curve.rows]
        assert losses == sorted(losses) and losses[0] > 0
    assert all(row["by cost"] <= row["equal"] for row in curve.rows)
    assert "calibration text" in curve.caption and "128 tokens" in curve.caption and "shrink: 0" in curve.caption
    assert json.loads(json.dumps(curve.to_dict())) == curve.to_dict()


def test_what_the_recipe_keeps_does_not_change_the_curve(curve_of):
    given = {"multiple": 4, "shrink": 0.5}
    assert curve_of("paredown_width", kept=0.9, **given) == curve_of(
        "paredown_width", units=32, widths="direct", **given
    )


def test_blocks_are_shown_with_the_divergence_that_was_measured(curve_of, tiny_model):
    (row,) = curve_of("greedy_depth", blocks=1).rows
    assert row["blocks"] == 1 and row["kept"] == 0.5 and row["removed"] in (0, 1) and row["KL"] > 0


@pytest.mark.parametrize(
    ("method", "options"), [("wanda", {"sparsity": 0.5}), ("shortgpt", {"kept": 0.5}), ("reap", {"kept": 0.5})]
)
def test_other_methods_are_refused(curve_of, method, options):
    with pytest.raises(
        PareError, match=f"--curve cannot be measured for {method}: it is for methods that remove channels"
    ):
        curve_of(method, **options)


def test_of_several_stages_the_first_is_measured(tiny_model, text_file):
    stages = [{"method": "greedy_depth", "options": {"blocks": 1}}, {"method": "wanda", "options": {"sparsity": 0.5}}]
    text = {"source": str(text_file), "sequences": 2, "length": 32}
    assert len(loss_curve(tiny_model, Recipe.parse({"stages": stages, "calibration": text})).rows) == 1


def test_hidden_states_that_do_not_fit_are_told_of_before_any_is_written(curve_of, monkeypatch):
    from paredown.compress.run import curve as module

    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Disk", (), {"free": 100})())
    with pytest.raises(PareError, match=r"0\.0 GB free: name another folder in TMPDIR"):
        curve_of("paredown_width", kept=0.8, multiple=4)
