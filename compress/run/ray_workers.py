"""The trials of a sweep on the machines of a Ray cluster: each is a task of Ray, in a process of its own.

A trial whose process or machine is lost is begun again where there is room. Every machine has paredown, the model and the
texts under the same names. On a file system that all share, a trial goes on from what was saved; without one, the report is
carried back to the machine that asked.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from paredown.compress.errors import PareError
from paredown.compress.run.seeds import REPORTS
from paredown.compress.run.trial import run_trial

RETRIES = 3  # of a trial whose process or machine was lost
Answer = tuple[str | None, dict[str, bytes]]  # what went wrong, and the files that are carried back


class RayWorkers:
    """Tasks on a cluster that each run one trial: see `sweep.Workers`, whose methods these are.

    `address`: as Ray has it, host:port, `auto`, or `local` for a cluster of this machine alone. `workers`: so many trials at
    a time, by default one for each machine. `task`: what a machine does with settings, folder and log. Raises PareError
    without Ray, and where there is no such cluster.
    """

    def __init__(
        self,
        address: str,
        workers: int | None = None,
        *,
        device: str = "auto",
        carry: bool = True,
        task: Callable[[dict[str, Any], str, str], Answer] | None = None,
    ) -> None:
        ray = _ray()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except Exception as fault:  # Ray raises whatever it meets, and a bare Exception where a node is slow to start
            raise PareError(f"--ray {address}: {fault}. Start a cluster with: ray start --head") from fault
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        processors = [int(machine["CPU"]) for machine in machines]
        self.at_once = workers or len(machines) or 1
        shared = max(min([sum(processors) // self.at_once, *processors]), 1)
        gpus = 1 if device != "cpu" and any(machine.get("GPU") for machine in machines) else 0
        options: dict[str, Any] = {"num_cpus": shared, "num_gpus": gpus, "max_retries": RETRIES, "max_calls": 1}
        self._run, self._carry = ray.remote(**options)(task or remote_trial), carry
        self._tasks: list[Any] = []
        self._lock, self._stopped = Lock(), False

    def start(self, settings: Mapping[str, Any], log: Path) -> str | None:
        """Run one trial, wait for it, and return what went wrong, if anything. Its lines go to `log`, where it runs."""
        ray = _ray()
        with self._lock:
            if self._stopped:
                return "stopped"
            task = self._run.remote(dict(settings), os.getcwd(), str(log))
            self._tasks.append(task)
        try:
            fault, files = ray.get(task)
        except ray.exceptions.RayError as lost:
            return f"{str(lost).strip().splitlines()[-1]} ({log})"
        return fault if fault is not None else self._bring(Path(settings["out"]), files)

    def stop(self) -> None:
        """End all tasks, and start no more."""
        with self._lock:
            self._stopped = True
            for task in self._tasks:
                _ray().cancel(task, force=True)

    def close(self) -> None:
        """Leave the cluster; one of `local` ends."""
        _ray().shutdown()

    def _bring(self, out: Path, files: Mapping[str, bytes]) -> str | None:
        """See to it that the report is here. Returns what went wrong, if anything."""
        if (out / REPORTS[0]).is_file():
            return None
        if not self._carry:
            return f"{out} was written on another machine and is not seen from here: name a folder that all share"
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / name).write_bytes(content)
        return None


def remote_trial(settings: dict[str, Any], place: str, log: str) -> Answer:
    """One trial in the folder `place`, if this machine has it; its report as files, for a machine that does not see ours."""
    if Path(place).is_dir():
        os.chdir(place)
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("a", encoding="utf-8", buffering=1) as lines:
        fault = run_trial(settings, lambda text: print(text, file=lines))
    written = Path(settings["out"])
    return fault, {name: (written / name).read_bytes() for name in REPORTS if (written / name).is_file()}


def _ray() -> Any:
    """Ray, which is an extra. Raises PareError where it is not installed."""
    try:
        import ray
    except ImportError as fault:
        raise PareError("a sweep on a cluster needs Ray. Install it with: pip install 'ray>=2.50'") from fault
    return ray
