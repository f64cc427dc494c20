"""Swish and Mish in Triton: one pass forward, one backward, over the flat memory of dense tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.triton import exp, scalar, tl, triton, wide
from ..core.tuning import pointwise_config


@triton.jit
def silu(x, PRECISE: tl.constexpr):
    """x * sigmoid(x)."""
    return x / (1.0 + exp(-x, PRECISE))


@triton.jit
def silu_backward(grad, x, PRECISE: tl.constexpr):
    """grad * silu'(x)."""
    s = 1.0 / (1.0 + exp(-x, PRECISE))
    return grad * (s * (1.0 + x * (1.0 - s)))


@triton.jit
def mish(x, PRECISE: tl.constexpr):
    """x * tanh(softplus(x))."""
    # tanh(log(1 + n)) = w / (w + 2) with n = e**x, w = n * (n + 2); it is 1 beyond x = 20
    n = exp(tl.where(x > 20.0, 20.0, x), PRECISE)
    w = n * (n + 2.0)
    return x * (w / (w + 2.0))


@triton.jit
def mish_backward(grad, x, PRECISE: tl.constexpr):
    """grad * mish'(x)."""
    c = tl.where(x > 20.0, 20.0, x)
    n = exp(c, PRECISE)
    w = n * (n + 2.0)
    r = 1.0 / (w + 2.0)
    return grad * (r * (w + 4.0 * (c * n) * (n + 1.0) * r))


@triton.jit
def act(z, slope, ACT: tl.constexpr, PRECISE: tl.constexpr):
    """The activation of a code of `reference`."""
    if ACT == 1:
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACT == 2:
        z = tl.where(z > 0.0, z, z * scalar(slope, z.dtype))
    elif ACT == 3:
        z = silu(z, PRECISE)
    elif ACT == 4:
        z = mish(z, PRECISE)
    return z


@triton.jit
def act_backward(grad, z, slope, ACT: tl.constexpr, PRECISE: tl.constexpr):
    """grad * act'(z)."""
    if ACT == 1:
        grad = tl.where(z <= 0.0, 0.0, grad)
    elif ACT == 2:
        grad = tl.where(z > 0.0, grad, grad * scalar(slope, z.dtype))
    elif ACT == 3:
        grad = silu_backward(grad, z, PRECISE)
    elif ACT == 4:
        grad = mish_backward(grad, z, PRECISE)
    return grad


@triton.jit
def _forward_tile(x_ptr, y_ptr, offsets, mask, ACTIVATION: tl.constexpr):
    x = tl.load(x_ptr + offsets, mask=mask)
    PRECISE: tl.constexpr = x.dtype == tl.float32
    y = mish(wide(x), PRECISE) if ACTIVATION == "mish" else silu(wide(x), PRECISE)
    tl.store(y_ptr + offsets, y.to(x.dtype), mask=mask)


@triton.jit
def forward_kernel(x_ptr, y_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """y = activation(x); x, y: (size,)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:  # without a mask, accesses are 16 bytes wide whatever the size
        _forward_tile(x_ptr, y_ptr, offsets, None, ACTIVATION)
    else:
        _forward_tile(x_ptr, y_ptr, offsets, offsets < size, ACTIVATION)


@triton.jit
def _backward_tile(grad_ptr, x_ptr, out_ptr, offsets, mask, ACTIVATION: tl.constexpr):
    x = tl.load(x_ptr + offsets, mask=mask)
    grad = tl.load(grad_ptr + offsets, mask=mask)
    PRECISE: tl.constexpr = x.dtype == tl.float32
    if ACTIVATION == "mish":
        out = mish_backward(wide(grad), wide(x), PRECISE)
    else:
        out = silu_backward(wide(grad), wide(x), PRECISE)
    tl.store(out_ptr + offsets, out.to(x.dtype), mask=mask)


@triton.jit
def backward_kernel(grad_ptr, x_ptr, out_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """out = grad * activation'(x); grad, x, out: (size,)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _backward_tile(grad_ptr, x_ptr, out_ptr, offsets, None, ACTIVATION)
    else:
        _backward_tile(grad_ptr, x_ptr, out_ptr, offsets, offsets < size, ACTIVATION)


def _launch(kernel: triton.JITFunction, activation: str, *tensors: Tensor) -> None:
    """Run a kernel over tensors of one dense layout."""
    size = tensors[0].numel()
    if size:
        config = pointwise_config(tensors[0].element_size())
        grid = (triton.cdiv(size, config.block),)
        with torch.accelerator.device_index(tensors[0].device.index):
            kernel[grid](
                *tensors, size, ACTIVATION=activation, BLOCK=config.block, num_warps=config.num_warps
            )


def forward(activation: str, x: Tensor) -> Tensor:
    """activation(x); x of any shape and strides, the result as torch lays it out."""
    y = torch.empty_like(x)
    source = x if x.stride() == y.stride() else y.copy_(x)
    _launch(forward_kernel, activation, source, y)
    return y


def forward_(activation: str, x: Tensor) -> None:
    """x = activation(x), in place."""
    y = torch.empty_like(x)
    if x.stride() == y.stride():
        _launch(forward_kernel, activation, x, x)
    else:
        x.copy_(forward(activation, x))


def backward(activation: str, grad: Tensor, x: Tensor) -> Tensor:
    """grad * activation'(x), laid out as x; grad of x's shape and any strides."""
    out = torch.empty_like(x)
    strides = out.stride()
    source = x if x.stride() == strides else torch.empty_like(x).copy_(x)
    source_grad = grad if grad.stride() == strides else out.copy_(grad)
    _launch(backward_kernel, activation, source_grad, source, out)
    return out
