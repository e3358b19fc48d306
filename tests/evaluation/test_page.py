"""report.html: one file that says what report.json says, escaped, drawn alike every time, and shown right by a browser."""

import json
import re
import shutil
import struct
import subprocess
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from paredown.evaluation.html import svg
from paredown.evaluation.html.__main__ import main
from paredown.evaluation.html.heat import Scale, grid_of, heat_map, varies
from paredown.evaluation.html.page import report_page
from paredown.evaluation.html.spectra import spectra_chart

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


@pytest.fixture
def whole(report):
    """A report with every part that the page knows."""
    report["layers"] = [
        {
            **layer,
            "kept": 0.4 + 0.01 * i,
            "rank": 7,
            "kind": "pifa",
            "predicted_loss": 0.01,
            "measured_loss": 0.01 * (i + 1),
            "spectrum": {"ranks": [1, 7, 12], "energy": [0.5, 0.1, 0.0]},
        }
        for i, layer in enumerate(report["layers"][:12])
    ]
    apart = {
        "kl_mean": 0.195, "kl_stderr": 0.0016, "kl_median": 0.12, "kl_p99": 1.08, "kl_p999": 1.9, "kl_max": 7.6,
        "js_mean": 0.044, "js_stderr": 0.0003, "top1_agreement": 0.781, "top1_stderr": 0.002, "tokens": 999,
        "by_position": [
            {"first": 1, "last": 32, "kl_mean": 0.23, "kl_stderr": 0.003},
            {"first": 33, "last": 64, "kl_mean": 0.21, "kl_stderr": None},
        ],
    }  # fmt: skip
    report["evaluation"][0]["divergence"] = apart
    return {
        **report,
        "parts": [
            {"part": "mlp.down_proj", "before": 2_000_000_000, "after": 1_200_000_000},
            {"part": "model.norm", "before": 400_000_000, "after": 412_500_000},
        ],
        "reconstruction": [
            {"block": f"model.layers.{i}", "before": 0.1 * (i + 1), "after": 0.05 * (i + 1)} for i in range(3)
        ],
        "samples": [{"prompt": "The capital", "before": " of France <b>", "after": " of of"}],
        "date": "2026-01-02T03:04:05+00:00",
        "device": {"type": "cpu", "name": "A Processor", "threads": 2},
        "dtype": "bfloat16",
    }


@lru_cache
def _page(report):
    return report_page(json.loads(report))


def page_of(report):
    """The page, drawn once."""
    return _page(json.dumps(report))


