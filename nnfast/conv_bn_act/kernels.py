"""Batch norm + residual + activation in Triton: statistics and sums over blocks of rows, elementwise passes.

Memory is seen as rows: (N * S, C) where channels are innermost, else (N * C, S). A program of a reduction
holds a tile of rows x columns, goes down the rows that are its own, and writes what it found for its
channels, to be merged in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activation.kernels import act, act_backward
from ..core.operator import channels_innermost, dense
from ..core.triton import scalar, tl, triton, wide
from ..core.tuning import RowsConfig, norm_rows_config

PROGRAMS = 1024
"""Programs that fill a device: reductions are split until there are so many."""


@triton.jit
def _broadcast(values, INNERMOST: tl.constexpr):
    """Values of channels, beside a tile."""
    return values[None, :] if INNERMOST else values[:, None]


@triton.jit
def _of_channels(ptr, channel, known, INNERMOST: tl.constexpr):
    return _broadcast(tl.load(ptr + channel, mask=known, other=0.0), INNERMOST)


@triton.jit
def _norm(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channel, known, INNERMOST: tl.constexpr):
    """mean, inv_std, scale, bias of channels: x_hat = (x - mean) * inv_std, z = (x - mean) * scale + bias."""
    mean = _of_channels(mean_ptr, channel, known, INNERMOST)
    var = _of_channels(var_ptr, channel, known, INNERMOST)
    inv_std = 1.0 / tl.sqrt(var + scalar(eps, var.dtype))
    scale = inv_std
    if weight_ptr is not None:
        scale = inv_std * _of_channels(weight_ptr, channel, known, INNERMOST)
    bias = mean * 0.0
    if bias_ptr is not None:
        bias = _of_channels(bias_ptr, channel, known, INNERMOST)
    return mean, inv_std, scale, bias


@triton.jit
def _tile(rows, columns, channels, INNERMOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of an elementwise program: rows, columns, which are inside, channels, which of these are."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, COLUMNS)
    row = (pid // blocks) * ROWS + tl.arange(0, ROWS)
    column = (pid % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    if INNERMOST:
        channel, known = column, column < columns
    else:
        channel, known = row % channels, row < rows
    return row, column, (row < rows)[:, None] & (column < columns)[None, :], channel, known


@triton.jit
def _bits(mask_ptr, row, column, columns, inside):
    """Whether each element's bit is set."""
    byte = row[:, None] * tl.cdiv(columns, 8) + (column // 8)[None, :]
    return (tl.load(mask_ptr + byte, mask=inside, other=0) >> (column % 8).to(tl.uint8)[None, :]) & 1


@triton.jit
def _dz(grad, z, mask_ptr, row, column, columns, inside, slope, ACT: tl.constexpr, PRECISE: tl.constexpr):
    """grad * act'(z), with the sign of z from its bit where there is a mask."""
    if mask_ptr is not None:
        below = grad * scalar(slope, grad.dtype) if ACT == 2 else grad * 0.0
        dz = tl.where(_bits(mask_ptr, row, column, columns, inside) != 0, grad, below)
    else:
        dz = act_backward(grad, z, slope, ACT, PRECISE)
    return dz


@triton.jit
def _reduced(columns, channels, INNERMOST: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a reducing program: columns, channels (one alone if not innermost), split, number of its partials.

    Programs are numbered by column block, then channel, then split.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, COLUMNS)
    block = pid % blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    if INNERMOST:
        channel, split, partial = column, pid // blocks, pid // blocks
    else:
        channel = (pid // blocks) % channels + tl.arange(0, 1)
        split = pid // (blocks * channels)
        partial = split * blocks + block
    return column, channel, split, partial


@triton.jit
def _sum(values, INNERMOST: tl.constexpr):
    """A tile's sums over its channels."""
    return tl.sum(values, 0) if INNERMOST else tl.sum(tl.sum(values, 1, keep_dims=True), 0)


@triton.jit
def _shift(x_ptr, channel, columns, known, dtype: tl.constexpr, INNERMOST: tl.constexpr):
    """A channel's first value, if it is finite: what is left keeps its digits where means are large."""
    x = wide(tl.load(x_ptr + (channel if INNERMOST else channel * columns), mask=known, other=0.0)).to(dtype)
    return tl.where(x - x == 0.0, x, 0.0)


@triton.jit
def statistics_kernel(
    x_ptr,
    partial_ptr,
    rows: tl.int64,
    columns: tl.int64,
    channels: tl.int64,
    rows_a_split: tl.int64,
    partials: tl.int64,
    INNERMOST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial: (3, partials, C): count, mean and sum of squared deviations of the rows of a program.

    rows are those of one channel. Every element of the tile, less the channel's shift, goes down by Welford's
    recurrence (Welford 1962), in the end they are merged (Chan et al. 1979).
    """
    column, channel, split, partial = _reduced(columns, channels, INNERMOST, COLUMNS)
    within = (column < columns)[None, :]
    first = split * rows_a_split
    last = tl.minimum(first + rows_a_split, rows)
    dtype = partial_ptr.dtype.element_ty
    shift = _shift(x_ptr, channel, columns, channel < channels, dtype, INNERMOST)[None, :]
    count = tl.zeros([ROWS, 1], dtype)
    mean = tl.zeros([ROWS, COLUMNS], dtype)
    squares = tl.zeros([ROWS, COLUMNS], dtype)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & within
        memory_row = row if INNERMOST else row * channels + channel
        x = wide(tl.load(x_ptr + memory_row[:, None] * columns + column[None, :], mask=inside, other=0.0))
        count += (row < last)[:, None].to(dtype)
        x = tl.where(inside, x - shift, 0.0)
        delta = tl.where((row < last)[:, None], x - mean, 0.0)  # columns outside stay 0
        mean += delta * (1.0 / tl.maximum(count, 1.0))
        squares += delta * (x - mean)
    counts = tl.where(within, count, 0.0)
    total = _sum(counts, INNERMOST)
    of_channel = _sum(counts * mean, INNERMOST) / tl.maximum(total, 1.0)
    apart = mean - of_channel[None, :]
    squares = _sum(squares + counts * apart * apart, INNERMOST)
    known = channel < channels
    out_ptr = partial_ptr + partial * channels + channel
    tl.store(out_ptr, total, mask=known)
    tl.store(out_ptr + partials * channels, of_channel, mask=known)
    tl.store(out_ptr + 2 * partials * channels, squares, mask=known)


@triton.jit
def merge_kernel(
    x_ptr,
    partial_ptr,
    mean_ptr,
    var_ptr,
    columns: tl.int64,
    channels: tl.int64,
    partials: tl.int64,
    INNERMOST: tl.constexpr,
    PARTIALS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Mean and biased variance of channels from (3, partials, C), by Chan's formula."""
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    dtype = partial_ptr.dtype.element_ty
    total = tl.zeros([CHANNELS], dtype)
    mean = tl.zeros([CHANNELS], dtype)
    squares = tl.zeros([CHANNELS], dtype)
    for start in range(0, partials, PARTIALS):
        part = start + tl.arange(0, PARTIALS)
        inside = (part < partials)[:, None] & (channel < channels)[None, :]
        ptr = partial_ptr + part[:, None] * channels + channel[None, :]
        counts = tl.load(ptr, mask=inside, other=0.0)
        means = tl.load(ptr + partials * channels, mask=inside, other=0.0)
        count = tl.sum(counts, 0)
        here = tl.sum(counts * means, 0) / tl.maximum(count, 1.0)
        apart = means - here[None, :]
        squares += tl.sum(tl.load(ptr + 2 * partials * channels, mask=inside, other=0.0), 0)
        squares += tl.sum(counts * apart * apart, 0)
        delta = here - mean
        share = count / tl.maximum(total + count, 1.0)
        squares += delta * delta * total * share
        mean += delta * share
        total += count
    known = channel < channels
    if x_ptr is not None:
        mean += _shift(x_ptr, channel, columns, known, dtype, INNERMOST)
    tl.store(mean_ptr + channel, mean, mask=known)
    tl.store(var_ptr + channel, squares / tl.maximum(total, 1.0), mask=known)


@triton.jit
def update_kernel(
    running_mean_ptr,
    running_var_ptr,
    mean_ptr,
    var_ptr,
    offset_ptr,
    correction: tl.float64,
    momentum: tl.float64,
    channels: tl.int64,
    CHANNELS: tl.constexpr,
):
    """running = (1 - momentum) * running + momentum * new."""
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    mean = tl.load(mean_ptr + channel, mask=known, other=0.0)
    var = tl.load(var_ptr + channel, mask=known, other=0.0) * scalar(correction, mean.dtype)
    if offset_ptr is not None:
        mean += tl.load(offset_ptr + channel, mask=known, other=0.0)
    keep, share = scalar(1.0 - momentum, mean.dtype), scalar(momentum, mean.dtype)
    running = tl.load(running_mean_ptr + channel, mask=known, other=0.0)
    new = keep * running.to(mean.dtype) + share * mean
    tl.store(running_mean_ptr + channel, new.to(running.dtype), mask=known)
    running = tl.load(running_var_ptr + channel, mask=known, other=0.0)
    new = keep * running.to(mean.dtype) + share * var
    tl.store(running_var_ptr + channel, new.to(running.dtype), mask=known)


@triton.jit
def forward_kernel(
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    eps: tl.float64,
    residual_ptr,
    residual_mean_ptr,
    residual_var_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    residual_eps: tl.float64,
    y_ptr,
    mask_ptr,
    slope: tl.float64,
    rows: tl.int64,
    columns: tl.int64,
    channels: tl.int64,
    ACT: tl.constexpr,
    INNERMOST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = act(norm(x) [+ residual | + its norm]), and a bit for each z > 0 (relu: not z <= 0)."""
    row, column, inside, channel, known = _tile(rows, columns, channels, INNERMOST, ROWS, COLUMNS)
    offsets = row[:, None] * columns + column[None, :]
    mean, _, scale, bias = _norm(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channel, known, INNERMOST)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    z = (wide(x) - mean) * scale + bias
    if residual_ptr is not None:
        r = wide(tl.load(residual_ptr + offsets, mask=inside, other=0.0))
        if residual_mean_ptr is not None:
            mean, _, scale, bias = _norm(
                residual_mean_ptr,
                residual_var_ptr,
                residual_weight_ptr,
                residual_bias_ptr,
                residual_eps,
                channel,
                known,
                INNERMOST,
            )
            r = (r - mean) * scale + bias
        z += r
    y = act(z, slope, ACT, x.dtype == tl.float32)
    tl.store(y_ptr + offsets, y.to(x.dtype), mask=inside)
    if mask_ptr is not None:
        zero = tl.zeros([ROWS, COLUMNS], tl.int1)
        positive = ((z <= 0.0) == zero if ACT == 1 else z > 0.0) & inside
        bits = tl.reshape(positive.to(tl.int32), [ROWS, COLUMNS // 8, 8])
        byte = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
        byte_columns = tl.cdiv(columns, 8)
        block = (tl.program_id(0).to(tl.int64) % tl.cdiv(columns, COLUMNS)) * (COLUMNS // 8)
        byte_column = block + tl.arange(0, COLUMNS // 8)
        tl.store(
            mask_ptr + row[:, None] * byte_columns + byte_column[None, :],
            byte.to(tl.uint8),
            mask=(row < rows)[:, None] & (byte_column < byte_columns)[None, :],
        )


@triton.jit
def sums_kernel(
    grad_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    eps: tl.float64,
    residual_ptr,
    residual_mean_ptr,
    residual_var_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    residual_eps: tl.float64,
    mask_ptr,
    slope: tl.float64,
    partial_ptr,
    dz_ptr,
    rows: tl.int64,
    columns: tl.int64,
    channels: tl.int64,
    rows_a_split: tl.int64,
    partials: tl.int64,
    ACT: tl.constexpr,
    INNERMOST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial: (2 or 3, partials, C): sums of dz, dz * x_hat and dz * residual's x_hat; dz as well if wanted.

    rows are those of one channel.
    """
    column, channel, split, partial = _reduced(columns, channels, INNERMOST, COLUMNS)
    known = channel < channels
    first = split * rows_a_split
    last = tl.minimum(first + rows_a_split, rows)
    mean, inv_std, scale, bias = _norm(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channel, known, True)
    if residual_mean_ptr is not None:
        r_mean, r_inv_std, r_scale, r_bias = _norm(
            residual_mean_ptr,
            residual_var_ptr,
            residual_weight_ptr,
            residual_bias_ptr,
            residual_eps,
            channel,
            known,
            True,
        )
    dtype = partial_ptr.dtype.element_ty
    sum_dz = tl.zeros([ROWS, COLUMNS], dtype)
    sum_dz_x = tl.zeros([ROWS, COLUMNS], dtype)
    sum_dz_r = tl.zeros([ROWS, COLUMNS], dtype)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < columns)[None, :]
        memory_row = row if INNERMOST else row * channels + channel
        offsets = memory_row[:, None] * columns + column[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
        centred = wide(x) - mean
        z = centred * scale + bias
        if residual_ptr is not None:
            r = wide(tl.load(residual_ptr + offsets, mask=inside, other=0.0))
            if residual_mean_ptr is not None:
                r -= r_mean
                z += r * r_scale + r_bias
            else:
                z += r
        grad = wide(tl.load(grad_ptr + offsets, mask=inside, other=0.0))
        dz = _dz(grad, z, mask_ptr, memory_row, column, columns, inside, slope, ACT, x.dtype == tl.float32)
        dz = tl.where(inside, dz, 0.0)
        sum_dz += dz
        sum_dz_x += tl.where(inside, dz * centred, 0.0)
        if residual_mean_ptr is not None:
            sum_dz_r += tl.where(inside, dz * r, 0.0)
        if dz_ptr is not None:
            tl.store(dz_ptr + offsets, dz.to(x.dtype), mask=inside)
    out_ptr = partial_ptr + partial * channels + channel
    tl.store(out_ptr, _sum(sum_dz, INNERMOST), mask=known)
    tl.store(out_ptr + partials * channels, _sum(sum_dz_x * inv_std, INNERMOST), mask=known)
    if residual_mean_ptr is not None:
        tl.store(out_ptr + 2 * partials * channels, _sum(sum_dz_r * r_inv_std, INNERMOST), mask=known)


@triton.jit
def _input_gradient(
    dz,
    centred,
    inv_std,
    scale,
    sum_dz_ptr,
    sum_dz_xhat_ptr,
    share,
    channel,
    known,
    INNERMOST: tl.constexpr,
):
    """scale * (dz - sum_dz / count - x_hat * sum_dz_xhat / count)."""
    if sum_dz_ptr is not None:
        share = scalar(share, dz.dtype)
        of_xhat = _of_channels(sum_dz_xhat_ptr, channel, known, INNERMOST) * share
        dz -= _of_channels(sum_dz_ptr, channel, known, INNERMOST) * share
        dz -= centred * (inv_std * of_xhat)
    return dz * scale


@triton.jit
def backward_kernel(
    grad_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    eps: tl.float64,
    residual_ptr,
    residual_mean_ptr,
    residual_var_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    residual_eps: tl.float64,
    mask_ptr,
    slope: tl.float64,
    sum_dz_ptr,
    sum_dz_xhat_ptr,
    sum_dz_residual_xhat_ptr,
    share: tl.float64,
    dx_ptr,
    dresidual_ptr,
    rows: tl.int64,
    columns: tl.int64,
    channels: tl.int64,
    ACT: tl.constexpr,
    INNERMOST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx, and the gradient of a residual with its own norm; share = 1 / count."""
    row, column, inside, channel, known = _tile(rows, columns, channels, INNERMOST, ROWS, COLUMNS)
    offsets = row[:, None] * columns + column[None, :]
    mean, inv_std, scale, bias = _norm(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channel, known, INNERMOST
    )
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    centred = wide(x) - mean
    z = centred * scale + bias
    if residual_ptr is not None:
        r = wide(tl.load(residual_ptr + offsets, mask=inside, other=0.0))
        if residual_mean_ptr is not None:
            r_mean, r_inv_std, r_scale, r_bias = _norm(
                residual_mean_ptr,
                residual_var_ptr,
                residual_weight_ptr,
                residual_bias_ptr,
                residual_eps,
                channel,
                known,
                INNERMOST,
            )
            r -= r_mean
            z += r * r_scale + r_bias
        else:
            z += r
    grad = wide(tl.load(grad_ptr + offsets, mask=inside, other=0.0))
    dz = _dz(grad, z, mask_ptr, row, column, columns, inside, slope, ACT, x.dtype == tl.float32)
    dx = _input_gradient(
        dz, centred, inv_std, scale, sum_dz_ptr, sum_dz_xhat_ptr, share, channel, known, INNERMOST
    )
    tl.store(dx_ptr + offsets, dx.to(x.dtype), mask=inside)
    if residual_mean_ptr is not None:
        dr = _input_gradient(
            dz,
            r,
            r_inv_std,
            r_scale,
            sum_dz_ptr,
            sum_dz_residual_xhat_ptr,
            share,
            channel,
            known,
            INNERMOST,
        )
        tl.store(dresidual_ptr + offsets, dr.to(x.dtype), mask=inside)


class _Rows:
    """x (dense) as memory rows, and how kernels over them are launched."""

    def __init__(self, x: Tensor, heavy: bool = False) -> None:
        n, self.channels, s = x.shape[0], x.shape[1], x.shape[2:].numel()
        self.innermost = channels_innermost(x)
        self.rows, self.columns = (n * s, self.channels) if self.innermost else (n * self.channels, s)
        self.of_channel = n * s if self.innermost else n
        self.config = norm_rows_config(self.columns, x.element_size(), heavy)
        self.blocks = triton.cdiv(self.columns, self.config.block)

    def elementwise(self) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and arguments of a program a tile."""
        return (triton.cdiv(self.rows, self.config.rows) * self.blocks,), self._arguments(self.rows)

    def reduction(self) -> tuple[tuple[int], dict[str, Any], int]:
        """Grid, arguments, and how many programs share a channel."""
        beside = self.blocks if self.innermost else self.blocks * self.channels
        tiles = triton.cdiv(self.of_channel, self.config.rows)
        tiles_a_split = triton.cdiv(tiles, min(max(PROGRAMS // beside, 1), tiles))
        splits = triton.cdiv(tiles, tiles_a_split)
        partials = splits if self.innermost else splits * self.blocks
        arguments = self._arguments(self.of_channel)
        arguments |= {"rows_a_split": tiles_a_split * self.config.rows, "partials": partials}
        return (splits * beside,), arguments, partials

    def _arguments(self, rows: int) -> dict[str, Any]:
        return {
            "rows": rows,
            "columns": self.columns,
            "channels": self.channels,
            "INNERMOST": self.innermost,
            "ROWS": self.config.rows,
            "COLUMNS": self.config.block,
            "num_warps": self.config.num_warps,
        }


def _device(x: Tensor) -> Any:
    return torch.accelerator.device_index(x.device.index)


def _alike(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """tensor laid out as x."""
    if tensor is None or tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)


MERGE = RowsConfig(rows=64, block=16, num_warps=4)
"""Partials x channels of a tile that is merged."""


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of x."""
    x = dense(x)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels = x.shape[1]
    if not x.numel():
        nan = x.new_full((channels,), torch.nan, dtype=dtype)
        return nan, nan.clone()
    mean, var = (x.new_empty(channels, dtype=dtype) for _ in range(2))
    rows = _Rows(x)
    grid, arguments, partials = rows.reduction()
    partial = x.new_empty((3, partials, channels), dtype=dtype)
    with _device(x):
        statistics_kernel[grid](x, partial, **arguments)
        _merge(x, partial, mean, var, rows.columns, rows.innermost)
    return mean, var


def merge(partial: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) from (3, parts, C): count, mean and squared deviations of parts."""
    channels = partial.shape[2]
    mean, var = (partial.new_empty(channels) for _ in range(2))
    with _device(partial):
        _merge(None, partial, mean, var, 0, True)
    return mean, var


def _merge(
    x: Tensor | None, partial: Tensor, mean: Tensor, var: Tensor, columns: int, innermost: bool
) -> None:
    """x: what was shifted by its channels' first values, or None."""
    _, partials, channels = partial.shape
    merge_kernel[(triton.cdiv(channels, MERGE.block),)](
        x,
        partial,
        mean,
        var,
        columns,
        channels,
        partials,
        INNERMOST=innermost,
        PARTIALS=MERGE.rows,
        CHANNELS=MERGE.block,
        num_warps=MERGE.num_warps,
    )


def update_(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    offset: Tensor | None,
    correction: float,
    momentum: float,
) -> None:
    """Running statistics, in place."""
    arguments = (running_mean, running_var, mean, var, offset, correction, momentum, len(mean))
    with _device(mean):
        update_kernel[(triton.cdiv(len(mean), 256),)](*arguments, CHANNELS=256, num_warps=4)


def forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """y and mask; the arguments are those of the operator."""
    *norm, residual, r_mean, r_var, r_weight, r_bias, r_eps, act, slope, with_mask = arguments
    x = dense(x)
    y = torch.empty_like(x)
    rows = _Rows(x)
    mask_shape = (rows.rows, triton.cdiv(rows.columns, 8)) if with_mask else (0,)
    mask = x.new_empty(mask_shape, dtype=torch.uint8)
    if x.numel():
        grid, launch = rows.elementwise()
        of_residual = (_alike(residual, x), r_mean, r_var, r_weight, r_bias, r_eps)
        with _device(x):
            forward_kernel[grid](
                x, *norm, *of_residual, y, mask if with_mask else None, slope, ACT=act, **launch
            )
    return y, mask


def sums(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The three sums and dz; the arguments are those of the operator."""
    *norm, residual, r_mean, r_var, r_weight, r_bias, r_eps, mask, act, slope, with_dz = arguments
    x = dense(x)
    dz = torch.empty_like(x) if with_dz else x.new_empty(0)
    mean = norm[0]
    count = 2 if r_mean is None else 3
    found = [torch.zeros_like(mean) for _ in range(count)]
    if x.numel():
        grid, launch, partials = _Rows(x, heavy=True).reduction()
        partial = mean.new_empty((count, partials, len(mean)))
        of_residual = (_alike(residual, x), r_mean, r_var, r_weight, r_bias, r_eps)
        with _device(x):
            sums_kernel[grid](
                _alike(grad, x),
                x,
                *norm,
                *of_residual,
                mask,
                slope,
                partial,
                dz if with_dz else None,
                ACT=act,
                **launch,
            )
        found = [of_programs.sum(0) for of_programs in partial]
    sum_dz, sum_dz_xhat, *of_residual_xhat = found
    return sum_dz, sum_dz_xhat, of_residual_xhat[0] if of_residual_xhat else mean.new_empty(0), dz


def backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """dx and dresidual; the arguments are those of the operator."""
    *norm, residual, r_mean, r_var, r_weight, r_bias, r_eps, mask, act, slope = arguments[:-4]
    *given, count = arguments[-4:]
    x = dense(x)
    dx = torch.empty_like(x)
    dresidual = x.new_empty(0) if r_mean is None else torch.empty_like(x)
    if x.numel():
        grid, launch = _Rows(x).elementwise()
        of_residual = (_alike(residual, x), r_mean, r_var, r_weight, r_bias, r_eps)
        out = (dx, None if r_mean is None else dresidual)
        with _device(x):
            backward_kernel[grid](
                _alike(grad, x),
                x,
                *norm,
                *of_residual,
                mask,
                slope,
                *given,
                1 / count,
                *out,
                ACT=act,
                **launch,
            )
    return dx, dresidual
