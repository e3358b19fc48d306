"""What the screen, the Markdown and the picture tell is what was measured."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from paredown.evaluation.schema import BenchResult
from paredown.evaluation.speed import Settings, measure
from paredown.evaluation.speed_plot import bench_svg
from paredown.evaluation.speed_report import bench_markdown, render_bench


@pytest.fixture
def result(packed, dense):
    """As the command makes it."""
    measured = measure({"model": packed, "against": dense}, Settings((1, 3), 16, 4, 2))
    for told in measured["memory"].values():
        told["growth_bytes"] = 1_000_000
    return {
        "schema": 1, "model": "org/small<1>", "against": "org/large & dense", "dtype": "bfloat16", "date": "2026-01-01",
        "device": {"type": "cpu", "name": "A <CPU>", "threads": 1}, "versions": {"torch": "2.0"},
        **measured,
    }  # fmt: skip


def test_the_result_is_of_its_type_and_holds_no_key_that_the_type_does_not_name(result, packed):
    alone = {**result, **measure({"model": packed}, Settings((2,), 16, 8, 1)), "against": None}
    for one in (result, json.loads(json.dumps(result)), alone):
        TypeAdapter(BenchResult).validate_python(one, extra="forbid")
    result["end_to_end"][0]["model"]["speed"] = 3
    with pytest.raises(ValidationError, match=r"end_to_end\.0\.model\.speed"):
        TypeAdapter(BenchResult).validate_python(result, extra="forbid")


def test_screen_and_markdown_show_both_models_their_ratio_and_the_protocol(result):
    console = Console(width=200)
    with console.capture() as shown:
        console.print(render_bench(result))
    for text in (shown.get(), bench_markdown(result)):
        assert "org/small<1>" in text and "org/large & dense" in text
        assert f"{result['end_to_end'][1]['ratio']['decode']:.2f}x" in text
        assert "2 repeats, the two models in turn; 16 random tokens of context" in text
        assert "sparse24" in text and "cache, batch 3" in text and "J/token" not in text


def test_energy_has_a_column_where_it_was_measured(result):
    for row in result["end_to_end"]:
        row["model"]["joules_per_token"], row["against"]["joules_per_token"] = 0.25, 0.5
    assert "| J/token, both |" in bench_markdown(result) and "| 0.5, 0.25 |" in bench_markdown(result)


def test_one_model_alone_has_no_ratio(packed, result):
    alone = {**result, **measure({"model": packed}, Settings((2,), 16, 8, 1)), "against": None}
    told = bench_markdown(alone)
    assert "| batch | phase | org/small<1> |" in told and "in turn" not in told
    assert "growth" not in told  # nobody watched it being loaded
    assert ET.fromstring(bench_svg(alone)) is not None


def test_bars_are_as_tall_as_the_rates_they_show(result):
    svg = ET.fromstring(bench_svg(result))
    space = "{http://www.w3.org/2000/svg}"
    for key in ("model", "against"):
        bars = [float(bar.get("height")) for bar in svg.iter(f"{space}rect") if bar.get("class") == key][1:]
        rates = [
            row[key][phase]["tokens_per_second"]["median"]
            for phase in ("prefill", "decode")
            for row in result["end_to_end"]
        ]
        for pair in (slice(0, 2), slice(2, 4)):  # each phase has its own scale
            assert bars[pair][0] / bars[pair][1] == pytest.approx(rates[pair][0] / rates[pair][1], rel=0.02)
    texts = [text.text for text in svg.iter(f"{space}text")]
    assert "org/small<1>" in texts and any(text.startswith("A <CPU>") for text in texts)
    assert all(float(bar.get("y")) >= 0 for bar in svg.iter(f"{space}rect"))


def test_the_picture_has_colours_for_light_and_dark_for_every_class_it_uses(result):
    svg = bench_svg(result)
    light, dark = svg.split("prefers-color-scheme: dark")
    used = set(re.findall(r'class="(\w+)"', svg)) - {"title"}
    assert used and all(f".{name} {{" in light and f".{name} {{" in dark for name in used)
