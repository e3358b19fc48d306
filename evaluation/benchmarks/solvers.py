"""How long SparseGPT takes for the linears of one block, and whether its column loop waits for Python or for the device.

    python -m paredown.evaluation.benchmarks.solvers [--device cuda] [--shape llama-3-8b]
    python -m paredown.evaluation.benchmarks.solvers --against reference [--device cpu] [--weights 4096x4096,14336x4096]
    python -m paredown.evaluation.benchmarks.solvers --against llmcompressor --peer-python peers/bin/python

With --against: the paper's algorithm, column by column in float32 (reference_sparsegpt.py), or llm-compressor's own code in
an environment of its own (`peers` says how to make it), and ours in turns on the same
random weights and inputs, on the same threads: medians with the smallest and largest seconds of the factor of the inverse
Hessian and of the sweep, the losses of both layers, and the largest resident memory above what was there before. The exit
status is 1 if a loss differs by more than 0.1%.

Without it, for every shape of the block, with random weights and inputs: the factor of the inverse Hessian in float64, as
the methods compute it, and in float32; then the sweep to 2:4 in float32, as a Python loop over columns and by the fused
kernel. Last a profile of both sweeps of one weight: the kernels launched, the seconds in which the device was busy with
them, and the seconds that passed. Where the device is busy for a small part of the time, Python's launches are the limit.
Prints one JSON object a line. The factoring of low-rank methods: python -m paredown.evaluation.benchmarks.factorizers
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from threading import Event, Thread
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from paredown.compress.machine import pick_device, resident_memory, return_freed_memory
from paredown.compress.numerics.cholesky import InverseCholesky, inverse_cholesky
from paredown.compress.numerics.masks import NofM, Sparsity, parse_sparsity
from paredown.compress.numerics.sweep import adaptive_mask, block_columns, sparsegpt_sweep
from paredown.evaluation.benchmarks.peers import ENVIRONMENT
from paredown.evaluation.benchmarks.reference_sparsegpt import inverse_factor, reference_sweep
from paredown.evaluation.benchmarks.shapes import DTYPE, SHAPES, linears
from paredown.evaluation.gauges import wall_seconds

SPARSITY, DAMPING = NofM(2, 4), 0.01
PEER = Path(__file__).with_name("peer_solver.py")
AGREE = 0.001  # how far the layers' losses may differ
SWEEPS = {"loop": False, "kernel": True}  # whether it is fused


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="default: cuda, and cpu for --against")
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--against", choices=["reference", "llmcompressor"], help="what ours is compared with")
    parser.add_argument("--peer-python", type=Path, help="interpreter of an environment with llmcompressor")
    parser.add_argument("--weights", default="4096x4096,14336x4096", help="out x in, of --against")
    parser.add_argument("--sparsities", default="2:4,0.5", help="of --against")
    parser.add_argument("--repeats", type=int, default=3, help="of --against")
    chosen = parser.parse_args()
    if chosen.against == "llmcompressor" and chosen.peer_python is None:
        sys.exit(ENVIRONMENT)
    if chosen.against:
        sys.exit(against(chosen))
    chosen.device = chosen.device or "cuda"
    device, counts = pick_device(chosen.device), Counter(linears(chosen.shape))
    torch.manual_seed(0)
    shapes = sorted(counts, key=lambda shape: (shape[1], shape[0]))
    seconds_of(*shapes[0], device)  # loads the libraries and compiles, untimed
    for out, inner in shapes:
        row = {"out": out, "in": inner, "count": counts[out, inner], **seconds_of(out, inner, device)}
        print(json.dumps(row), flush=True)
    for how, fused in SWEEPS.items():
        out, inner = shapes[0]
        print(json.dumps({"out": out, "in": inner, "profile": how, **profiled(out, inner, device, fused)}), flush=True)


def seconds_of(out: int, inner: int, device: torch.device) -> dict[str, float]:
    """Seconds of the inverse factor in both precisions, and of each sweep, for one weight (out, inner)."""
    sums, weight = gram(inner, device), torch.randn(out, inner, device=device).to(DTYPE)
    found: dict[str, InverseCholesky] = {}
    seconds = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        lower = sums.to(dtype)  # (in, in)

        def factor(lower: Tensor = lower, name: str = name) -> None:
            found[name] = inverse_cholesky(lower, 2 * inner, DAMPING)

        seconds[f"factor_{name}"] = wall_seconds(factor, device)
    for how, fused in SWEEPS.items():
        seconds[how] = wall_seconds(sweep(weight, found["float64"], SPARSITY, fused), device)
    return seconds


def sweep(
    weight: Tensor, inverse: InverseCholesky, sparsity: Sparsity, fused: bool | None
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that prunes weight (out, in), as the method `sparsegpt` does."""
    choose = adaptive_mask(sparsity, weight, lambda: inverse)
    return lambda: sparsegpt_sweep(weight, inverse, choose, block_columns(sparsity), fused)


