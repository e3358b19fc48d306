"""The programme in miniature on a CPU: the same commands and parsers, so that no typing error is met on the GPU first.

    python -m paredown.evaluation.benchmarks.gpu.rehearsal MODULE [ARGUMENT ...]

runs the command of a module as the rehearsal does. The commands of the kernels ask for a GPU: here they are shown the CPU in
its place, with Triton's interpreter, and are given few and small shapes. All other commands take their sizes as arguments.
Processes of a rehearsal cannot import lm_eval and datasets: the programme must do without.
"""

import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

BLOCKED = ("lm_eval", "datasets", "scipy")
BLOCK = f"""import sys

for name in {BLOCKED}:
    sys.modules[name] = None  # an import fails
"""
# the options of the tool, then python -m and what it is to watch
WATCHED = """#!/bin/sh
shift 4
exec "{python}" -m paredown.evaluation.benchmarks.gpu.rehearsal "$@"
"""


def environment(folder: Path, path: str) -> dict[str, str]:
    """Variables for the processes of a rehearsal; `folder` holds the files that they need. path: their PATH, but for it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(BLOCK)  # Python imports it at every start
    tool = folder / "compute-sanitizer"
    tool.write_text(WATCHED.format(python=sys.executable))
    tool.chmod(0o755)
    modules = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    first = {"PATH": os.pathsep.join((str(folder), path)), "PYTHONPATH": modules}
    return {**first, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class CpuAsCuda:
    """Stands in for the module `torch`: all of it, but the CUDA device that a command asks for is the CPU."""

    def __init__(self) -> None:
        self.cuda = self

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda if name in ("get_device_name", "get_device_capability") else torch, name)

    def device(self, *_: object) -> torch.device:
        return torch.device("cpu")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0


def shrink_selftest(selftest: Any) -> None:
    """One odd shape in one dtype for a few numbers of tokens, and one small sweep."""
    half = torch.float16
    selftest.TILES, selftest.ONCE = [(33, 100)], {half: selftest.ONCE[half]}
    check = partial(selftest.check_shape, tokens=(1, 9))
    selftest.check_shapes = partial(selftest.check_shapes, dtypes=(half,), check=check)
    selftest.check_sweeps = partial(selftest.check_sweeps, cases=[((20, 40), (2, 4))])


def shrink_benchmark(benchmark: Any) -> None:
    """A small product of each operator, a model of one narrow layer; few candidates, copies and repeats."""
    from paredown.kernels import timing, tuning

    every, in_turn = tuning.candidates, benchmark.interleaved

    def first_and_last(op: str, tokens: int, arch: int) -> list[Any]:
        found = list(every(op, tokens, arch))
        return found[:1] + found[-1:]

    tuning.candidates = first_and_last  # type: ignore[assignment]
    timing.WARM_UP = 1
    tuning._copies = lambda *product: [tuning.random_product(*product)]
    benchmark.best = partial(tuning.best, repeats=1)
    benchmark.interleaved = lambda calls, device, repeats: in_turn(calls, device, 1)
    benchmark.compile_ahead = lambda *work: None  # there is nothing to compile
    bars = {line.product.op: line.bar for line in reversed(benchmark.LINES)}
    benchmark.LINES = [
        benchmark.Line(tuning.Product(op, 24, 64, rank=8 if "lowrank" in op or op == "pifa" else 0), (1,), bar)
        for op, bar in reversed(bars.items())
    ]
    benchmark.LAYERS, benchmark.LM_HEAD, benchmark.BLOCK = 1, (16, 4096), [(16, 4096)]


def shrink_solvers(solvers: Any) -> None:
    """A narrow block: the interpreter sweeps column by column."""
    solvers.SHAPES["tiny"].update(hidden_size=16, intermediate_size=24)


SHRINK = {
    "paredown.kernels.selftest": shrink_selftest,
    "paredown.kernels.benchmark": shrink_benchmark,
    "paredown.evaluation.benchmarks.solvers": shrink_solvers,
}


def main() -> None:
    name, *arguments = sys.argv[1:]
    module = import_module(name)
    if name.startswith("paredown.kernels."):
        torch.cuda.get_device_capability = lambda device=None: (7, 5)  # mma.sp cannot be interpreted
        torch.cuda.get_device_name = lambda device=None: "CPU, interpreted"
        module.torch = CpuAsCuda()  # type: ignore[attr-defined]
    if name in SHRINK:
        SHRINK[name](module)
    sys.argv = [name, *arguments]
    sys.exit(module.main())


if __name__ == "__main__":
    main()
