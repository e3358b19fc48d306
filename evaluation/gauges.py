"""Measures of a model or a device: bytes, wall time, and the relative error between two tensors."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.machine import available_memory
from paredown.evaluation.schema import Spread
from paredown.kernels.timing import Timing


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; shared ones count once."""
    tensors = {(t.device, t.data_ptr(), t.numel()): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def activation_bytes(model: Any, context: int) -> int:
    """An estimate of the bytes that a forward over one sequence of `context` tokens allocates for its activations.

    It counts six copies of the hidden states and three of the inner states of the MLP.
    """
    config = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    return int(context * (6 * hidden + 3 * inner) * model.dtype.itemsize)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, or None where the system does not say."""
    if device.type != "cuda":
        return available_memory()
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserved


class Peak:
    """Context manager that measures the largest increase of allocated memory on a GPU.

    Afterwards `bytes` is that increase; None on a CPU, where torch does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, None if device.type != "cuda" else 0

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes until the device has finished its work."""
    wait(device)
    began = perf_counter()
    call()
    wait(device)
    return perf_counter() - began


def wait(device: torch.device) -> None:
    """Wait until the device has finished the work that was queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(timing: Timing) -> Spread:
    return {"median": timing.median, "low": timing.low, "high": timing.high}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """`|value - reference| / |reference|` in the Frobenius norm, computed in float32."""
    return float((value.float() - reference.float()).norm() / reference.float().norm().clamp_min(1e-30))