def against(chosen: argparse.Namespace) -> int:
    """Print the table of --against; returns the exit status."""
    device, status = pick_device(chosen.device or "cpu"), 0
    title = (
        f"seconds on {torch.get_num_threads()} threads of {device}, median (smallest to largest) of {chosen.repeats}"
    )
    table = Table(
        "weight", "sparsity", "", "factor", "sweep", "both", "layer loss", "peak MB", title=title, title_justify="left"
    )
    for size in chosen.weights.split(","):
        out, inner = (int(number) for number in size.split("x"))
        torch.manual_seed(0)
        data = torch.randn(2 * inner, inner, device=device) @ (torch.randn(inner, inner, device=device) * inner**-0.5)
        hessian, weight = data.T @ data / len(data), torch.randn(out, inner, device=device)  # (in, in), (out, in)
        for sparsity in map(parse_sparsity, chosen.sparsities.split(",")):
            if chosen.against == "reference":
                sides = compare(weight, hessian, sparsity, chosen.repeats)
            else:
                sides = compare_peer(weight, hessian, sparsity, chosen.repeats, chosen.peer_python)
            for name, side in sides.items():
                table.add_row(size, str(sparsity), name, *side.cells())
            other, ours = sides.values()
            table.add_row("", "", f"{chosen.against} / ours", *ours.ratios(other), end_section=True)
            status |= abs(ours.loss / other.loss - 1) > AGREE
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return int(status)


@dataclass
class Side:
    """One solver's figures on one weight."""

    factor: list[float] = field(default_factory=list)  # seconds of each repeat
    sweep: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)  # seconds of both, where they were not timed apart
    loss: float = 0.0
    peak: int = 0  # bytes

    @property
    def both(self) -> list[float]:
        return self.whole or [a + b for a, b in zip(self.factor, self.sweep, strict=True)]

    def cells(self) -> list[str]:
        timed = (f"{median(t):.3f} ({min(t):.3f} to {max(t):.3f})" if t else "" for t in self._timed())
        return [*timed, f"{self.loss:.6g}", f"{self.peak / 1e6:.0f}" if self.peak else ""]

    def _timed(self) -> tuple[list[float], list[float], list[float]]:
        return self.factor, self.sweep, self.both

    def ratios(self, other: "Side") -> list[str]:
        pairs = zip(other._timed(), self._timed(), strict=True)
        timed = (f"{median(a / b for a, b in zip(*pair, strict=True)):.2f}" if pair[0] else "" for pair in pairs)
        return [*timed, f"{other.loss / self.loss:.6f}", f"{other.peak / self.peak:.2f}" if self.peak else ""]


