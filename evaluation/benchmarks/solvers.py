"""How long SparseGPT takes for the linears of one block, and whether its column loop waits for Python or for the device.

    python -m paredown.evaluation.benchmarks.solvers [--device cuda] [--shape llama-3-8b]

For every shape of the block, with random weights and inputs: the factor of the inverse Hessian in float64, as the methods
compute it, and in float32; then the sweep to 2:4 in float32, as a Python loop over columns and by the fused kernel. Last a
profile of both sweeps of one weight: the kernels launched, the seconds in which the device was busy with them, and the
seconds that passed. Where the device is busy for a small part of the time, Python's launches are the limit. Prints one JSON
object a line. The factoring of low-rank methods: python -m paredown.evaluation.benchmarks.factorizers --speed
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from paredown.compress.machine import pick_device
from paredown.compress.numerics.cholesky import InverseCholesky, inverse_cholesky
from paredown.compress.numerics.masks import NofM
from paredown.compress.numerics.sweep import adaptive_mask, block_columns, sparsegpt_sweep
from paredown.evaluation.benchmarks.shapes import DTYPE, SHAPES, linears
from paredown.evaluation.gauges import wall_seconds

SPARSITY, DAMPING = NofM(2, 4), 0.01
SWEEPS = {"loop": False, "kernel": True}  # whether it is fused


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    chosen = parser.parse_args()
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
        seconds[how] = wall_seconds(sweep(weight, found["float64"], fused), device)
    return seconds


def sweep(weight: Tensor, inverse: InverseCholesky, fused: bool) -> Callable[[], object]:
    """A call that prunes weight (out, in) to 2:4, as the method `sparsegpt` does."""
    choose = adaptive_mask(SPARSITY, weight, lambda: inverse)
    return lambda: sparsegpt_sweep(weight, inverse, choose, block_columns(SPARSITY), fused)


def gram(inner: int, device: torch.device) -> Tensor:
    """Sums of the second moments of 2 * inner random inputs, (inner, inner) float64."""
    data = torch.randn(2 * inner, inner, dtype=torch.float32, device=device)
    return (data.T @ data).double()


def profiled(out: int, inner: int, device: torch.device, fused: bool) -> dict[str, Any]:
    """Kernels launched by one sweep, busy seconds of the device, and seconds in all.

    The latter without the profiler, which slows Python. `busy` and `launches` are None on a CPU.
    """
    inverse = inverse_cholesky(gram(inner, device), 2 * inner, DAMPING)
    call = sweep(torch.randn(out, inner, device=device).to(DTYPE), inverse, fused)
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
