"""Energy of decoding, from the GPU driver's counter: it counts the whole board, idle power included."""

from importlib import import_module
from time import perf_counter
from typing import Any

import torch

from paredown.evaluation.decoding import Decoding
from paredown.evaluation.gauges import wait

ENERGY_SECONDS = 2.0  # the driver updates its counter about ten times a second


class EnergyMeter:
    """NVML's counter of one GPU."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle

    @classmethod
    def of(cls, device: torch.device) -> "EnergyMeter | None":
        """The meter of a GPU; None for a CPU, without pynvml, and where the driver has no counter."""
        if device.type != "cuda":
            return None
        try:
            nvml = import_module("pynvml")
            nvml.nvmlInit()
            # by UUID, because CUDA_VISIBLE_DEVICES renumbers devices for torch but not for the driver
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            meter = cls(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
            meter.joules()
        except Exception:  # not installed, no driver library, a virtual GPU without a counter
            return None
        return meter

    def joules(self) -> float:
        """Energy in joules since the driver was loaded."""
        return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000


def joules_per_token(run: Decoding, meter: EnergyMeter | None, least_seconds: float = ENERGY_SECONDS) -> float | None:
    """Joules for each decoded token; None without a meter, or if the cache cannot be rewound.

    Decoding is repeated for at least `least_seconds`, because one pass is too short for the counter.
    """
    if meter is None or not run.rewindable:
        return None
    run.run_once()
    wait(run.ids.device)
    passes, energy_before, began = 0, meter.joules(), perf_counter()
    while not passes or perf_counter() - began < least_seconds:
        run.rewind()
        run.decode()
        wait(run.ids.device)
        passes += 1
    return (meter.joules() - energy_before) / (passes * run.steps * len(run.ids))
