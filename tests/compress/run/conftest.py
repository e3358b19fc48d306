"""Whole runs of recipes that are given as plain data, for the tests of what leaves a smaller model."""

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
