"""The one file that imports triton, and the device functions that families share.

Itself imported only when somebody asks for a Triton kernel, so that importing nnfast stays cheap.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "VERSION", "exp", "exp_accurate", "tl", "triton"]

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""

VERSION: str = triton.__version__


@triton.jit
def exp_accurate(x):
    """e**x in float32 to 2 ulp, by Cody and Waite's reduction: x*log2(e) alone loses the tail's digits."""
    x = tl.minimum(
        tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL), 89.0, propagate_nan=tl.PropagateNan.ALL
    )
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    half = tl.floor(n * 0.5)  # 2**n in two factors, since n may be 128 or below -126
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(half) * tl.exp2(n - half)


@triton.jit
def exp(x, PRECISE: tl.constexpr):
    """e**x in the type of x. float32 is exact to 2 ulp if PRECISE, else by one hardware exp2."""
    if PRECISE and x.dtype == tl.float32:
        return exp_accurate(x)
    return tl.exp(x)
