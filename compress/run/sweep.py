"""Many runs of one model, each in a process of its own; what is done is not done again, and what fails is skipped."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, Literal, Protocol

from paredown.compress.errors import PareError
from paredown.compress.progress import Counted, ignore, logger
from paredown.compress.run.open import resolve_recipe
from paredown.compress.run.ray_workers import RayWorkers
from paredown.compress.run.seeds import strip
from paredown.compress.run.stages import finished
from paredown.compress.run.trials import Trial

RECORD = "sweep.jsonl"  # a line for each trial that ended
COMMAND = (sys.executable, "-m", "paredown.compress.run.trial")
CHANGES = ("calibration", "eval_text", "tasks", "seed", "plugins", "allow_scored_calibration")  # of the settings
Keep = Literal["checkpoints", "reports"]


@dataclass
class Outcome:
    """The folders of the trials that are done, and why the others failed, by name."""

    folders: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Runner(Protocol):
    """What runs trials, `at_once` of them at a time."""

    at_once: int

    def start(self, settings: Mapping[str, Any], log: Path) -> str | None:
        """Run `compress` by these settings, wait for it, and return what went wrong, if anything. Its lines go to `log`."""
        ...

    def stop(self) -> None:
        """End all trials, and start no more."""
        ...

    def close(self) -> None:
        """Give back what it took."""
        ...


class Workers:
    """Processes of this machine that each run one trial; several share its threads."""

    def __init__(self, at_once: int = 1, command: Sequence[str] = COMMAND) -> None:
        self.at_once, self.command = at_once, list(command)
        threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // at_once, 1))} if at_once > 1 else {}
        self.environment = {**os.environ, **threads}
        self._running: set[subprocess.Popen[str]] = set()
        self._lock, self._stopped = Lock(), False

    def start(self, settings: Mapping[str, Any], log: Path) -> str | None:
        with log.open("w", encoding="utf-8") as lines:
            with self._lock:
                if self._stopped:
                    return "stopped"
                process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=lines, stderr=lines, text=True, env=self.environment
                )
                self._running.add(process)
            process.communicate(json.dumps(dict(settings)))
        with self._lock:
            self._running.discard(process)
        return None if process.returncode == 0 else _last_words(log, process.returncode)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def close(self) -> None:
        pass


def sweep(
    model: str | Path,
    trials: Sequence[Trial],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    workers: int | None = None,
    ray: str | None = None,
    keep: Keep = "reports",
    note: Callable[[str], None] = logger.info,
    doing: Callable[[str], None] = ignore,
    runner: Runner | None = None,
) -> Outcome:
    """Run every trial into a folder of its own below `folder`, `workers` at a time; `settings` are those of `compress`.

    Finished trials are not run again, and one that was interrupted goes on. A trial that fails is recorded with its message,
    and tried again by the next call. `keep`: of what a trial wrote, all, or its report alone. Trials are processes of this
    machine, or run on the machines of the cluster `ray`: see RayWorkers; `runner` runs them otherwise.
    Raises PareError, before the first trial, for a recipe that is none and for a folder that holds trials of other settings.
    """
    named = {trial: {**settings, "recipe": trial.recipe, "overrides": list(trial.overrides)} for trial in trials}
    waiting = [trial for trial, own in named.items() if not _is_done(str(model), trial, folder, own)]
    outcome = Outcome([folder / trial.name for trial in trials if trial not in waiting])
    for done in outcome.folders:
        note(f"{done.name}: finished before")
        if keep == "reports":
            strip(done)
    if not waiting:
        return outcome
    if runner is None:
        device, carry = settings.get("device", "auto"), keep == "reports"
        runner = RayWorkers(ray, workers, device=device, carry=carry) if ray else Workers(workers or 1)
    folder.mkdir(parents=True, exist_ok=True)
    with _pool(runner) as pool:
        began = {
            pool.submit(_timed, runner, {**named[trial], "model": str(model), "out": str(folder / trial.name)}): trial
            for trial in waiting
        }
        for count, future in enumerate(as_completed(began), 1):
            trial = began[future]
            _record(outcome, trial, folder, keep, future, note)
            doing(Counted(f"{trial.name} ended", "trials", count, len(waiting)))
    outcome.folders.sort(key=[folder / trial.name for trial in trials].index)
    return outcome


def _is_done(model: str, trial: Trial, folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the trial has its report. Raises PareError for a wrong recipe, and for the report of another trial."""
    changes = {
        ("allow_scored" if key == "allow_scored_calibration" else key): settings[key]
        for key in CHANGES
        if key in settings
    }
    try:
        recipe = resolve_recipe(trial.recipe, trial.overrides, **changes)
    except PareError as fault:
        raise PareError(f"{trial.name}: {fault}") from fault
    return finished(folder / trial.name, model, recipe) is not None


@contextmanager
def _pool(runner: Runner) -> Iterator[ThreadPoolExecutor]:
    """Threads that each wait for one trial. What goes wrong in the `with` block ends the trials that run."""
    pool = ThreadPoolExecutor(runner.at_once)
    try:
        yield pool
    except BaseException as stop:
        runner.stop()
        if not isinstance(stop, Exception):
            stop.add_note("what is done is kept, and the same command goes on")
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        runner.close()


def _timed(runner: Runner, settings: Mapping[str, Any]) -> tuple[str | None, float]:
    began, out = perf_counter(), Path(settings["out"])
    return runner.start(settings, out.with_name(f"{out.name}.log")), perf_counter() - began


def _record(
    outcome: Outcome,
    trial: Trial,
    folder: Path,
    keep: Keep,
    future: "Future[tuple[str | None, float]]",
    note: Callable[[str], None],
) -> None:
    """Add a trial that ended to the outcome and to the record on the disk."""
    fault, seconds = future.result()
    line = {"trial": trial.name, "state": "failed" if fault else "done", "seconds": round(seconds, 1), "message": fault}
    with (folder / RECORD).open("a", encoding="utf-8") as record:
        record.write(json.dumps(line) + "\n")
    if fault:
        outcome.failed[trial.name] = fault
        note(f"{trial.name} failed: {fault}")
        return
    outcome.folders.append(folder / trial.name)
    note(f"{trial.name}: done in {seconds:.0f} s")
    if keep == "reports":
        strip(folder / trial.name)


def _last_words(log: Path, code: int) -> str:
    """Why a process ended: its message, or else its last line."""
    told = log.read_text(encoding="utf-8", errors="replace").strip()
    message = told.rpartition("\nerror: ")[2] if "\nerror: " in f"\n{told}" else told.rpartition("\n")[2]
    return f"{message.removeprefix('error: ') or 'it said nothing'} (exit code {code}; {log})"
