"""Convolution in plain PyTorch with what stands before and after it: the truth of the tests, the `reference`
backend, the operators' fallback on every device, and double backward.

a = prologue_act((x - center) * scale + shift),  z = conv2d(a, weight) + bias + residual,  y = act(z)

a is padded by zeros after its activation. x: (N, C, H, W), weight: (O, C / groups, kH, kW), residual and y:
(N, O, OH, OW), center, scale, shift: (C,), bias: (O,). All is computed in float32, float64 for float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..activation.reference import IDENTITY, act_backward
from ..activation.reference import act as activated
from ..core.operator import compute_dtype


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x))


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.to(compute_dtype(x)).view(-1, 1, 1)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def prologue_argument(
    x: Tensor, center: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x - center, and the argument of the prologue's activation; in the compute dtype, differentiable."""
    x = _wide(x)
    if scale is None or shift is None:
        return x, x
    centred = x if center is None else x - _per_channel(center, x)
    return centred, centred * _per_channel(scale, x) + _per_channel(shift, x)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: int,
    prologue_slope: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """z in the compute dtype; differentiable."""
    a = activated(prologue_argument(x, center, scale, shift)[1], prologue, prologue_slope)
    wide_bias = None if bias is None else bias.to(a.dtype)
    z = F.conv2d(a, weight.to(a.dtype), wide_bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    return z if residual is None else z + residual


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: int,
    prologue_slope: float,
    stride: list[int],
    padding: list[int],
    act: int,
    slope: float,
    with_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """y, and its statistics (3, 1, O): count, mean and sum of squared deviations of channels; or (0,)."""
    norm = (center, scale, shift, prologue, prologue_slope)
    z = convolve(x, weight, bias, residual, *norm, stride, padding)
    y = _last(activated(z, act, slope).to(x.dtype))
    if not with_statistics:
        return y, z.new_empty(0)
    var, mean = torch.var_mean(_wide(y), (0, 2, 3), correction=0)
    count = torch.full_like(mean, y.numel() // y.shape[1])
    return y, torch.stack([count, mean, var * count]).unsqueeze(1)


def _masked(grad: Tensor, y: Tensor | None, act: int, slope: float) -> Tensor:
    return _wide(grad) if y is None or act == IDENTITY else act_backward(_wide(grad), _wide(y), act, slope)


def input_gradient(
    grad: Tensor,
    y: Tensor | None,
    weight: Tensor,
    added: Tensor | None,
    x: Tensor | None,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: int,
    prologue_slope: float,
    size: list[int],
    stride: list[int],
    padding: list[int],
    act: int,
    slope: float,
    scaled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx: (size); with a prologue, of the gradient dz of its activation's argument, dz * scale if scaled.

    And the sums over channels of dz and of dz * (x - center), or (0,). y has the sign of act's argument;
    added is another gradient of what is convolved.
    """
    da = conv2d_input(size, _wide(weight), _masked(grad, y, act, slope), stride, padding)
    if added is not None:
        da = da + added
    if x is None or scale is None:
        return _last(da.to(grad.dtype)), da.new_empty(0), da.new_empty(0)
    centred, z = prologue_argument(x, center, scale, shift)
    dz = act_backward(da, z, prologue, prologue_slope)
    dx = dz * _per_channel(scale, x) if scaled else dz
    return _last(dx.to(grad.dtype)), dz.sum((0, 2, 3)), (dz * centred).sum((0, 2, 3))


def weight_gradient(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: int,
    prologue_slope: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    act: int,
    slope: float,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    """dweight: (O, C, kH, kW), channels innermost in memory; dbias: (O,) in the compute dtype, or (0,)."""
    dz = _masked(grad, y, act, slope)
    a = activated(prologue_argument(x, center, scale, shift)[1], prologue, prologue_slope)
    size = [grad.shape[1], x.shape[1], *kernel]
    dweight = conv2d_weight(a, size, dz, stride, padding).to(x.dtype)
    last = dweight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return last, dz.sum((0, 2, 3)) if with_bias else dz.new_empty(0)
