"""What the Triton kernels share.

Triton's interpreter (TRITON_INTERPRET=1, chosen when a kernel is decorated) runs them on CPU tensors. It computes
bfloat16 wrongly and truncates what it should round (triton 3.9), so that kernels take a constexpr INTERP: then products
are made in float32, and tests ask for float32 outputs.
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
