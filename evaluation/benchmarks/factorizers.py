"""How long low-rank methods take to factor every linear of one block, random weights and moments.

    python -m paredown.evaluation.benchmarks.factorizers [--device cuda] [--shape llama-3-8b]

How good the methods are: python -m paredown.evaluation.benchmarks.quality --rows lowrank
For a whole model in bounded memory: python -m paredown.evaluation.benchmarks.footprint --recipe svd-llm-80
    [--shape llama-3-8b --device cuda]
"""

import argparse
import statistics
import time

import torch

from paredown.compress.numerics.factorize import factorize, largest_rank
from paredown.compress.numerics.metric import Metric, Target
from paredown.evaluation.benchmarks.shapes import SHAPES, linears
from paredown.evaluation.gauges import wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--precision", default="float64", choices=["float64", "float32"], help="methods use float64")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    precision = getattr(torch, chosen.precision)
    block_seconds(linears(chosen.shape), torch.device(chosen.device), precision, repeats=chosen.repeats)


def block_seconds(
    shapes: list[tuple[int, int]], device: torch.device, dtype: torch.dtype, kept: float = 0.8, repeats: int = 3
) -> None:
    """Prints in both metrics the time of each linear, and the median of factoring all linears of a block with its spread."""
    for name in ("input only", "two-sided"):
        taken = []
        for _ in range(repeats):
            seconds = 0.0
            for out, inner in shapes:
                weight, metric = _random((out, inner), device, dtype, two_sided=name == "two-sided")
                rank = largest_rank("pifa", (out, inner), kept * out * inner)
                wait(device)
                began = time.perf_counter()
                factorize(Target(weight), metric, lambda losses, rank=rank: rank)  # type: ignore[misc]
                wait(device)
                linear = time.perf_counter() - began
                print(f"  {out} x {inner}, {name}: {linear:.2f} s", flush=True)
                seconds += linear
            taken.append(seconds)
        spread = f"{min(taken):.2f} to {max(taken):.2f}"
        print(f"one block, {name}: {statistics.median(taken):.2f} s ({spread}) on {device}, {str(dtype)[6:]}")


def _random(
    shape: tuple[int, int], device: torch.device, dtype: torch.dtype, two_sided: bool
) -> tuple[torch.Tensor, Metric]:
    out, inner = shape
    weight = torch.randn(out, inner, dtype=dtype, device=device)
    data = torch.randn(2 * inner, inner, dtype=dtype, device=device)
    moment, small = data.T @ data / len(data), min(out, inner)
    if not two_sided:
        return weight, Metric(moment)
    folded = torch.randn(2 * small, small, dtype=dtype, device=device)
    diagonal = torch.ones(out, dtype=dtype, device=device)
    return weight, Metric(moment, folded.T @ folded / len(folded), diagonal)


if __name__ == "__main__":
    main()
