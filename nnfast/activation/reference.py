"""Swish and Mish in plain PyTorch: the truth of the tests, the `reference` backend, and double backward.

Swish, also SiLU: x * sigmoid(x), Ramachandran et al. 2017 (arXiv:1710.05941), with beta = 1.
Mish: x * tanh(softplus(x)), Misra 2019 (arXiv:1908.08681).

All take and return tensors of one shape and dtype; half types are computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IDENTITY, RELU, LEAKY_RELU, SILU, MISH = range(5)

ACTIVATIONS = {
    "identity": IDENTITY,
    "relu": RELU,
    "leaky_relu": LEAKY_RELU,
    "silu": SILU,
    "swish": SILU,
    "mish": MISH,
}
"""Names of the activations that other operations end with, and the codes that operators know them by."""

_HALF = (torch.float16, torch.bfloat16)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF else x


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    wide = _wide(x)
    return (wide * torch.sigmoid(wide)).to(x.dtype)


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """grad * s * (1 + x * (1 - s)) with s = sigmoid(x); differentiable."""
    wide = _wide(x)
    s = torch.sigmoid(wide)
    return (_wide(grad) * (s * (1 + wide * (1 - s)))).to(x.dtype)


def mish(x: Tensor) -> Tensor:
    """x * tanh(softplus(x))."""
    wide = _wide(x)
    return (wide * torch.tanh(F.softplus(wide))).to(x.dtype)


def mish_backward(grad: Tensor, x: Tensor) -> Tensor:
    """grad * (t + x * sigmoid(x) * (1 - t**2)) with t = tanh(softplus(x)); differentiable."""
    wide = _wide(x)
    t = torch.tanh(F.softplus(wide))
    return (_wide(grad) * (t + wide * torch.sigmoid(wide) * (1 - t * t))).to(x.dtype)


def act(z: Tensor, code: int, slope: float) -> Tensor:
    """The activation of a code."""
    if code == RELU:
        return F.relu(z)
    if code == LEAKY_RELU:
        return F.leaky_relu(z, slope)
    return silu(z) if code == SILU else mish(z) if code == MISH else z


def act_backward(grad: Tensor, z: Tensor, code: int, slope: float) -> Tensor:
    """grad * act'(z)."""
    if code == RELU:
        return torch.where(z <= 0, 0, grad)
    if code == LEAKY_RELU:
        return torch.where(z > 0, grad, grad * slope)
    if code == SILU:
        return silu_backward(grad, z)
    return mish_backward(grad, z) if code == MISH else grad
