"""Finished runs side by side: what is compared, what is not, and which runs no other beats."""

import copy
import io
import json
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from paredown.commands.app import app
from paredown.compress.errors import PareError
from paredown.evaluation.compare import compare, parse_axes
from paredown.evaluation.compare_tables import render_comparison
from paredown.evaluation.html.comparison import comparison_page


@pytest.fixture
def save(report, tmp_path):
    """`save(name, bytes, rise)`: a folder with the report of a run that is so large and lost so much."""
    report["layers"] = []

    def write(name, size=1_000_000_000, rise=0.3, change=lambda report: None):
        other = copy.deepcopy(report)
        other["bytes"]["after"] = size
        other["evaluation"][0]["paired_delta"]["log_ratio"] = rise
        change(other)
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(other))
        return folder

    return write


def screen(groups, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(render_comparison(groups))
    return console.file.getvalue()


def test_the_front_holds_the_runs_that_no_other_beats(save):
    runs = {"small": (1, 0.5), "beaten": (2, 0.6), "middle": (2, 0.4), "large": (3, 0.1), "as_large": (3, 0.2)}
    (group,) = compare([save(name, size * 10**8, rise) for name, (size, rise) in runs.items()])
    assert [run.name for run in group.front("bytes", "perplexity")] == ["small", "middle", "large"]
    assert {run["name"] for run in group.to_dict()["runs"] if run["front"]} == {"small", "middle", "large"}


def test_a_screen_of_80_columns_shows_bytes_parameters_losses_with_errors_tasks_and_options(save):
    def dense(report):
        report["recipe"]["options"]["sparsity"] = "4:8"

    shown = screen(compare([save("one"), save("two", 1_500_000_000, 0.2, dense)]))
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.splitlines() if line.strip()}
    assert rows["one*"] == "1.00 GB 750.00 M +0.3000 ± 0.0021 3,768 s"
    assert rows["dense"] == "2.40 GB 1.20 B 0 0"
    assert "341,469 tokens in windows of 2,048" in shown and "-0.0300 ± 0.0031" in shown
    assert re.search(r"one +wanda-2-4 +sparsity 2:4", shown) and re.search(r"two +wanda-2-4 +sparsity 4:8", shown)
    assert max(map(len, shown.splitlines())) <= 80


def test_what_recovered_a_run_is_told(save):
    def recovered(report):
        step = dict.fromkeys(
            ("trained", "steps", "passes", "before", "after", "best_tokens", "seconds", "target_bytes"), 1
        )
        words = {"step": "distill", "tokens": 2048, "teacher": "m", "stopped": "", "recipe": {}, "settings": {}}
        report["recovery"] = [{**step, **words, "curve": [], "remarks": []}]

    shown = screen(compare([save("one"), save("two", 1_000_000_000, 0.2, recovered)]))
    assert re.search(r"two +wanda-2-4 +recovered distill by 2,048 tokens", shown)


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report["model"].update(id="org/other"),
        lambda report: report["model"].update(revision="def456"),
        lambda report: report["evaluation"][0].update(sha256="f00d" * 16),
        lambda report: report["evaluation"][0].update(length=1024),
    ],
)
def test_runs_of_another_model_or_text_are_a_group_of_their_own(save, change):
    groups = compare([save("one"), save("two"), save("other", change=change)])
    assert [[run.name for run in group.runs] for group in groups] == [["one", "two"], ["other"]]
    assert "2 groups: runs of different models or texts are not compared" in screen(groups)
    assert comparison_page(groups).count("<svg") == 1


def test_a_dense_model_that_scores_otherwise_is_remarked_on(save):
    (group,) = compare(
        [save("one"), save("two", change=lambda r: r["evaluation"][0]["before"].update(token_perplexity=9.9))]
    )
    assert "two: its dense model has perplexity 9.9000" in group.remarks[0] and "Remarks: 1" in screen([group])