class Reader(HTMLParser):
    """All that a page asks for or runs, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.fetched, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name.split(":")[-1] in ("href", "src", "srcset")]

    def handle_data(self, data):
        self.text += data


def test_the_page_says_what_was_done_and_what_it_cost_with_errors(whole):
    text = Reader(page_of(whole)).text
    for words in (
        "32.8% smaller", "2.40 GB → 1.61 GB", "× 1.488", "9.761 ± 0.052 → 14.520 ± 0.081", "+0.3971 ± 0.0021",
        "0.1950 ± 0.0016", "same top token 78.1%", "-0.0300 ± 0.0031", "beefbeefbeef", "A Processor (cpu, 2 threads)",
        "bfloat16", "2026-01-02", "abc123", "128 sequences of 2,048 tokens", "sparsity: '2:4'", "Sun et al. 2023",
        "Warnings: 1", "capped at 512", "Not done as the recipe says: 15", "1 h 3 min", "torch 2.11.0", "of France <b>", "of of",
    ):  # fmt: skip
        assert words in text, words


def test_it_needs_nothing_else_and_runs_nothing(whole):
    page = Reader(page_of(whole))
    assert not {"script", "link", "iframe", "img", "image"} & set(page.tags)
    assert all(address.startswith("#") for address in page.fetched)
    assert "url(http" not in page_of(whole)


def test_every_picture_is_there_and_the_same_report_gives_the_same_bytes(whole):
    page = page_of(whole)
    assert report_page(whole) == page
    labels = re.findall(r'<svg[^>]*aria-label="([^"]*)"', page)
    assert labels == [
        "KL divergence by position in the window", "Relative error by block and kind", "Kept share by block and kind",
        "Singular values by rank, and where they were cut",
        "Measured against predicted loss of each layer", "Error of each block", "Bytes by part, before and after", "Seconds by step",
    ]  # fmt: skip
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)


def test_colours_are_the_stylesheets_so_that_dark_pages_are_dark(whole):
    page = page_of(whole)
    assert "#0102" not in page and "#000000" not in page.split("</style>", 1)[1]
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    light, dark = page.split("prefers-color-scheme: dark")
    assert used and all(f"{name}:" in light and f"{name}:" in dark for name in used)


def test_names_and_texts_from_anywhere_are_escaped(whole):
    evil = '<script>alert("x")</script>'
    whole["model"]["id"] = f"org/{evil}"
    whole["warnings"] = [evil]
    whole["layers"][0]["name"] = f"model.layers.0.{evil}$x^2$"
    whole["parts"][0]["part"] = evil
    whole["recipe"]["name"] = evil
    page = report_page(whole)
    assert "script" not in Reader(page).tags and "&lt;script&gt;" in page
    assert "$x^2$" in page  # no mathematics is made of it


def test_without_matplotlib_the_page_has_tables_and_says_what_to_install(whole, monkeypatch):
    monkeypatch.setattr(svg, "installed", lambda: False)
    page = Reader(report_page(whole))
    assert "svg" not in page.tags and "pip install matplotlib" in page.text
    assert "Bytes by part" in page.text and "1.20 GB" in page.text and "1 h 2 min" in page.text


def test_nothing_but_the_sizes_is_needed(report):
    bare = {**report, "evaluation": [], "tasks": {}, "layers": [], "calibration": None, "fallbacks": [], "warnings": []}
    text = Reader(report_page(bare)).text
    assert "32.8% smaller" in text and "Before and after" not in text and "Warnings" not in text


def test_a_checkpoint_that_is_no_smaller_is_not_called_smaller(report):
    report["bytes"]["after"] = report["bytes"]["before"]
    assert "no smaller" in Reader(report_page(report)).text


def test_a_heat_map_has_a_cell_with_its_value_for_each_layer_and_the_mean_of_experts():
    grid = grid_of(
        {
            "h.0.mlp.experts.0.up": 0.1,
            "h.0.mlp.experts.1.up": 0.3,
            "h.2.attn.q": 0.5,
            "lm_head": 9.0,
            "h.1.attn.q": None,
        }
    )
    assert grid == {(0, "experts.up"): pytest.approx(0.2), (2, "attn.q"): 0.5}
    titles = re.findall("<title>(.*?)</title>", heat_map("map", "A map", grid, Scale("error")))
    assert titles == [
        "block 0, experts.up: 0.2", "block 1, experts.up: none", "block 2, experts.up: none",
        "block 0, attn.q: none", "block 1, attn.q: none", "block 2, attn.q: 0.5",
    ]  # fmt: skip


def test_spectra_of_three_blocks_are_shown_with_a_dot_at_each_cut():
    def layer(block, rank, energy):
        return {"name": f"h.{block}.mlp.up", "rank": rank, "spectrum": {"ranks": [1, 2, 9], "energy": energy}}

    drawn = spectra_chart([layer(b, 2, [0.5, 0.1, 0.0]) for b in range(7)])
    assert [f"block {b}" in drawn for b in range(7)] == [True, False, False, True, False, False, True]
    assert drawn.count("<use") == 3 and "mlp.up" in drawn
    assert spectra_chart([layer(0, 5, [0.5, 0.1, 0.0])]).count("<use") == 0  # a rank of which nothing is known
    assert spectra_chart([{"name": "h.0.mlp.up"}]) is None


def test_one_value_everywhere_is_no_picture():
    assert not varies({(0, "q"): 0.5, (1, "q"): 0.5}) and not varies({(0, "q"): 0.5}) and not varies({})
    assert varies({(0, "q"): 0.5, (1, "q"): 0.6})


def test_errors_of_zero_have_a_colour_on_a_logarithmic_scale():
    assert "<svg" in heat_map("map", "A map", {(0, "q"): 0.0, (1, "q"): 0.5}, Scale("error", log=True))


def test_the_page_of_a_folder_is_made_again_by_its_module(report, tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(report))
    main([str(tmp_path)])
    assert (tmp_path / "report.html").read_text() == page_of(report) and "report.html" in capsys.readouterr().out
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(SystemExit, match="no report of paredown"):
        main([str(tmp_path)])


def browse(tmp_path: Path, *options):
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", *options],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@in_chromium
def test_a_browser_shows_the_page(whole, tmp_path):
    (tmp_path / "report.html").write_text(page_of(whole))
    address, picture = (tmp_path / "report.html").as_uri(), tmp_path / "page.png"
    seen = browse(tmp_path, "--dump-dom", "--window-size=400,900", f"--screenshot={picture}", address)
    dom = Reader(seen)
    assert dom.tags.count("svg") == 8 and dom.tags.count("table") >= 6
    assert "Relative error by block and kind of layer." in dom.text
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (400, 900)
