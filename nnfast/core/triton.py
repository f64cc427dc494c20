"""The one file that imports triton, and the device functions that families share.

Itself imported only when somebody asks for a Triton kernel, so that importing nnfast stays cheap.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "INTERPRETED",
    "TensorDescriptor",
    "VERSION",
    "architecture",
    "exp",
    "exp_accurate",
    "log1p_unit",
    "one_minus_exp",
    "power",
    "tl",
    "triton",
    "wide",
]

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""

VERSION: str = triton.__version__


@functools.cache
def architecture(device: torch.device) -> str:
    """The target whose launch configurations serve a device: sm_80, sm_90, sm_100 or gfx942."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@triton.jit
def wide(x):
    """x as the type it is computed in."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


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


@triton.jit
def log1p_unit(v):
    """log(1 + v) for v in [0, 1], every digit of a small v included."""
    if v.dtype == tl.float64:
        u = 1.0 + v
        return tl.where(u == 1.0, v, tl.log(u) * (v / tl.where(u == 1.0, 1.0, u - 1.0)))
    w = v / (2.0 + v)  # 2 artanh(w), w <= 1/3
    square = w * w
    series = square * 0.0 + 1.0 / 15.0
    for i in tl.static_range(7):
        series = series * square + 1.0 / (13 - 2 * i)
    return 2.0 * w * series


@triton.jit
def one_minus_exp(v):
    """1 - e**-v for v >= 0, every digit of a small v included."""
    TERMS: tl.constexpr = 18 if v.dtype == tl.float64 else 10
    series = v * 0.0 + 1.0
    for i in tl.static_range(TERMS - 1):
        series = 1.0 - series * v * (1.0 / (TERMS - i))
    return tl.where(v < 0.5, v * series, 1.0 - exp(-v, True))


@triton.jit
def power(q, exponent):
    """q**exponent for q in [0, 1] and a scalar exponent >= 0; 0**0 is 1."""
    if exponent == 2.0:
        result = q * q
    elif exponent == 1.0:
        result = q
    elif exponent == 0.0:
        result = q * 0.0 + 1.0
    elif exponent == 0.5:
        result = tl.sqrt(q)
    else:
        some = tl.where(q == 0.0, 1.0, q)
        result = tl.where(q == 0.0, 0.0, exp(tl.log(some) * tl.full(q.shape, exponent, q.dtype), True))
    return result
