"""What a device is, and what it can do at best: bytes copied and operations multiplied in a second.

    python -m paredown.evaluation.benchmarks.ceilings [--device cuda] [--size 8192] [--megabytes 1024]

Every other speed is to be read beside these. Prints one JSON object a line: the facts of the device, then each ceiling with
its median seconds, its rate, and the share of the data sheet's where kernels/roofline.py knows the device.
"""

import argparse
import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paredown.compress.machine import available_memory, pick_device
from paredown.evaluation.gauges import wall_seconds
from paredown.evaluation.surroundings import surroundings
from paredown.kernels.roofline import DEVICES
from paredown.kernels.timing import Timing, interleaved

PRODUCTS = (torch.bfloat16, torch.float32, torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the matrices multiplied")
    parser.add_argument("--megabytes", type=int, default=1024, help="of the tensor that is copied")
    parser.add_argument("--repeats", type=int, default=10)
    chosen = parser.parse_args()
    device = pick_device(chosen.device)
    print(json.dumps({"facts": facts(device)}), flush=True)
    for ceiling in ceilings(device, chosen.size, chosen.megabytes << 20, chosen.repeats):
        print(json.dumps(ceiling), flush=True)


def facts(device: torch.device) -> dict[str, Any]:
    """Name, date and versions, and of a GPU its compute capability, multiprocessors, bytes of memory and cache, driver."""
    known: dict[str, Any] = {**surroundings(device), "machine": platform.machine(), "host_memory": available_memory()}
    if device.type != "cuda":
        return known
    properties = torch.cuda.get_device_properties(device)
    return known | {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2_cache": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    """The driver's version, or None if nvidia-smi does not tell it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    told = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    return next(iter(told.stdout.split()), None)


@torch.no_grad()
def ceilings(device: torch.device, size: int, count: int, repeats: int) -> Iterator[dict[str, Any]]:
    """The rate of copying `count` bytes and of products of two (size, size) matrices; of a GPU also that of the host's link.

    A copy on the device counts the bytes that are read and those that are written; one over the link counts them once.
    Products are of random data: zeros draw less power and run faster.
    """
    sheet = next((d for d in DEVICES.values() if device.type == "cuda" and d.name in _name(device)), None)
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    time = interleaved({"": copy}, device, repeats)[""]
    yield _rate("copy on the device", time, 2 * count, "bytes", sheet.bandwidth if sheet else None)
    if device.type == "cuda":
        for name, pinned in (("pinned", True), ("pageable", False)):
            host = torch.empty(count, dtype=torch.uint8, pin_memory=pinned).random_()
            yield _rate(f"host to device, {name}", _wall(target, host, repeats), count, "bytes", None)
            yield _rate(f"device to host, {name}", _wall(host, target, repeats), count, "bytes", None)
    del source, target, copy
    for dtype in PRODUCTS:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))  # (size, size)
        time = interleaved({"": partial(torch.matmul, left, right)}, device, repeats)[""]
        peak = sheet.tensor if sheet and dtype is torch.bfloat16 else None
        yield _rate(f"{str(dtype)[6:]} product", time, 2 * size**3, "operations", peak)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _wall(target: Tensor, source: Tensor, repeats: int) -> Timing:
    """The time of copies between host and device, which no CUDA graph holds."""
    device = target.device if target.is_cuda else source.device
    return Timing.of([wall_seconds(lambda: target.copy_(source), device) for _ in range(repeats)])


def _rate(what: str, time: Timing, count: int, unit: str, sheet: float | None) -> dict[str, Any]:
    """`rate` is in units per second, of medians; `of_sheet` is its share of what the vendor's data sheet says."""
    rate = count / time.median
    return {
        "ceiling": what,
        "seconds": time.median,
        "rate": rate,
        "unit": unit,
        "of_sheet": rate / sheet if sheet else None,
    }


if __name__ == "__main__":
    main()
