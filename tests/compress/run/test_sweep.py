"""Sweeps: which trials there are, that none is run twice, that a failure stops nothing, and that a stop is gone on from."""

import io
import json
import sys
from threading import Thread

import pytest

from paredown.compress.errors import PareError
from paredown.compress.run import trial as worker
from paredown.compress.run.compress import compress
from paredown.compress.run.open import resolve_recipe
from paredown.compress.run.sweep import Workers, sweep
from paredown.compress.run.trials import Trial, grid, read_trials

SMALL = ["calibration.sequences=3", "calibration.length=16", "evaluate.length=16", "evaluate.windows=4"]


def test_a_grid_is_every_combination_and_names_say_which():
    trials = grid(["wanda-50", "mine/ours.yaml"], ["sparsity=0.4,2:4", "targets.skip=[a,b]", "name='x,y'"])
    assert [trial.name for trial in trials] == [
        "wanda-50_sparsity-0.4", "wanda-50_sparsity-2of4", "ours_sparsity-0.4", "ours_sparsity-2of4"
    ]  # fmt: skip
    assert trials[1] == Trial(trials[1].name, "wanda-50", ("sparsity=2:4", "targets.skip=[a,b]", "name='x,y'"))
    assert [trial.name for trial in grid(["wanda-50", "ria-50"], ["sparsity=0.4"])] == ["wanda-50", "ria-50"]
    assert grid(["wanda-50"], ["targets.skip=[a"])[0].overrides == ("targets.skip=[a",)
    for recipes, told in (([], "nothing to run"), (["a.yaml", "b/A.yaml"], "two trials are called A")):
        with pytest.raises(PareError, match=told):
            grid(recipes, [])


def test_a_list_of_runs_is_read_strictly(tmp_path):
    path = tmp_path / "runs.yaml"
    path.write_text("- {recipe: wanda-50, set: [sparsity=0.4]}\n- {recipe: wanda-50, name: ours}\n")
    first, second = read_trials(path, ["seed=1"])
    assert first == Trial("wanda-50_sparsity-0.4", "wanda-50", ("seed=1", "sparsity=0.4"))
    assert second == Trial("ours", "wanda-50", ("seed=1",))
    for text, told in (
        ("- {recipe: a, sett: []}", "0.sett: Extra inputs"),
        ("a: 1", "valid list"),
        ("[]", "nothing to run"),
    ):
        path.write_text(text)
        with pytest.raises(PareError, match=told):
            read_trials(path)
    with pytest.raises(PareError, match="cannot be read"):
        read_trials(tmp_path / "none.yaml")


class Here(Workers):
    """Trials that are calls of a function."""

    def __init__(self, start, at_once=1):
        super().__init__(at_once)
        self.start = start


@pytest.fixture
def settings(text_file):
    return {"calibration": str(text_file), "eval_text": [str(text_file)], "seed": 3}


@pytest.fixture
def real(tiny_model, tmp_path, settings, verified_here):
    """A true report, whose like the stand-in for a process writes."""
    return compress(tiny_model, "wanda-50", tmp_path / "one", overrides=SMALL, **settings)


