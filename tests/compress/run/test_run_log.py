"""log.jsonl: every block, step and score has its line, a stop loses none, and a board gets the same numbers or stops nothing."""

import json
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from paredown.compress.errors import PareError
from paredown.compress.progress import Measured, Progress
from paredown.compress.run import boards
from paredown.compress.run.boards import check_board, open_board
from paredown.compress.run.compress import compress
from paredown.compress.run.run_log import RunLog, logged

SMALL = ["calibration.sequences=3", "calibration.length=16", "evaluate.length=16", "evaluate.windows=4"]


@pytest.fixture
def run(tiny_model, text_file, tmp_path, verified_here):
    def go(out="out", recipe="wanda-50", **options):
        text = {"calibration": str(text_file), "eval_text": [str(text_file)]}
        overrides = [*SMALL, *options.pop("overrides", [])]
        return compress(tiny_model, recipe, tmp_path / out, overrides=overrides, **text, **options)

    return go


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_line_for_each_block_and_score_with_the_reports_numbers(run, tmp_path):
    report = run()
    told = lines(tmp_path / "out")
    assert told[0]["kind"] == "begin" and told[0]["recipe"] == report["recipe"]
    blocks = [line for line in told if line["kind"] == "block"]
    assert [(line["step"], line["name"]) for line in blocks] == [(0, "model.layers.0"), (1, "model.layers.1")]
    errors = [layer["relative_error"] for layer in report["layers"] if ".layers.1." in layer["name"]]
    assert blocks[1]["relative_error"] == pytest.approx(sum(errors) / len(errors))
    score, entry = next(line for line in told if line["kind"] == "score"), report["evaluation"][0]
    assert score["after"] == entry["after"]["token_perplexity"] and score["kl_mean"] == entry["divergence"]["kl_mean"]
    assert sorted(line["time"] for line in told) == [line["time"] for line in told]


def test_a_run_that_goes_on_adds_to_the_log(run, tmp_path):
    class Stopped(Exception):
        pass

    def stop(done):
        raise Stopped

    with pytest.raises(Stopped):
        run(progress=stop, save_every=0)
    assert [line["step"] for line in lines(tmp_path / "out.partial") if line["kind"] == "block"] == [0]
    run(save_every=0)
    kinds = [line["kind"] for line in lines(tmp_path / "out")]
    assert kinds.count("begin") == 2 and kinds.count("block") >= 2 and kinds[-1] == "note"


def test_tuning_and_training_are_logged_step_by_step(run, tmp_path):
    run(recipe="recover-distill", overrides=["method=wanda", "options={sparsity: 0.5}", "recover=[{distill: {tokens: 96, length: 16, batch: 2}}]"])  # fmt: skip
    told = lines(tmp_path / "out")
    steps = [line["step"] for line in told if line["kind"] == "distill"]
    assert steps == [1, 2, 3] and next(line for line in told if line["kind"] == "heldout")["step"] == 0
    assert [line["kind"] for line in told].count("block") == 2


@pytest.fixture
def trackio(monkeypatch):
    """A stand-in for the library: what it was called with."""
    calls = []
    module = SimpleNamespace(
        init=lambda **asked: calls.append(asked), log=calls.append, finish=lambda: calls.append("finish")
    )
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setattr(boards, "find_spec", lambda name: object() if name == "trackio" else None)
    return calls


def test_a_board_gets_recipe_blocks_and_scores(run, trackio):
    report = run(log_to="trackio")
    first, *numbers, last = trackio
    assert first["project"] == "paredown" and first["name"] == "out" and first["config"]["recipe"] == report["recipe"]
    assert [line["block/step"] for line in numbers if "block/step" in line] == [0, 1] and last == "finish"
    name = next(key for line in numbers for key in line if key.startswith("score/") and key.endswith("after"))
    assert {line.get(name) for line in numbers} - {None} == {report["evaluation"][0]["after"]["token_perplexity"]}


def test_a_board_that_fails_stops_nothing_and_one_that_refuses_is_told(trackio, tmp_path, monkeypatch):
    notes = []
    with logged({}, tmp_path / "out", "trackio", Progress(note=notes.append)) as (log, shown):
        monkeypatch.setattr(sys.modules["trackio"], "log", lambda numbers: 1 / 0)
        log.into(tmp_path)
        shown.measured(Measured("distill", 1, {"loss": 2.0}))
    assert lines(tmp_path)[-1]["text"] == "the board takes no more numbers (division by zero)"
    assert notes == ["logged to trackio, project paredown, run out"]
    monkeypatch.setattr(sys.modules["trackio"], "init", lambda **asked: 1 / 0)
    with pytest.raises(PareError, match="--log-to trackio could not begin"):
        open_board("trackio", tmp_path, {})


def test_a_board_that_is_not_installed_is_refused_before_any_work(run, tmp_path):
    missing = next(name for name in ("trackio", "wandb", "tensorboard") if find_spec(name) is None)
    with pytest.raises(PareError, match=f"pip install {missing}"):
        run(log_to=missing)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    check_board(None)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="no TensorBoard: pip install tensorboard")
def test_tensorboard_reads_back_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = open_board("tensorboard", tmp_path / "out", {"model": "m"})
    log = RunLog({}, board)
    log.measured(Measured("block", 1, {"relative_error": 0.5}, "model.layers.1"))
    log.measured(Measured("score", 0, {"after": 9.0}, "stdlib"))
    log.close()
    events = EventAccumulator(str(tmp_path / "runs" / "out")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("block/relative_error")] == [(1, 0.5)]
    assert [e.value for e in events.Scalars("score/stdlib/after")] == [9.0]
