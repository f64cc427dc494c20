"""Batch norm, residual and activation in plain PyTorch: the truth of the tests, the `reference` backend, the
operators' fallback on every device, and double backward.

Ioffe and Szegedy 2015 (arXiv:1502.03167): z = (x - mean) / sqrt(var + eps) * weight + bias, to which a
residual is added, by itself or after a batch norm of its own; y = act(z).

x, residual: (N, C, *spatial). mean, var (biased), weight, bias: (C,) in the compute dtype, in which all is
computed: float64 for float64, else float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation.reference import IDENTITY, LEAKY_RELU, RELU, act, act_backward
from ..core.operator import channels_innermost, compute_dtype, dense


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x))


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    """value: (C,), to be broadcast to x."""
    return value.to(compute_dtype(x)).view(-1, *[1] * (x.dim() - 2))


def _sum(x: Tensor) -> Tensor:
    """Over all but channels."""
    return x.sum([0, *range(2, x.dim())])


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel; differentiable."""
    x, dims = _wide(x), [0, *range(2, x.dim())]
    mean = x.mean(dims)
    mean = mean + (x - _per_channel(mean, x)).mean(dims)  # what rounding left
    return mean, (x - _per_channel(mean, x)).square().mean(dims)


def merge(partial: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) from (3, parts, C): count, mean and squared deviations of parts."""
    count, means, squares = partial
    total = count.sum(0)
    mean = (count * means).sum(0) / total
    return mean, (squares + count * (means - mean).square()).sum(0) / total


def update_(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    offset: Tensor | None,
    correction: float,
    momentum: float,
) -> None:
    """running = (1 - momentum) * running + momentum * new, with mean + offset, and with var * correction."""
    shifted = mean if offset is None else mean + offset
    for running, value in ((running_mean, shifted), (running_var, var * correction)):
        running.copy_((1 - momentum) * running.to(mean.dtype) + momentum * value)


def _x_hat(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (_wide(x) - _per_channel(mean, x)) * _per_channel(torch.rsqrt(var + eps), x)


def batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """In the compute dtype; differentiable."""
    z = _x_hat(x, mean, var, eps)
    if weight is not None:
        z = z * _per_channel(weight, x)
    return z if bias is None else z + _per_channel(bias, x)


def _z(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_eps: float,
) -> Tensor:
    z = batch_norm(x, mean, var, weight, bias, eps)
    if residual is None:
        return z
    if residual_mean is None or residual_var is None:
        return z + _wide(residual)
    return z + batch_norm(residual, residual_mean, residual_var, residual_weight, residual_bias, residual_eps)


def _rows(x: Tensor) -> Tensor:
    """x (dense) as memory rows: (N * S, C) where channels are innermost, else (N * C, S)."""
    if channels_innermost(x):
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2:].numel())


def pack(positive: Tensor) -> Tensor:
    """Bits of a mask laid out as x: bit j % 8 of byte j // 8 of a row is its column j."""
    rows = _rows(positive).to(torch.uint8)
    bits = F.pad(rows, (0, -rows.shape[1] % 8)).view(rows.shape[0], (rows.shape[1] + 7) // 8, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def unpack(mask: Tensor, x: Tensor) -> Tensor:
    """The mask packed in bits beside x (dense), as booleans of x's shape."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    innermost = channels_innermost(x)
    columns = x.shape[1] if innermost else x.shape[2:].numel()
    rows = bits.flatten(1)[:, :columns].bool()
    if innermost:
        return rows.reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    return rows.reshape(x.shape)


def forward(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_eps: float,
    code: int,
    slope: float,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the bits of z > 0 (relu: not z <= 0), or (0,)."""
    x = dense(x)
    z = _z(
        x,
        mean,
        var,
        weight,
        bias,
        eps,
        residual,
        residual_mean,
        residual_var,
        residual_weight,
        residual_bias,
        residual_eps,
    )
    y = torch.empty_like(x).copy_(act(z, code, slope))
    if not with_mask:
        return y, x.new_empty(0, dtype=torch.uint8)
    positive = torch.empty_like(x, dtype=torch.bool).copy_(~(z <= 0) if code == RELU else z > 0)
    return y, pack(positive)


def _dz(grad: Tensor, x: Tensor, mask: Tensor | None, code: int, slope: float, *norms: object) -> Tensor:
    grad = _wide(grad)
    if code == IDENTITY:
        return grad
    if mask is not None:
        return torch.where(unpack(mask, x), grad, grad * slope if code == LEAKY_RELU else 0)
    return act_backward(grad, _z(x, *norms), code, slope)  # type: ignore[arg-type]


def sums(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_eps: float,
    mask: Tensor | None,
    code: int,
    slope: float,
    with_dz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over each channel of dz = grad * act'(z), of dz * x_hat, of dz * residual's x_hat; and dz."""
    x = dense(x)
    norms = (mean, var, weight, bias, eps, residual, residual_mean, residual_var)
    dz = _dz(grad, x, mask, code, slope, *norms, residual_weight, residual_bias, residual_eps)
    of_residual = mean.new_empty(0)
    if residual is not None and residual_mean is not None and residual_var is not None:
        of_residual = _sum(dz * _x_hat(residual, residual_mean, residual_var, residual_eps))
    kept = torch.empty_like(x).copy_(dz) if with_dz else x.new_empty(0)
    return _sum(dz), _sum(dz * _x_hat(x, mean, var, eps)), of_residual, kept


def _input_gradient(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
    count: float,
) -> Tensor:
    if sum_dz is not None and sum_dz_xhat is not None:
        along = _x_hat(x, mean, var, eps) * _per_channel(sum_dz_xhat / count, x)
        dz = dz - _per_channel(sum_dz / count, x) - along
    scale = torch.rsqrt(var + eps)
    return dz * _per_channel(scale if weight is None else scale * weight, x)


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_eps: float,
    mask: Tensor | None,
    code: int,
    slope: float,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
    sum_dz_residual_xhat: Tensor | None,
    count: float,
) -> tuple[Tensor, Tensor]:
    """weight * inv_std * (dz - sum_dz / count - x_hat * sum_dz_xhat / count); and for the residual's norm.

    Without sums, where statistics are constants, weight * inv_std * dz.
    """
    x = dense(x)
    norms = (mean, var, weight, bias, eps, residual, residual_mean, residual_var)
    dz = _dz(grad, x, mask, code, slope, *norms, residual_weight, residual_bias, residual_eps)
    dx = torch.empty_like(x)
    dx.copy_(_input_gradient(dz, x, mean, var, weight, eps, sum_dz, sum_dz_xhat, count))
    if residual is None or residual_mean is None or residual_var is None:
        return dx, x.new_empty(0)
    of_residual = (residual_mean, residual_var, residual_weight, residual_eps)
    dresidual = _input_gradient(dz, residual, *of_residual, sum_dz, sum_dz_residual_xhat, count)
    return dx, torch.empty_like(x).copy_(dresidual)
