"""Trials on a cluster: a lost worker's trial is begun again, faults come back in words, and reports come home."""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from paredown.compress.errors import PareError
from paredown.compress.run import ray_workers
from paredown.compress.run.ray_workers import RayWorkers
from paredown.compress.run.sweep import sweep
from paredown.compress.run.trials import grid

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="no Ray: pip install 'ray>=2.50'")


@pytest.mark.slow
@with_ray
def test_a_lost_worker_costs_its_trial_a_second_try_and_faults_are_told(tmp_path):
    def stand_in(settings, place, log):
        """A trial that dies the first time that it is begun, or fails, or writes its report."""
        begun = Path(log).with_suffix(".begun")
        if settings["recipe"] == "wanda-50" and not begun.exists():
            begun.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        if settings["recipe"] == "magnitude-50":
            return "no room", {}
        if settings["recipe"] == "ria-50":
            raise KeyError("a")
        return None, {"report.json": f"of {settings['recipe']}".encode()}

    trials = grid(["wanda-50", "sparsegpt-50", "magnitude-50", "ria-50"], [])
    runner = RayWorkers("local", 2, task=stand_in)
    assert runner.at_once == 2
    outcome = sweep("model", trials, tmp_path / "sweep", {}, runner=runner)
    assert [folder.name for folder in outcome.folders] == ["wanda-50", "sparsegpt-50"]
    assert (tmp_path / "sweep" / "wanda-50.begun").exists()
    assert (outcome.folders[0] / "report.json").read_text() == "of wanda-50"
    assert outcome.failed["magnitude-50"] == "no room" and "KeyError" in outcome.failed["ria-50"]


def test_without_ray_a_sweep_on_a_cluster_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PareError, match=r"pip install 'ray>=2\.50'"):
        RayWorkers("auto")


def test_a_report_is_carried_home_and_a_checkpoint_is_not(tmp_path):
    far = RayWorkers.__new__(RayWorkers)
    far._carry = True
    assert far._bring(tmp_path / "a", {"report.json": b"{}"}) is None
    assert (tmp_path / "a" / "report.json").read_bytes() == b"{}"
    far._carry = False
    assert "not seen from here" in far._bring(tmp_path / "b", {})


def test_a_task_works_where_it_was_asked_and_keeps_its_lines(tmp_path, monkeypatch):
    def run(settings, say):
        say(f"in {Path.cwd().name}")
        (tmp_path / "out" / "report.json").write_text("{}")

    monkeypatch.setattr(ray_workers, "run_trial", run)
    monkeypatch.chdir("/")
    (tmp_path / "out").mkdir()
    log = tmp_path / "logs" / "out.log"
    fault, files = ray_workers.remote_trial({"out": str(tmp_path / "out")}, str(tmp_path), str(log))
    assert fault is None and files == {"report.json": b"{}"} and log.read_text() == f"in {tmp_path.name}\n"
