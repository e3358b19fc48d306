"""Whole runs of recipes that are given as plain data, and tasks of a user's own."""

import json

import pytest
import yaml

from paredown.compress import compress

SMALL = ("calibration.sequences=4", "calibration.length=32", "evaluate.length=32", "evaluate.windows=4")


@pytest.fixture
def run_raw(text_file, tmp_path, verified_here):
    """`run_raw(model, raw, out)`: a recipe given as plain data, run on little text into OUT; its report."""

    def go(model, raw, out="out", **options):
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(raw))
        text = {"calibration": str(text_file), "eval_text": [str(text_file)], "allow_scored_calibration": True}
        return compress(model, str(path), tmp_path / out, overrides=SMALL, **text, **options)

    return go


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks of multiple choice."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"q": f"{i} and", "choices": [f"{i}", "x", f"{i} {i}"], "answer": i % 3} for i in range(7)]
    (folder / "mc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {folder / 'mc.jsonl'}}}}}\n"
            "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: choices\ndoc_to_target: answer\n"
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        )
    return folder
