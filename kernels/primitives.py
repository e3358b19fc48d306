"""Shared by the Triton kernels.

With TRITON_INTERPRET=1 in the environment when a kernel is defined, Triton's interpreter runs it on CPU tensors. The
interpreter computes bfloat16 wrongly and truncates where it should round (triton 3.9). Kernels therefore take a constexpr
INTERP: when it is set they multiply in float32, and tests ask for float32 outputs.
"""

from functools import cache

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total, INTERP: tl.constexpr):
    """`total + a @ b` for 16-bit a and b and float32 total."""
    if INTERP:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


def has_dependent_launch(device: torch.device, interpreted: bool = INTERPRETED) -> bool:
    """Whether a kernel can start on this device before the previous one has finished: on NVIDIA from 9.0 on."""
    nvidia = device.type == "cuda" and not torch.version.hip and not interpreted
    return nvidia and torch.cuda.get_device_capability(device)[0] >= 9


dependent_launch = cache(has_dependent_launch)  # asking the device takes time at every launch
