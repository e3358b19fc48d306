"""The machine a run works on: its memory, its devices and its number formats."""

import ctypes
import os
import sys
from contextlib import suppress

import psutil  # type: ignore[import-untyped]
import torch

from paredown.compress.errors import PareError


def peak_memory() -> dict[str, int]:
    """Peak resident bytes of this process on the host, and peak allocated bytes on the GPU (0 without one)."""
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() and torch.cuda.is_initialized() else 0
    return {"host": _peak_resident(), "device": device}


def _peak_resident() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    else:
        import resource  # Windows has none

        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Resident bytes of this process now, or its peak where the system does not say."""
    try:
        return int(psutil.Process().memory_info().rss)
    except (OSError, psutil.Error):
        return _peak_resident()


def return_freed_memory() -> None:
    """Give freed memory back to the system. glibc would keep it, and fragments would add up from block to block."""
    if os.name == "posix":
        with suppress(OSError, AttributeError):  # other C libraries have no malloc_trim, and need none
            ctypes.CDLL(None).malloc_trim(0)


def available_memory() -> int | None:
    """Bytes that new allocations can take on the host, or None where the system does not say."""
    try:
        return int(psutil.virtual_memory().available)
    except (OSError, psutil.Error):
        return None


def pick_device(name: str) -> torch.device:
    """The device called `auto` (the GPU if there is one), `cpu`, `cuda` or `cuda:1`.

    Raises PareError for another name, and for a GPU that this machine does not have.
    """
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
    """The dtype called `bfloat16`, `float16` or `float32`; None for `auto`, which keeps what the checkpoint stores.

    Raises PareError for another name.
    """
    dtypes = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in dtypes:
        raise PareError(f"--dtype {name!r} is none of {', '.join(dtypes)}.")
    return dtypes[name]