def test_recipes_that_were_run_several_times_are_lines_and_points_say_in_what_they_differ(save):
    def run(recipe, sparsity):
        def change(report):
            report["recipe"] |= {"name": recipe, "options": {"sparsity": sparsity}}

        return save(f"{recipe}_sparsity-{sparsity}", round(10**9 * (1 - sparsity)), sparsity, change)

    folders = [run(recipe, sparsity) for recipe in ("wanda", "sparsegpt") for sparsity in (0.4, 0.6)]
    page, names = comparison_page(compare(folders)), [folder.name for folder in folders]
    drawn = page[page.index("<svg") : page.index("</svg>")]
    assert ">wanda<" in drawn and ">sparsegpt<" in drawn and ">0.6<" in drawn
    assert not any(name in drawn for name in names) and all(name in page for name in names)
    assert "sparsegpt_ " in screen(compare(folders)) and " sparsity-0.6" in screen(compare(folders))
    other = save("other", change=lambda report: report["recipe"].update(name="ria", options={"sparsity": 0.5}))
    drawn = comparison_page(compare([*folders, other])).split("</svg>")[0]
    assert all(f">{name}<" in drawn for name in names)


def test_folders_of_one_name_are_told_apart(save):
    (group,) = compare([save("a/out"), save("b/out")])
    assert [run.name for run in group.runs] == ["out", "b/out"]


def test_one_run_or_none_and_a_folder_without_report_are_refused(save, tmp_path):
    folder = save("one")
    with pytest.raises(PareError, match="nothing to be compared with"):
        compare([folder, folder / "../one"])
    with pytest.raises(PareError, match=r"holds no report\.json"):
        compare([folder, tmp_path])
    (folder / "report.json").write_text("{")
    with pytest.raises(PareError, match="cannot be read"):
        compare([folder, save("two")])


def test_latency_comes_from_bench_json_and_is_asked_for_only_where_every_run_has_it(save):
    folders = [save("one"), save("two")]
    with pytest.raises(PareError, match=r"no bench\.json in one, two"):
        parse_axes("latency", "perplexity", compare(folders))
    for folder in folders:
        row = {"decode": 64, "model": {"decode": {"seconds": {"median": 1.6}}}}
        (folder / "bench.json").write_text(json.dumps({"end_to_end": [row]}))
    groups = compare(folders)
    assert groups[0].runs[0].latency == 0.025
    assert "seconds per decoded token" in comparison_page(groups, *parse_axes("latency", "perplexity", groups))
    (folders[0] / "bench.json").write_text("{}")
    with pytest.raises(PareError, match="no result of paredown bench"):
        compare(folders)


def test_kl_is_shown_and_drawn_where_it_was_measured(save):
    def apart(report):
        figures = dict.fromkeys(
            ("kl_mean", "kl_median", "kl_p99", "kl_p999", "kl_max", "js_mean", "top1_agreement"), 0.25
        )
        errors = dict.fromkeys(("kl_stderr", "js_stderr", "top1_stderr"), 0.01)
        report["evaluation"][0]["divergence"] = {**figures, **errors, "tokens": 9, "by_position": []}

    with pytest.raises(PareError, match="no KL divergence in the report of two"):
        parse_axes("bytes", "kl", compare([save("one", change=apart), save("two")]))
    groups = compare([save("three", change=apart), save("four", change=apart)])
    assert "0.250 ± 0.010" in screen(groups)
    assert "KL from the dense model" in comparison_page(groups, *parse_axes("bytes", "kl", groups))


def test_the_command_prints_json_alone_and_writes_a_page(save, tmp_path):
    folders = [str(save(name)) for name in ("one", "two")]
    done = CliRunner().invoke(app, ["compare", *folders, "--json", "--html", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert [run["name"] for run in json.loads(done.stdout)[0]["runs"]] == ["one", "two"]
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1 and "+0.3000 ± 0.0021" in page and "<script" not in page
    refused = CliRunner().invoke(app, ["compare", *folders, "--html", str(tmp_path / "nowhere/page.html")])
    assert isinstance(refused.exception, PareError) and "in a folder that is there" in str(refused.exception)


def test_pandas_reads_the_layers_of_a_report_in_one_line(report, tmp_path):
    pandas = pytest.importorskip("pandas")
    (tmp_path / "report.json").write_text(json.dumps(report))
    layers = pandas.json_normalize(json.load((tmp_path / "report.json").open()), "layers")
    assert len(layers) == len(report["layers"]) and layers["kept"].mean() == 0.5
    (whole,) = pandas.json_normalize([report]).to_dict("records")
    assert whole["bytes.after"] == report["bytes"]["after"] and whole["recipe.options.sparsity"] == "2:4"