def test_trials_are_run_once_failures_are_skipped_and_a_stopped_sweep_goes_on(tiny_model, tmp_path, settings, real):
    trials, folder, notes = grid(["wanda-50", "magnitude-50"], ["sparsity=0.4,0.5,0.6", *SMALL]), tmp_path / "sweep", []
    began, broken = [], ["wanda-50_sparsity-0.5"]

    def start(asked, log):
        out = log.with_suffix("").with_name(log.name.removesuffix(".log"))
        began.append(out.name)
        if out.name in broken:
            return "no memory"
        if out.name == "magnitude-50_sparsity-0.4" and broken:
            raise KeyboardInterrupt
        changes = {key: asked[key] for key in ("calibration", "eval_text", "seed")}
        recipe = resolve_recipe(asked["recipe"], asked["overrides"], **changes)
        out.mkdir()
        (out / "report.json").write_text(json.dumps({**real, "recipe": recipe.to_dict()}))
        (out / "model.safetensors").write_text("weights")
        return None

    with pytest.raises(KeyboardInterrupt):
        sweep(tiny_model, trials, folder, settings, note=notes.append, runner=Here(start))
    ended = [json.loads(line)["state"] for line in (folder / "sweep.jsonl").read_text().splitlines()]
    assert ended[:3] == ["done", "failed", "done"]
    assert any("no memory" in note for note in notes)
    done, began[:], broken[:] = {path.parent.name for path in folder.glob("*/report.json")}, [], []
    outcome = sweep(tiny_model, trials, folder, settings, runner=Here(start, 2))
    assert not done & set(began) and len(began) == 6 - len(done) and not outcome.failed
    assert outcome.folders == [folder / trial.name for trial in trials]
    assert all([path.name for path in done.iterdir()] == ["report.json"] for done in outcome.folders)
    began.clear()
    assert sweep(tiny_model, trials, folder, settings, runner=Here(start)).folders == outcome.folders and not began
    with pytest.raises(PareError, match="of another command"):
        sweep(tiny_model, trials, folder, {**settings, "seed": 4}, runner=Here(start))
    kept = sweep(tiny_model, trials[:1], tmp_path / "kept", settings, keep="checkpoints", runner=Here(start)).folders[0]
    assert (kept / "model.safetensors").is_file()


def test_a_wrong_recipe_is_told_before_anything_is_run(tiny_model, tmp_path):
    trials = grid(["wanda-50", "svd-llm-80"], ["sparsity=0.4,0.5"])
    with pytest.raises(PareError, match=r"svd-llm-80_sparsity-0.4: .*no option 'sparsity'"):
        sweep(tiny_model, trials, tmp_path / "sweep", {}, runner=Here(lambda *args: None))
    assert not (tmp_path / "sweep").exists()


def test_a_process_tells_why_it_failed_and_none_begins_after_a_stop(tmp_path):
    log, ends = (
        tmp_path / "trial.log",
        "import json, os, sys; print(json.load(sys.stdin)['say']); os.abort() if {} else sys.exit({})",
    )
    for script, say, told in (
        (
            ends.format(0, 1),
            "[1/2] a\nerror: no room,\nname another disk",
            "no room,\nname another disk (exit code 1; ",
        ),
        (ends.format(0, 3), "Traceback\nKeyError: 'a'", "KeyError: 'a' (exit code 3; "),
        (ends.format(1, 0), "[1/2] a", "[1/2] a (exit code -"),
        (ends.format(0, 0), "error: this is no end", None),
    ):
        workers = Workers(command=[sys.executable, "-c", script])
        found = workers.start({"say": say}, log)
        assert found is None if told is None else found.startswith(told)
    workers.stop()
    assert workers.start({}, log) == "stopped"


def test_a_stop_ends_the_processes_that_run(tmp_path):
    script = "import sys; sys.stdin.read(); print('reading', flush=True); import signal; signal.pause()"
    workers, log, found = Workers(command=[sys.executable, "-c", script]), tmp_path / "trial.log", []
    thread = Thread(target=lambda: found.append(workers.start({}, log)))
    thread.start()
    while not (log.is_file() and log.read_text()):
        thread.join(0.01)
    workers.stop()
    thread.join()
    assert found[0].startswith("reading (exit code -15")


def test_a_trial_is_what_compress_does_with_its_settings(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(worker, "compress", lambda **settings: asked.append(settings))
    monkeypatch.setattr(worker.signal, "signal", lambda *args: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"model": "m", "out": "o", "task_folder": null}'))
    assert worker.main() == 0 and asked[0]["model"] == "m" and asked[0]["task_folder"] is None

    def refuse(**settings):
        raise PareError("no such model")

    monkeypatch.setattr(worker, "compress", refuse)
    monkeypatch.setattr(sys, "stdin", io.StringIO("{}"))
    assert worker.main() == 1 and capsys.readouterr().out == "error: no such model\n"
