"""Shared by the Triton kernels.

With TRITON_INTERPRET=1 in the environment when a kernel is defined, Triton's interpreter runs it on CPU tensors. The
interpreter computes bfloat16 wrongly and truncates where it should round (triton 3.9). Kernels therefore take a constexpr
INTERP: when it is set they multiply in float32, and tests ask for float32 outputs.
"""

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
