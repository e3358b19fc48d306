"""Energy of decoding, from the driver's counter of what the whole board has consumed, idle power included."""

from importlib import import_module
from time import perf_counter
from typing import Any

import torch

from paredown.evaluation.decoding import Decoding
from paredown.evaluation.gauges import wait

ENERGY_SECONDS = 2.0  # the driver's counter moves some ten times a second


class EnergyMeter:
    """Joules since some moment in the past, as NVML counts them."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle

    @classmethod
    def of(cls, device: torch.device) -> "EnergyMeter | None":
        """None without pynvml, and where the driver does not tell."""
        if device.type != "cuda":
            return None
        try:
            nvml = import_module("pynvml")
            nvml.nvmlInit()
            # by its name: CUDA_VISIBLE_DEVICES renumbers devices for torch and not for the driver
            name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            meter = cls(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
            meter.joules()
        except Exception:  # not installed, no driver library, a virtual GPU without a counter
            return None
        return meter

    def joules(self) -> float:
        return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000


def joules_per_token(run: Decoding, meter: EnergyMeter | None) -> float | None:
    """Decoded again and again for some seconds: one pass is too short for the counter."""
    if meter is None or not run.rewindable:
        return None
    run.run_once()
    wait(run.ids.device)
    passes, spent, began = 0, meter.joules(), perf_counter()
    while not passes or perf_counter() - began < ENERGY_SECONDS:
        run.rewind()
        run.decode()
        wait(run.ids.device)
        passes += 1
    return (meter.joules() - spent) / (passes * run.steps * len(run.ids))
