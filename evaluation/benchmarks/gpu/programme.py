"""A list of parts, each with a process and a budget of its own: what the time allows is run, and the result kept after each.

A part gets a share of the time that is left, so what an earlier one does not use goes to the later ones. A part whose least
time no longer fits is skipped. One that fails, or that is ended because its time is over, stops no other.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import FrameType

from paredown.evaluation.benchmarks.gpu.figures import Figures

GRACE = 5.0  # seconds that a process gets to end by itself before it is killed


@dataclass(frozen=True)
class Step:
    """One command of a part. `share`: its part of the time, relative to the steps that follow."""

    command: tuple[str, ...]
    share: float = 1.0


@dataclass(frozen=True)
class Part:
    """Commands that answer one question. `read` finds the figures in what they printed, also where it breaks off.

    share: of the time, relative to the parts that follow. least: seconds below which it is not worth starting.
    absent: why it cannot run here, in a sentence. goes_to: the page that takes its figures.
    """

    name: str
    title: str
    steps: tuple[Step, ...]
    read: Callable[[str], Figures]
    share: float = 1.0
    least: float = 0.0
    absent: str = ""
    goes_to: str = ""


@dataclass(frozen=True)
class Outcome:
    """state: "done", "failed", "out of time" or "skipped"; reason: why it is not "done". seconds: taken; budget: allowed."""

    name: str
    title: str
    state: str
    seconds: float = 0.0
    budget: float = 0.0
    reason: str = ""
    figures: Figures = field(default_factory=Figures)
    goes_to: str = ""

    @property
    def failed(self) -> bool:
        """Whether something is wrong, or no figure was obtained in the time."""
        return self.state == "failed" or (self.state == "out of time" and not self.figures.headline)


def run(
    parts: Sequence[Part], folder: Path, seconds: float, environment: Mapping[str, str],
    keep: Callable[[list[Outcome]], object], note: Callable[[str], object] = lambda text: None,
) -> list[Outcome]:  # fmt: skip
    """Run the parts in order within `seconds`. `keep` is called with the outcomes so far, after each part.

    What a part prints goes to `<name>.log` in `folder`. environment: variables of its processes, beside those of this one.
    """
    deadline, outcomes = monotonic() + seconds, list[Outcome]()
    for place, part in enumerate(parts):
        left = deadline - monotonic()
        coming = [p for p in parts[place:] if not p.absent]
        if part.absent or left < part.least:
            reason = part.absent or f"{left:.0f} s are left, and it needs at least {part.least:.0f} s"
            outcomes.append(Outcome(part.name, part.title, "skipped", reason=reason))
        else:
            budget = min(left, max(part.least, left * part.share / sum(p.share for p in coming)))
            note(f"{part.name}: {part.title}, at most {budget:.0f} s")
            outcomes.append(_run_part(part, folder, budget, {**os.environ, **environment}))
        done = outcomes[-1]
        note(f"{done.name}: {done.state}, {done.seconds:.0f} s  {done.figures.headline or done.reason}")
        keep(outcomes)
    return outcomes


def _run_part(part: Part, folder: Path, budget: float, environment: Mapping[str, str]) -> Outcome:
    """Run the steps of a part, one after the other, and read what they printed."""
    began, ends, log = monotonic(), list[tuple[Step, int | None]](), folder / f"{part.name}.log"
    log.write_text("")
    for place, step in enumerate(part.steps):
        left = budget - (monotonic() - began)
        allowed = left * step.share / sum(s.share for s in part.steps[place:])
        with log.open("a") as file:
            print("$", *step.command, file=file, flush=True)
            ends.append((step, _run_step(step, file.fileno(), allowed, environment)))
            print(f"\n# {_end(ends[-1][1], allowed)}", file=file)
    text = log.read_text(errors="replace")
    figures, state, reason = part.read(text), "done", ""
    late = [step for step, status in ends if status is None]
    bad = [(step, status) for step, status in ends if status and not _only_missed(status, figures, text)]
    if bad or figures.faults:
        state, reason = "failed", "; ".join([*figures.faults[:3], *([_last_words(text)] if bad else [])])
    elif late:
        state, reason = "out of time", f"{len(late)} of {len(ends)} commands did not end in their time"
    return Outcome(part.name, part.title, state, monotonic() - began, budget, reason, figures, part.goes_to)


def _end(status: int | None, allowed: float) -> str:
    return f"ended after {allowed:.0f} s: its time was over" if status is None else f"exit status {status}"


def _only_missed(status: int, figures: Figures, text: str) -> bool:
    """Whether status 1 says no more than that a bar was missed."""
    return status == 1 and bool(figures.missed) and not re.search(r"^(error: |Traceback )", text, re.MULTILINE)


def _last_words(text: str) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(("$", "#"))]
    told = [line for line in lines if re.match(r"error: |[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (told or lines or ["nothing was printed"])[-1][:300]


def _run_step(step: Step, log: int, allowed: float, environment: Mapping[str, str]) -> int | None:
    """The exit status of a command; None if it had to be ended because its time was over.

    It leads a process group of its own, which is ended with it, and with this process if that is interrupted.
    """
    process = subprocess.Popen(
        step.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(environment), start_new_session=True
    )
    try:
        return process.wait(max(allowed, 0.1))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the group that a process of ours leads."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        if process.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)


@contextmanager
def ending_children_when_terminated() -> Iterator[None]:
    """Inside the block SIGTERM raises SystemExit, so that a running command is ended with this process."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
