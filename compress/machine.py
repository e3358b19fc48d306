"""What this machine has, and what of it we used."""

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from paredown.compress.errors import PareError


def peak_memory() -> dict[str, int]:
    """Peak resident bytes of this process on the host, and peak allocated bytes on the GPU (0 without one)."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() and torch.cuda.is_initialized() else 0
    return {"host": host, "device": device}


def resident_memory() -> int:
    """Resident bytes of this process now (its peak where the system does not tell)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except OSError:
        return peak_memory()["host"]


def return_freed_memory() -> None:
    """Give freed memory back to the system: glibc keeps it otherwise, and a walk over blocks would grow by fragments."""
    with suppress(OSError, AttributeError):  # other C libraries have no malloc_trim, and need none
        ctypes.CDLL(None).malloc_trim(0)


def available_memory() -> int | None:
    """Bytes that new allocations can take on the host, or None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1`. Raises PareError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise PareError(f"--device {name!r} is none of auto, cpu, cuda, cuda:0, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PareError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices. Use --device cpu."
        )
    return device


def pick_dtype(name: str) -> torch.dtype | None:
    """`auto` (None: as stored), `bfloat16`, `float16` or `float32`."""
    names = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in names:
        raise PareError(f"--dtype {name!r} is none of {', '.join(names)}.")
    return names[name]