def compare(weight: Tensor, hessian: Tensor, sparsity: Sparsity, repeats: int) -> dict[str, Side]:
    """Both solvers on one weight (out, in) with second moments (in, in), in turns after a first run that is not timed."""
    sides, sums = {"reference": Side(), "ours": Side()}, hessian.double()
    found: dict[str, Any] = {}

    def factor(name: str) -> None:
        ours = name == "ours"
        found["factor"] = inverse_cholesky(sums, 1, DAMPING) if ours else inverse_factor(hessian, DAMPING)

    def prune(name: str) -> None:
        if name == "ours":
            found["pruned"] = sweep(weight, found["factor"], sparsity, None)()[0]
        else:
            found["pruned"] = reference_sweep(weight, found["factor"], sparsity)

    for name, side in sides.items():
        return_freed_memory()  # what is freed and not returned would be used again, and not be counted
        with ResidentPeak() as peak:
            factor(name)
            prune(name)
        error = weight - found["pruned"]  # (out, in)
        side.peak, side.loss = peak.bytes, float((error @ hessian).mul_(error).sum(dtype=torch.float64))
        found.clear()
    for _ in range(repeats):
        for name, side in sides.items():  # in turns, so that a busy minute of the machine falls on both
            side.factor.append(wall_seconds(lambda name=name: factor(name), weight.device))  # type: ignore[misc]
            side.sweep.append(wall_seconds(lambda name=name: prune(name), weight.device))  # type: ignore[misc]
    return sides


def compare_peer(weight: Tensor, hessian: Tensor, sparsity: Sparsity, repeats: int, python: Path) -> dict[str, Side]:
    """As `compare`, with llm-compressor's code in a process of `python`: seconds of factor and sweep together."""
    sides, sums = {"llmcompressor": Side(), "ours": Side()}, hessian.double()
    n, m = (sparsity.n, sparsity.m) if isinstance(sparsity, NofM) else (0, 0)
    asked = {"sparsity": 1 - n / m if m else sparsity, "n": n, "m": m, "damping": DAMPING}
    with TemporaryDirectory() as work:
        given, out = Path(work, "weight.safetensors"), Path(work, "pruned.safetensors")
        save_file({"weight": weight, "hessian": hessian}, given)
        command = [str(python), str(PEER), str(given), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        with Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment) as peer:
            assert peer.stdin and peer.stdout
            while (line := peer.stdout.readline().strip()) != "ready":  # what its libraries say comes first
                if peer.poll() is not None:
                    sys.exit(f"{' '.join(command)} failed: {line}")
            for repeat in range(repeats + 1):  # the first is not timed
                print(json.dumps(asked), file=peer.stdin, flush=True)
                theirs = float(peer.stdout.readline())
                began = perf_counter()
                pruned = sweep(weight, inverse_cholesky(sums, 1, DAMPING), sparsity, None)()[0]
                if repeat:
                    sides["llmcompressor"].whole.append(theirs)
                    sides["ours"].whole.append(perf_counter() - began)
            peer.stdin.close()
        for side, result in zip(sides.values(), (load_file(out)["pruned"], pruned), strict=True):
            error = weight - result  # (out, in)
            side.loss = float((error @ hessian).mul_(error).sum(dtype=torch.float64))
    return sides


class ResidentPeak:
    """Context manager: the largest increase of the process's resident memory, looked at every few milliseconds."""

    def __enter__(self) -> "ResidentPeak":
        self.before, self.bytes, self.done = resident_memory(), 0, Event()
        self.thread = Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.bytes = max(self.bytes, resident_memory() - self.before)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def gram(inner: int, device: torch.device) -> Tensor:
    """Sums of the second moments of 2 * inner random inputs, (inner, inner) float64."""
    data = torch.randn(2 * inner, inner, dtype=torch.float32, device=device)
    return (data.T @ data).double()


def profiled(out: int, inner: int, device: torch.device, fused: bool) -> dict[str, Any]:
    """Kernels launched by one sweep, busy seconds of the device, and seconds in all.

    The latter without the profiler, which slows Python. `busy` and `launches` are None on a CPU.
    """
    inverse = inverse_cholesky(gram(inner, device), 2 * inner, DAMPING)
    call = sweep(torch.randn(out, inner, device=device).to(DTYPE), inverse, SPARSITY, fused)
    seconds = wall_seconds(call, device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        wall_seconds(call, device)
    on_gpu = [event for event in found.events() or [] if event.device_type.name == "CUDA"]
    busy: Counter[str] = Counter()
    for event in on_gpu:
        busy[event.name.split("<")[0][:60]] += event.time_range.elapsed_us() / 1e6
    return {
        "seconds": seconds,
        "busy": sum(busy.values()) if on_gpu else None,
        "launches": len(on_gpu) or None,
        "longest": dict(busy.most_common(5)),
    }


if __name__ == "__main__":
    main()
