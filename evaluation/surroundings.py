"""The device, the date and the versions of a measurement."""

import platform
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from paredown.evaluation.schema import Device, Surroundings

VERSIONED = ("paredown", "torch", "triton", "transformers", "safetensors", "datasets", "lm-eval")


def surroundings(device: torch.device) -> Surroundings:
    """Device, date (UTC) and versions of a measurement that is made now."""
    return {
        "device": _device(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _device(device: torch.device) -> Device:
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"type": device.type, "name": _cpu_name(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of those packages in `VERSIONED` that are installed."""
    installed = {"python": platform.python_version()}
    for name in VERSIONED:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed
