"""Convolution in Triton: implicit matrix products, with what stands before and after in the same pass.

x: (N, H, W, C), weight: (O, kH, kW, C), y: (N, OH, OW, O) in memory. A program makes a tile of pixels x
channels; it goes along taps and channels, a block of channels of one tap at a time, or, where channels are
few, along both as one. Products are summed in float32, float64 in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activation.kernels import act, act_backward
from ..core.operator import compute_dtype, convolved_size
from ..core.triton import tl, triton, wide
from ..core.tuning import CONV_INPUT_WIDEST, ConvConfig, conv_config, conv_splits, weight_gradient_config


@triton.jit
def _place(pid, rows_of_tiles, columns_of_tiles, GROUP: tl.constexpr):
    """Tile of a program: GROUP rows of tiles are gone through together, so that they share weights in L2."""
    group = pid // (GROUP * columns_of_tiles)
    first = group * GROUP
    height = tl.minimum(rows_of_tiles - first, GROUP)
    within = pid % (GROUP * columns_of_tiles)
    return first + within % height, within // height


@triton.jit
def _normed(x, known, channel, center_ptr, scale_ptr, shift_ptr):
    """(x - center) and (x - center) * scale + shift, by channels."""
    centred = wide(x)
    if center_ptr is not None:
        centred -= tl.load(center_ptr + channel, mask=known, other=0.0)[None, :]
    scale = tl.load(scale_ptr + channel, mask=known, other=0.0)[None, :]
    return centred, centred * scale + tl.load(shift_ptr + channel, mask=known, other=0.0)[None, :]


@triton.jit
def _prologue(x, inside, known, channel, center_ptr, scale_ptr, shift_ptr, slope, ACT: tl.constexpr):
    """What the convolution sees of a tile of its input: padding comes after the activation."""
    if scale_ptr is not None:
        _, z = _normed(x, known, channel, center_ptr, scale_ptr, shift_ptr)
        z = act(z, slope, ACT, x.dtype == tl.float32)
        x = tl.where(inside, z, 0.0).to(x.dtype)
    return x


@triton.jit
def _masked(grad, y_ptr, offsets, inside, slope, ACT: tl.constexpr):
    """grad * act'(z) where y has the sign of z."""
    if ACT != 0:
        y = wide(tl.load(y_ptr + offsets, mask=inside, other=0.0))
        grad = act_backward(wide(grad), y, slope, ACT, False).to(grad.dtype)
    return grad


@triton.jit
def _epilogue(
    acc,
    tile,
    rows,
    columns,
    column,
    bias_ptr,
    residual_ptr,
    y_ptr,
    partial_ptr,
    partials,
    slope,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y = act(acc + bias + residual), and of y, as it is stored, count, mean and squared deviations."""
    row = tile * ROWS + tl.arange(0, ROWS)
    within = column < columns
    inside = (row < rows)[:, None] & within[None, :]
    offsets = row.to(tl.int64)[:, None] * columns + column[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=within, other=0.0)[None, :]
    if residual_ptr is not None:
        acc += wide(tl.load(residual_ptr + offsets, mask=inside, other=0.0))
    dtype = y_ptr.dtype.element_ty
    y = act(acc, slope, ACT, dtype == tl.float32).to(dtype)
    tl.store(y_ptr + offsets, y, mask=inside)
    if partial_ptr is not None:
        count = tl.minimum(rows - tile * ROWS, ROWS).to(acc.dtype)
        values = tl.where(inside, wide(y), 0.0)
        mean = tl.sum(values, 0) / count
        apart = tl.where(inside, values - mean[None, :], 0.0)
        out_ptr = partial_ptr + tile.to(tl.int64) * columns + column
        step = partials.to(tl.int64) * columns
        tl.store(out_ptr, mean * 0.0 + count, mask=within)
        tl.store(out_ptr + step, mean, mask=within)
        tl.store(out_ptr + 2 * step, tl.sum(apart * apart, 0), mask=within)


@triton.jit
def forward_kernel(
    x_ptr,
    weight_ptr,
    center_ptr,
    scale_ptr,
    shift_ptr,
    prologue_slope: tl.float64,
    bias_ptr,
    residual_ptr,
    y_ptr,
    partial_ptr,
    work_ptr,
    slope: tl.float64,
    rows,
    channels,
    height,
    width,
    out_channels,
    out_height,
    out_width,
    pad_height,
    pad_width,
    steps_a_split,
    PROLOGUE: tl.constexpr,
    ACT: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y: (rows, out_channels), rows = N * OH * OW; or, of one split of the sums, work: (splits, rows, O)."""
    tiles, columns_of_tiles = tl.cdiv(rows, ROWS), tl.cdiv(out_channels, COLUMNS)
    tile, tile_column = _place(tl.program_id(0), tiles, columns_of_tiles, GROUP)
    row = tile * ROWS + tl.arange(0, ROWS)
    top = ((row // out_width) % out_height) * STRIDE_HEIGHT - pad_height
    left = (row % out_width) * STRIDE_WIDTH - pad_width
    image = (row // (out_width * out_height)).to(tl.int64)
    corner = ((image * height + top) * width + left) * channels
    column = tile_column.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    length = KERNEL_HEIGHT * KERNEL_WIDTH * channels
    blocks = tl.cdiv(length if FLAT else channels, DEPTH)
    first = tl.program_id(1) * steps_a_split
    last = tl.minimum(first + steps_a_split, blocks if FLAT else blocks * KERNEL_HEIGHT * KERNEL_WIDTH)
    acc = tl.zeros([ROWS, COLUMNS], tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for step in range(first, last):
        if FLAT:
            along = step * DEPTH + tl.arange(0, DEPTH).to(tl.int64)
            known = along < length
            channel = along % channels
            tap = ((along // channels) % (KERNEL_HEIGHT * KERNEL_WIDTH)).to(tl.int32)[None, :]
        else:
            tap = step // blocks
            channel = (step % blocks) * DEPTH + tl.arange(0, DEPTH).to(tl.int64)
            known = channel < channels
            along = tap * channels + channel
        down, right = tap // KERNEL_WIDTH, tap % KERNEL_WIDTH
        y, x = top[:, None] + down, left[:, None] + right
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (row < rows)[:, None] & known[None, :]
        offsets = corner[:, None] + (down * width + right) * channels + channel[None, :]
        a = tl.load(x_ptr + offsets, mask=inside, other=0.0)
        a = _prologue(a, inside, known, channel, center_ptr, scale_ptr, shift_ptr, prologue_slope, PROLOGUE)
        b = tl.load(
            weight_ptr + column[None, :] * length + along[:, None],
            mask=known[:, None] & (column < out_channels)[None, :],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    if work_ptr is not None:
        split = tl.program_id(1).to(tl.int64)
        tl.store(
            work_ptr + (split * rows + row.to(tl.int64))[:, None] * out_channels + column[None, :],
            acc,
            mask=(row < rows)[:, None] & (column < out_channels)[None, :],
        )
    else:
        _epilogue(
            acc,
            tile,
            rows,
            out_channels,
            column,
            bias_ptr,
            residual_ptr,
            y_ptr,
            partial_ptr,
            tiles,
            slope,
            ACT,
            ROWS,
        )


@triton.jit
def finish_kernel(
    work_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    partial_ptr,
    slope: tl.float64,
    rows,
    out_channels,
    splits,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The splits' sums in order, and the epilogue."""
    tile = tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < out_channels)[None, :]
    offsets = row.to(tl.int64)[:, None] * out_channels + column[None, :]
    acc = tl.zeros([ROWS, COLUMNS], work_ptr.dtype.element_ty)
    for split in range(splits):
        moved = offsets + split * (rows.to(tl.int64) * out_channels)
        acc += tl.load(work_ptr + moved, mask=inside, other=0.0)
    tiles = tl.cdiv(rows, ROWS)
    _epilogue(
        acc,
        tile,
        rows,
        out_channels,
        column,
        bias_ptr,
        residual_ptr,
        y_ptr,
        partial_ptr,
        tiles,
        slope,
        ACT,
        ROWS,
    )


@triton.jit
def input_gradient_kernel(
    grad_ptr,
    y_ptr,
    weight_ptr,
    added_ptr,
    x_ptr,
    center_ptr,
    scale_ptr,
    shift_ptr,
    prologue_slope: tl.float64,
    dx_ptr,
    partial_ptr,
    slope: tl.float64,
    images,
    channels,
    height,
    width,
    out_channels,
    out_height,
    out_width,
    pad_height,
    pad_width,
    PROLOGUE: tl.constexpr,
    SCALED: tl.constexpr,
    ACT: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dx: (N, H, W, C); with a prologue, gradients of its z and, a partial each tile, of its parameters.

    A program's pixels have one remainder by the strides, so that the same taps reach all of them.
    """
    high, wide_ = tl.cdiv(height, STRIDE_HEIGHT), tl.cdiv(width, STRIDE_WIDTH)
    rows = images * high * wide_
    tiles, columns_of_tiles = tl.cdiv(rows, ROWS), tl.cdiv(channels, COLUMNS)
    of_one = tiles * columns_of_tiles
    remainder = tl.program_id(0) // of_one
    tile, tile_column = _place(tl.program_id(0) % of_one, tiles, columns_of_tiles, GROUP)
    row = tile * ROWS + tl.arange(0, ROWS)
    image = (row // (high * wide_)).to(tl.int64)
    y = ((row // wide_) % high) * STRIDE_HEIGHT + remainder // STRIDE_WIDTH
    x = (row % wide_) * STRIDE_WIDTH + remainder % STRIDE_WIDTH
    there = (row < rows) & (y < height) & (x < width)
    column = tile_column.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    first_down = (remainder // STRIDE_WIDTH + pad_height) % STRIDE_HEIGHT
    first_right = (remainder % STRIDE_WIDTH + pad_width) % STRIDE_WIDTH
    taps_down = tl.cdiv(KERNEL_HEIGHT - first_down, STRIDE_HEIGHT)
    taps_right = tl.cdiv(KERNEL_WIDTH - first_right, STRIDE_WIDTH)
    bottom = (y + pad_height - first_down) // STRIDE_HEIGHT
    rightmost = (x + pad_width - first_right) // STRIDE_WIDTH
    corner = ((image * out_height + bottom) * out_width + rightmost) * out_channels
    blocks = tl.cdiv(out_channels, DEPTH)
    acc = tl.zeros([ROWS, COLUMNS], tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for step in range(0, taps_down * taps_right * blocks):
        tap = step // blocks
        down, right = tap // taps_right, tap % taps_right
        out_channel = (step % blocks) * DEPTH + tl.arange(0, DEPTH).to(tl.int64)
        known = out_channel < out_channels
        out_y, out_x = bottom - down, rightmost - right
        reached = there & (out_y >= 0) & (out_y < out_height) & (out_x >= 0) & (out_x < out_width)
        inside = reached[:, None] & known[None, :]
        offsets = corner[:, None] - (down * out_width + right) * out_channels + out_channel[None, :]
        a = tl.load(grad_ptr + offsets, mask=inside, other=0.0)
        a = _masked(a, y_ptr, offsets, inside, slope, ACT)
        tap_down, tap_right = first_down + down * STRIDE_HEIGHT, first_right + right * STRIDE_WIDTH
        row_of_weight = out_channel * (KERNEL_HEIGHT * KERNEL_WIDTH) + tap_down * KERNEL_WIDTH + tap_right
        b = tl.load(
            weight_ptr + row_of_weight[:, None] * channels + column[None, :],
            mask=known[:, None] & (column < channels)[None, :],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    inside = there[:, None] & (column < channels)[None, :]
    offsets = ((image * height + y) * width + x)[:, None] * channels + column[None, :]
    if added_ptr is not None:
        acc += wide(tl.load(added_ptr + offsets, mask=inside, other=0.0))
    if scale_ptr is not None:
        within = column < channels
        value = tl.load(x_ptr + offsets, mask=inside, other=0.0)
        centred, z = _normed(value, within, column, center_ptr, scale_ptr, shift_ptr)
        acc = act_backward(acc, z, prologue_slope, PROLOGUE, value.dtype == tl.float32)
        out_ptr = partial_ptr + (remainder * tiles + tile).to(tl.int64) * channels + column
        step = (tiles * STRIDE_HEIGHT * STRIDE_WIDTH).to(tl.int64) * channels
        tl.store(out_ptr, tl.sum(tl.where(inside, acc, 0.0), 0), mask=within)
        tl.store(out_ptr + step, tl.sum(tl.where(inside, acc * centred, 0.0), 0), mask=within)
        if SCALED:
            acc *= tl.load(scale_ptr + column, mask=within, other=0.0)[None, :]
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient_kernel(
    grad_ptr,
    y_ptr,
    x_ptr,
    center_ptr,
    scale_ptr,
    shift_ptr,
    prologue_slope: tl.float64,
    partial_ptr,
    bias_partial_ptr,
    slope: tl.float64,
    rows,
    channels,
    height,
    width,
    out_channels,
    out_height,
    out_width,
    pad_height,
    pad_width,
    rows_a_split,
    PROLOGUE: tl.constexpr,
    ACT: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """partial: (splits, O, kH * kW * C), of the pixels of a split; bias_partial: (splits, O).

    A tile of ROWS output channels x COLUMNS input channels of a tap sums over DEPTH pixels at a time.
    """
    length = KERNEL_HEIGHT * KERNEL_WIDTH * channels
    blocks = tl.cdiv(length if FLAT else channels, COLUMNS)
    tiles = blocks if FLAT else blocks * KERNEL_HEIGHT * KERNEL_WIDTH
    tile = tl.program_id(0) % tiles
    out_channel = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    of_weight = out_channel < out_channels
    if FLAT:
        along = tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        known = along < length
        channel = along % channels
        tap = ((along // channels) % (KERNEL_HEIGHT * KERNEL_WIDTH)).to(tl.int32)[None, :]
    else:
        tap = tile // blocks
        channel = (tile % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        known = channel < channels
        along = tap * channels + channel
    down, right = tap // KERNEL_WIDTH, tap % KERNEL_WIDTH
    split = tl.program_id(1)
    first = split * rows_a_split
    last = tl.minimum(first + rows_a_split, rows)
    dtype = partial_ptr.dtype.element_ty
    acc = tl.zeros([ROWS, COLUMNS], dtype)
    bias = tl.zeros([ROWS], dtype)
    for start in range(first, last, DEPTH):
        row = start + tl.arange(0, DEPTH)
        top = ((row // out_width) % out_height) * STRIDE_HEIGHT - pad_height
        left = (row % out_width) * STRIDE_WIDTH - pad_width
        image = (row // (out_width * out_height)).to(tl.int64)
        corner = ((image * height + top) * width + left) * channels
        y, x = top[:, None] + down, left[:, None] + right
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (row < last)[:, None] & known[None, :]
        offsets = corner[:, None] + (down * width + right) * channels + channel[None, :]
        b = tl.load(x_ptr + offsets, mask=inside, other=0.0)
        b = _prologue(b, inside, known, channel, center_ptr, scale_ptr, shift_ptr, prologue_slope, PROLOGUE)
        inside = (row < last)[:, None] & of_weight[None, :]
        offsets = row.to(tl.int64)[:, None] * out_channels + out_channel[None, :]
        a = tl.load(grad_ptr + offsets, mask=inside, other=0.0)
        a = _masked(a, y_ptr, offsets, inside, slope, ACT)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        if bias_partial_ptr is not None:
            bias += tl.sum(wide(a), 0)
    place = split.to(tl.int64) * out_channels + out_channel
    tl.store(
        partial_ptr + place[:, None] * length + along[None, :],
        acc,
        mask=of_weight[:, None] & known[None, :],
    )
    if bias_partial_ptr is not None:
        tl.store(bias_partial_ptr + place, bias, mask=of_weight & (tile == 0))


def _device(x: Tensor) -> Any:
    return torch.accelerator.device_index(x.device.index)


def _last(x: Any) -> Any:
    """x with channels innermost in memory."""
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def _precision(x: Tensor) -> str:
    """float32 is multiplied as it is, unless torch allows its own convolutions less."""
    allowed: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if x.is_cuda and allowed.fp32_precision == "tf32" else "ieee"


def _stages(config: ConvConfig) -> int:
    """On AMD a stage more would pass its 64 KB of shared memory."""
    return min(config.num_stages, 2) if torch.version.hip else config.num_stages


def _tile(config: ConvConfig, grouped: bool = True) -> dict[str, Any]:
    launch = {"ROWS": config.rows, "COLUMNS": config.columns, "DEPTH": config.depth}
    launch |= {"num_warps": config.num_warps, "num_stages": _stages(config)}
    return launch | ({"GROUP": 8} if grouped else {})


def _shape(
    x_size: Any, y_size: Any, kernel: Any, stride: list[int], padding: list[int]
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Lengths and constants that all kernels share."""
    lengths = (*x_size[1:], *y_size[1:], *padding)
    names = ("KERNEL_HEIGHT", "KERNEL_WIDTH", "STRIDE_HEIGHT", "STRIDE_WIDTH")
    return lengths, dict(zip(names, (*kernel, *stride), strict=True))


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
    """y, and the statistics of its tiles: (3, tiles, O), or (0,)."""
    x, size = _last(x), convolved_size(x.shape, weight.shape, stride, padding)
    channels, out_channels = x.shape[1], weight.shape[0]
    rows = size[0] * size[2] * size[3]
    config = conv_config(rows, out_channels, channels, x.element_size())
    wide_type, kernel = compute_dtype(x), weight.shape[2:]
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tiles = triton.cdiv(rows, config.rows)
    partial = x.new_empty((3, tiles, out_channels) if with_statistics else (0,), dtype=wide_type)
    steps = config.steps(channels, kernel[0] * kernel[1])
    beside = triton.cdiv(out_channels, config.columns)
    splits, steps_a_split = conv_splits(tiles * beside, steps)
    work = x.new_empty((splits, rows, out_channels), dtype=wide_type) if splits > 1 else None
    lengths, constants = _shape(x.shape, size, kernel, stride, padding)
    after = (bias, _last(residual), y, partial if with_statistics else None)
    with _device(x):
        forward_kernel[(tiles * beside, splits)](
            x,
            weight.permute(0, 2, 3, 1).contiguous(),
            center,
            scale,
            shift,
            prologue_slope,
            *(after if work is None else (None, None, y, None)),
            work,
            slope,
            rows,
            *lengths,
            steps_a_split,
            PROLOGUE=prologue,
            ACT=act,
            FLAT=config.flat(channels),
            PRECISION=_precision(x),
            **constants,
            **_tile(config),
        )
        if work is not None:
            finish_kernel[(tiles, triton.cdiv(out_channels, 32))](
                work,
                *after,
                slope,
                rows,
                out_channels,
                splits,
                ACT=act,
                ROWS=config.rows,
                COLUMNS=32,
                num_warps=4,
            )
    return y, partial


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
    """dx, and of a prologue's z the sums of dz and of dz * (x - center), or (0,)."""
    grad = _last(grad)
    channels, out_channels, kernel = size[1], weight.shape[0], weight.shape[2:]
    remainders = stride[0] * stride[1]
    rows = size[0] * triton.cdiv(size[2], stride[0]) * triton.cdiv(size[3], stride[1])
    config = conv_config(rows, channels, out_channels, grad.element_size(), CONV_INPUT_WIDEST)
    dx = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    tiles, beside = triton.cdiv(rows, config.rows), triton.cdiv(channels, config.columns)
    given = scale is not None
    partial = grad.new_empty(
        (2, remainders * tiles, channels) if given else (2, 0), dtype=compute_dtype(grad)
    )
    lengths, constants = _shape(size, grad.shape, kernel, stride, padding)
    with _device(grad):
        input_gradient_kernel[(remainders * tiles * beside,)](
            grad,
            _last(y),
            weight.permute(0, 2, 3, 1).contiguous(),
            _last(added),
            _last(x),
            center,
            scale,
            shift,
            prologue_slope,
            dx,
            partial if given else None,
            slope,
            size[0],
            *lengths,
            PROLOGUE=prologue,
            SCALED=scaled,
            ACT=act,
            PRECISION=_precision(grad),
            **constants,
            **_tile(config),
        )
    sums = partial.sum(1) if given else partial
    return dx, sums[0].clone(), sums[1].clone()


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
    """dweight: (O, C, kH, kW), and dbias: (O,) or (0,)."""
    grad, x = _last(grad), _last(x)
    channels, out_channels, taps = x.shape[1], grad.shape[1], kernel[0] * kernel[1]
    rows = grad.shape[0] * grad.shape[2] * grad.shape[3]
    config = weight_gradient_config(channels, x.element_size())
    flat = config.flat(channels)
    along = taps * channels
    columns = triton.cdiv(along, config.columns) if flat else taps * triton.cdiv(channels, config.columns)
    tiles = triton.cdiv(out_channels, config.rows) * columns
    splits, steps_a_split = conv_splits(tiles, triton.cdiv(rows, config.depth))
    dtype = compute_dtype(x)
    partial = x.new_empty((splits, out_channels, along), dtype=dtype)
    of_bias = x.new_empty((splits, out_channels) if with_bias else (1, 0), dtype=dtype)
    lengths, constants = _shape(x.shape, grad.shape, kernel, stride, padding)
    with _device(x):
        weight_gradient_kernel[(tiles, splits)](
            grad,
            _last(y),
            x,
            center,
            scale,
            shift,
            prologue_slope,
            partial,
            of_bias if with_bias else None,
            slope,
            rows,
            *lengths,
            steps_a_split * config.depth,
            PROLOGUE=prologue,
            ACT=act,
            FLAT=flat,
            PRECISION=_precision(x),
            **constants,
            **_tile(config, grouped=False),
        )
    of_weight = partial.sum(0).to(x.dtype).view(out_channels, *kernel, channels)
    return of_weight.permute(0, 3, 1, 2), of_bias.sum(0)
