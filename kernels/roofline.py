"""The shortest time a product can take, modelled from bytes, instructions and launches; tables for unmeasured GPUs.

    python -m paredown.kernels.roofline [--write]

A time is the largest of bytes / bandwidth, operations / tensor throughput and instructions / issue rate, plus 2 us for
every launch inside a CUDA graph. The model assumes 90% of the peak bandwidth and 70% of the peak of the tensor cores.
Prints the ratio dense time / our time, with the same efficiency assumed for the dense product. --write writes
kernels/tables/*.json, marked "modelled", with one path per shape and number of tokens, and keeps the lines of a table that
were measured. A table measured by `paredown tune` or kernels/benchmark.py takes precedence.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log2
from pathlib import Path

from paredown.kernels.dispatch import BUCKETS, Choice, DispatchTable

LAUNCH = 2e-6


@dataclass(frozen=True)
class Device:
    """Bytes, 16-bit dense tensor operations and thread instructions per second, from the vendor's data sheets."""

    name: str
    arch: int
    bandwidth: float
    tensor: float
    issue: float


DEVICES = {
    "a100": Device("NVIDIA A100-SXM4-80GB", 80, 2.039e12, 312e12, 19.5e12),
    "h100": Device("NVIDIA H100 80GB HBM3", 90, 3.35e12, 989e12, 29.6e12),
    "h200": Device("NVIDIA H200", 90, 4.8e12, 989e12, 29.6e12),
}
SHAPES = [(1024, 4096), (4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (2048, 2048)]
# thread instructions per weight, as counted by python -m paredown.kernels.aot; of mma.sp by number of tokens
MMA, EXPAND, BITMAP = {8: 1.1, 16: 1.4, 32: 2.0, 64: 3.0}, 5.3, 12.4


PORTABLE = 4.0  # how much longer the portable 2:4 kernel takes than its bytes and instructions do, measured on an H200


def seconds(
    device: Device, weights: int, tokens: int, sizes: tuple[int, int], bits: float, *,
    instructions: float = 0.0, sparse: bool = False, launches: int = 1,
) -> float:  # fmt: skip
    """The time of a product of `tokens` tokens with a weight of `weights` numbers, `bits` bits each, that is read once.

    sizes: (out, in). instructions: per weight and thread. sparse: the tensor cores skip half of the operations.
    """
    read = weights * bits / 8 + 2 * tokens * sum(sizes)
    operations = 2 * tokens * weights / (2 if sparse else 1)
    return launches * LAUNCH + max(
        read / (0.9 * device.bandwidth),
        operations / (0.7 * device.tensor),
        instructions * weights / (0.6 * device.issue),
    )


def dense(device: Device, tokens: int, shape: tuple[int, int]) -> float:
    """Seconds of the dense product with a 16-bit weight."""
    return seconds(device, shape[0] * shape[1], tokens, shape, 16)


def paths(device: Device, op: str, tokens: int, shape: tuple[int, int]) -> Iterator[tuple[float, str, dict[str, int]]]:
    """(seconds, path, tile) of all paths for an op. Low-rank weights are assumed to have half of the parameters."""
    weights = shape[0] * shape[1]
    turns = -(-tokens // 64)
    if op in ("sparse24", "sparse24_lowrank"):
        if tokens <= 64:
            per_weight = next(cost for most, cost in MMA.items() if tokens <= most)
            yield (
                seconds(device, weights, tokens, shape, 9, instructions=per_weight, sparse=True),
                "mma",
                mma_tile(tokens, shape),
            )
        wide = {"rows": 64, "tokens": min(64, max(16, 1 << (tokens - 1).bit_length()))}
        expanded = seconds(device, weights, min(tokens, 64), shape, 9, instructions=EXPAND)
        yield turns * PORTABLE * expanded, "portable", wide
        yield _dense_after_unpacking(device, tokens, shape, 9), "dense", {}
    elif op == "bitmap":
        yield turns * seconds(device, weights, min(tokens, 64), shape, 9, instructions=BITMAP), "portable", {}
        yield _dense_after_unpacking(device, tokens, shape, 9), "dense", {}
    else:
        time = seconds(device, weights // 2, tokens, shape, 16, launches=2)
        # with a dependent launch the second kernel starts before the first one ends
        yield time - (LAUNCH / 2 if device.arch >= 90 else 0) if tokens <= 64 else 2 * time, "portable", {}
        yield time, "torch", {}


def mma_tile(tokens: int, shape: tuple[int, int]) -> dict[str, int]:
    """As measured best on an H200: some 2,000 warps at once, and more rows in each where tokens are many."""
    if tokens > 16:
        return {"row_tiles": 2, "warps": 4, "row_warps": 2 if tokens > 32 else 1}
    steps, tiles = -(-shape[1] // 256), -(-shape[0] // 16)
    return {"row_tiles": 1, "warps": min(8, 1 << max(1, round(log2(2000 / tiles))), 1 << (steps.bit_length() - 1))}


def _dense_after_unpacking(device: Device, tokens: int, shape: tuple[int, int], bits: float) -> float:
    """Seconds to write the dense weight to memory and then multiply with it."""
    weights = shape[0] * shape[1]
    return seconds(device, weights, 0, shape, bits + 16) + dense(device, tokens, shape)


def table(device: Device) -> DispatchTable:
    """The modelled table: for each op, shape and number of tokens the path with the shortest time."""
    choices = []
    for op in ("sparse24", "sparse24_lowrank", "bitmap", "lowrank", "pifa", "cur"):
        for shape in SHAPES:
            for tokens in BUCKETS:
                _, path, tile = min(paths(device, op, tokens, shape), key=lambda candidate: candidate[0])
                choices.append(Choice(op, *shape, tokens, path, tile))
    return DispatchTable(device.name, device.arch, "modelled", tuple(choices))


def beside_measured(modelled: DispatchTable, old: DispatchTable) -> DispatchTable:
    """The modelled choices, but those of the old table that were measured."""
    measured = replace(old, choices=tuple(choice for choice in old.choices if choice.ratio is not None))
    return measured.over(replace(modelled, basis="measured")) if measured.choices else modelled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    for file, device in DEVICES.items():
        affordable = device.issue / (device.bandwidth / (9 / 8))  # at 9 bits a weight and full bandwidth
        print(f"{device.name}: {affordable:.1f} instructions per weight and thread; tokens: dense time / ours")
        for shape in SHAPES:
            ratios = []
            for tokens in (1, 16, 64, 1024):
                times = {op: min(paths(device, op, tokens, shape))[0] for op in ("sparse24", "lowrank")}
                ratios.append(
                    f"{tokens}: "
                    + ", ".join(f"{op} {dense(device, tokens, shape) / time:.2f}x" for op, time in times.items())
                )
            print(f"  {shape[0]:>6} x {shape[1]:<6}", " | ".join(ratios))
        if options.write:
            path = Path(__file__).parent / "tables" / f"{file}.json"
            path.write_text(beside_measured(table(device), DispatchTable.read(path)).to_json())


if __name__ == "__main__":
    main()
