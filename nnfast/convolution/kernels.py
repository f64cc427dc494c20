"""Convolution in Triton: implicit matrix products, with what stands before and after in the same pass.

x: (N, H, W, C), weight: (O, kH, kW, C), y: (N, OH, OW, O) in memory. A program makes a tile of pixels x
channels; it goes along taps and channels, a block of channels of one tap at a time, or, where channels are
few, along both as one. Products are summed in float32, float64 in float64.

A tile's pixels follow each other in memory, and are loaded by pointers; or, where `pointers_why` names no
reason, they are a box of images x rows x columns, which the copy engine of sm_90 and sm_100 loads: what lies
outside of the image comes as zeros, so that it pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation.kernels import act, act_backward
from ..core.operator import compute_dtype, convolved_size
from ..core.triton import TensorDescriptor, architecture, tl, triton, wide
from ..core.tuning import (
    CONV_INPUT_WIDEST,
    ConvConfig,
    conv_box,
    conv_config,
    conv_splits,
    weight_gradient_config,
)


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
def _pixels(
    tile, images, height, width, ROWS: tl.constexpr, BOX_HEIGHT: tl.constexpr, BOX_WIDTH: tl.constexpr
):
    """Image, y and x of a tile's pixels, which there are and how many, and those of the first of a box.

    Pixels follow each other in memory where no box is given, else a box has as many images as fit.
    """
    place = tl.arange(0, ROWS)
    if BOX_HEIGHT == 0:
        first_image, first_y, first_x = tile * 0, tile * 0, tile * 0
        row = tile * ROWS + place
        image, y, x = row // (height * width), (row // width) % height, row % width
        there, count = row < images * height * width, tl.minimum(images * height * width - tile * ROWS, ROWS)
    else:
        down, across = tl.cdiv(height, BOX_HEIGHT), tl.cdiv(width, BOX_WIDTH)
        first_image = tile // (down * across) * (ROWS // (BOX_HEIGHT * BOX_WIDTH))
        first_y, first_x = (tile // across) % down * BOX_HEIGHT, tile % across * BOX_WIDTH
        image = first_image + place // (BOX_HEIGHT * BOX_WIDTH)
        y, x = first_y + (place // BOX_WIDTH) % BOX_HEIGHT, first_x + place % BOX_WIDTH
        there = (image < images) & (y < height) & (x < width)
        count = tl.minimum(images - first_image, ROWS // (BOX_HEIGHT * BOX_WIDTH))
        count *= tl.minimum(height - first_y, BOX_HEIGHT) * tl.minimum(width - first_x, BOX_WIDTH)
    return image.to(tl.int64), y, x, there, count, first_image, first_y, first_x


@triton.jit
def _pixel(tile, image, y, x, height, width, ROWS: tl.constexpr, BOX_HEIGHT: tl.constexpr):
    """Places of a tile's pixels in memory."""
    if BOX_HEIGHT == 0:
        pixel = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
    else:
        pixel = (image * height + y) * width + x
    return pixel


@triton.jit
def _box(x_ptr, image, y, x, channel, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pixels x channels of a box from a place on; zero outside of the images."""
    return x_ptr.load([image, y, x, channel]).reshape([ROWS, COLUMNS])


@triton.jit
def _masked(grad, y, slope, ACT: tl.constexpr):
    """grad * act'(z) where y has the sign of z."""
    return act_backward(wide(grad), wide(y), slope, ACT, False).to(grad.dtype)


@triton.jit
def _put_aside(acc, work_ptr, pixel, there, pixels, columns, column):
    """The sums of this program's split."""
    tl.store(
        work_ptr
        + (tl.program_id(1) * tl.cast(pixels, tl.int64) + pixel)[:, None] * columns
        + column[None, :],
        acc,
        mask=there[:, None] & (column < columns)[None, :],
    )


@triton.jit
def _summed(work_ptr, rows, columns, splits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The splits' sums, in order, of a program's tile; its rows and columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    offsets, inside = row[:, None] * columns + column[None, :], (row < rows)[:, None] & (column < columns)
    size = tl.cast(rows, tl.int64) * columns
    acc = tl.zeros([ROWS, COLUMNS], work_ptr.dtype.element_ty)
    for split in range(splits):
        acc += tl.load(work_ptr + offsets + split * size, mask=inside, other=0.0)
    return acc, row, column


@triton.jit
def _epilogue(
    acc,
    pixel,
    there,
    count,
    columns,
    column,
    bias_ptr,
    residual_ptr,
    y_ptr,
    partial_ptr,
    tile,
    partials,
    slope,
    ACT: tl.constexpr,
):
    """y = act(acc + bias + residual), and of y, as it is stored, count, mean and squared deviations."""
    within = column < columns
    inside = there[:, None] & within[None, :]
    offsets = pixel[:, None] * columns + column[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=within, other=0.0)[None, :]
    if residual_ptr is not None:
        acc += wide(tl.load(residual_ptr + offsets, mask=inside, other=0.0))
    dtype = y_ptr.dtype.element_ty
    y = act(acc, slope, ACT, dtype == tl.float32).to(dtype)
    tl.store(y_ptr + offsets, y, mask=inside)
    if partial_ptr is not None:
        values = tl.where(inside, wide(y), 0.0)
        mean = tl.sum(values, 0) / count.to(acc.dtype)
        apart = tl.where(inside, values - mean[None, :], 0.0)
        out_ptr = partial_ptr + tile.to(tl.int64) * columns + column
        step = tl.cast(partials, tl.int64) * columns
        tl.store(out_ptr, mean * 0.0 + count, mask=within)
        tl.store(out_ptr + step, mean, mask=within)
        tl.store(out_ptr + 2 * step, tl.sum(apart * apart, 0), mask=within)


@triton.jit
def _input_epilogue(
    acc,
    pixel,
    there,
    columns,
    column,
    added_ptr,
    x_ptr,
    center_ptr,
    scale_ptr,
    shift_ptr,
    slope,
    dx_ptr,
    partial_ptr,
    tile,
    partials,
    PROLOGUE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """dx = acc + added; with a prologue that of its z, and a tile's sums for its parameters."""
    within = column < columns
    inside = there[:, None] & within[None, :]
    offsets = pixel[:, None] * columns + column[None, :]
    if added_ptr is not None:
        acc += wide(tl.load(added_ptr + offsets, mask=inside, other=0.0))
    if scale_ptr is not None:
        value = tl.load(x_ptr + offsets, mask=inside, other=0.0)
        centred, z = _normed(value, within, column, center_ptr, scale_ptr, shift_ptr)
        acc = act_backward(acc, z, slope, PROLOGUE, value.dtype == tl.float32)
        out_ptr = partial_ptr + tile.to(tl.int64) * columns + column
        step = tl.cast(partials, tl.int64) * columns
        tl.store(out_ptr, tl.sum(tl.where(inside, acc, 0.0), 0), mask=within)
        tl.store(out_ptr + step, tl.sum(tl.where(inside, acc * centred, 0.0), 0), mask=within)
        if SCALED:
            acc *= tl.load(scale_ptr + column, mask=within, other=0.0)[None, :]
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=inside)


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
    images,
    channels,
    height,
    width,
    out_channels,
    out_height,
    out_width,
    pad_height,
    pad_width,
    tiles,
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
    BOX_HEIGHT: tl.constexpr,
    BOX_WIDTH: tl.constexpr,
):
    """y: (N, OH, OW, O); or, of one split of the sums, work: (splits, N * OH * OW, O).

    With boxes x and weight are descriptors, weight of (O, taps * C), C in whole steps, and strides are 1.
    """
    tile, tile_column = _place(tl.program_id(0), tiles, tl.cdiv(out_channels, COLUMNS), GROUP)
    image, out_y, out_x, there, count, first_image, first_y, first_x = _pixels(
        tile, images, out_height, out_width, ROWS, BOX_HEIGHT, BOX_WIDTH
    )
    top, left = out_y * STRIDE_HEIGHT - pad_height, out_x * STRIDE_WIDTH - pad_width
    corner = ((image * height + top) * width + left) * channels
    column = tile_column.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    length = KERNEL_HEIGHT * KERNEL_WIDTH * channels
    blocks = tl.cdiv(length if FLAT else channels, DEPTH)
    first = tl.program_id(1) * steps_a_split
    last = tl.minimum(first + steps_a_split, blocks if FLAT else blocks * KERNEL_HEIGHT * KERNEL_WIDTH)
    # a box that is the left factor would go through registers, as it does after a prologue; weights need not
    SWAP: tl.constexpr = BOX_HEIGHT != 0 and scale_ptr is None
    shape: tl.constexpr = [COLUMNS, ROWS] if SWAP else [ROWS, COLUMNS]
    acc = tl.zeros(shape, tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32)
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
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & there[:, None] & known[None, :]
        if BOX_HEIGHT == 0:
            offsets = corner[:, None] + (down * width + right) * channels + channel[None, :]
            a = tl.load(x_ptr + offsets, mask=inside, other=0.0)
            b = tl.load(
                weight_ptr + column[None, :] * length + along[:, None],
                mask=known[:, None] & (column < out_channels)[None, :],
                other=0.0,
            )
        else:
            place = (step % blocks) * DEPTH
            y_box, x_box = first_y - pad_height + down, first_x - pad_width + right
            a = _box(x_ptr, first_image, y_box, x_box, place, ROWS, DEPTH)
            b = weight_ptr.load([tile_column * COLUMNS, step * DEPTH])
            a, b = (b, a.T) if SWAP else (a, b.T)
        a = _prologue(a, inside, known, channel, center_ptr, scale_ptr, shift_ptr, prologue_slope, PROLOGUE)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    if SWAP:
        acc = acc.T
    pixel = _pixel(tile, image, out_y, out_x, out_height, out_width, ROWS, BOX_HEIGHT)
    if work_ptr is not None:
        _put_aside(acc, work_ptr, pixel, there, images * out_height * out_width, out_channels, column)
    else:
        _epilogue(
            acc, pixel, there, count, out_channels, column, bias_ptr, residual_ptr, y_ptr, partial_ptr, tile,
            tiles, slope, ACT,
        )  # fmt: skip


@triton.jit
def finish_kernel(
    work_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    partial_ptr,
    slope: tl.float64,
    rows,
    columns,
    splits,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The splits' sums in order, and the epilogue."""
    tile = tl.program_id(0)
    acc, row, column = _summed(work_ptr, rows, columns, splits, ROWS, COLUMNS)
    _epilogue(
        acc, row, row < rows, tl.minimum(rows - tile * ROWS, ROWS), columns, column, bias_ptr, residual_ptr,
        y_ptr, partial_ptr, tile, tl.cdiv(rows, ROWS), slope, ACT,
    )  # fmt: skip


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
    work_ptr,
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
    tiles,
    steps_a_split,
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
    BOX_HEIGHT: tl.constexpr,
    BOX_WIDTH: tl.constexpr,
):
    """dx: (N, H, W, C); with a prologue, gradients of its z and, a partial each tile, of its parameters.

    Or, of one split of the sums, work: (splits, N * H * W, C). A program's pixels have one remainder by the
    strides, so that the same taps reach all of them. With boxes grad, y and weight are descriptors,
    weight of (O, taps * C), and strides 1.
    """
    high, wide_ = tl.cdiv(height, STRIDE_HEIGHT), tl.cdiv(width, STRIDE_WIDTH)
    columns_of_tiles = tl.cdiv(channels, COLUMNS)
    of_one = tiles * columns_of_tiles
    remainder = tl.program_id(0) // of_one
    tile, tile_column = _place(tl.program_id(0) % of_one, tiles, columns_of_tiles, GROUP)
    image, y, x, there, _, first_image, first_y, first_x = _pixels(
        tile, images, high, wide_, ROWS, BOX_HEIGHT, BOX_WIDTH
    )
    if STRIDE_HEIGHT * STRIDE_WIDTH > 1:
        y, x = y * STRIDE_HEIGHT + remainder // STRIDE_WIDTH, x * STRIDE_WIDTH + remainder % STRIDE_WIDTH
        there = there & (y < height) & (x < width)
    column = tile_column.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    first_down = (remainder // STRIDE_WIDTH + pad_height) % STRIDE_HEIGHT
    first_right = (remainder % STRIDE_WIDTH + pad_width) % STRIDE_WIDTH
    taps_down = tl.cdiv(KERNEL_HEIGHT - first_down, STRIDE_HEIGHT)
    taps_right = tl.cdiv(KERNEL_WIDTH - first_right, STRIDE_WIDTH)
    bottom = (y + pad_height - first_down) // STRIDE_HEIGHT
    rightmost = (x + pad_width - first_right) // STRIDE_WIDTH
    corner = ((image * out_height + bottom) * out_width + rightmost) * out_channels
    blocks = tl.cdiv(out_channels, DEPTH)
    first, last = 0, taps_down * taps_right * blocks
    if work_ptr is not None:
        first = tl.program_id(1) * steps_a_split
        last = tl.minimum(first + steps_a_split, last)
    SWAP: tl.constexpr = BOX_HEIGHT != 0 and ACT == 0
    shape: tl.constexpr = [COLUMNS, ROWS] if SWAP else [ROWS, COLUMNS]
    acc = tl.zeros(shape, tl.float64 if dx_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for step in range(first, last):
        tap = step // blocks
        down, right = tap // taps_right, tap % taps_right
        tap_down, tap_right = first_down + down * STRIDE_HEIGHT, first_right + right * STRIDE_WIDTH
        if BOX_HEIGHT == 0:
            out_channel = (step % blocks) * DEPTH + tl.arange(0, DEPTH).to(tl.int64)
            known = out_channel < out_channels
            out_y, out_x = bottom - down, rightmost - right
            reached = there & (out_y >= 0) & (out_y < out_height) & (out_x >= 0) & (out_x < out_width)
            inside = reached[:, None] & known[None, :]
            offsets = corner[:, None] - (down * out_width + right) * out_channels + out_channel[None, :]
            a = tl.load(grad_ptr + offsets, mask=inside, other=0.0)
            if ACT != 0:
                a = _masked(a, tl.load(y_ptr + offsets, mask=inside, other=0.0), slope, ACT)
            row_of_weight = out_channel * (KERNEL_HEIGHT * KERNEL_WIDTH) + tap_down * KERNEL_WIDTH + tap_right
            b = tl.load(
                weight_ptr + row_of_weight[:, None] * channels + column[None, :],
                mask=known[:, None] & (column < channels)[None, :],
                other=0.0,
            )
        else:
            place = (step % blocks) * DEPTH
            y_box, x_box = first_y + pad_height - down, first_x + pad_width - right
            a = _box(grad_ptr, first_image, y_box, x_box, place, ROWS, DEPTH)
            if ACT != 0:
                a = _masked(a, _box(y_ptr, first_image, y_box, x_box, place, ROWS, DEPTH), slope, ACT)
            along = (tap_down * KERNEL_WIDTH + tap_right) * channels + tile_column * COLUMNS
            b = weight_ptr.load([place, along])
            if SWAP:
                a, b = b.T, a.T
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    if SWAP:
        acc = acc.T
    in_line: tl.constexpr = BOX_HEIGHT if STRIDE_HEIGHT * STRIDE_WIDTH == 1 else 1
    pixel = _pixel(tile, image, y, x, height, width, ROWS, in_line)
    if work_ptr is not None:
        _put_aside(acc, work_ptr, pixel, there, images * height * width, channels, column)
    else:
        _input_epilogue(
            acc, pixel, there, channels, column, added_ptr, x_ptr, center_ptr, scale_ptr, shift_ptr,
            prologue_slope, dx_ptr, partial_ptr, remainder * tiles + tile,
            tiles * STRIDE_HEIGHT * STRIDE_WIDTH, PROLOGUE, SCALED,
        )  # fmt: skip


@triton.jit
def finish_input_gradient_kernel(
    work_ptr,
    added_ptr,
    x_ptr,
    center_ptr,
    scale_ptr,
    shift_ptr,
    slope: tl.float64,
    dx_ptr,
    partial_ptr,
    rows,
    columns,
    splits,
    PROLOGUE: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The splits' sums in order, and what comes after them."""
    tile = tl.program_id(0)
    acc, row, column = _summed(work_ptr, rows, columns, splits, ROWS, COLUMNS)
    _input_epilogue(
        acc, row, row < rows, columns, column, added_ptr, x_ptr, center_ptr, scale_ptr, shift_ptr, slope,
        dx_ptr, partial_ptr, tile, tl.cdiv(rows, ROWS), PROLOGUE, SCALED,
    )  # fmt: skip


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
    images,
    channels,
    height,
    width,
    out_channels,
    out_height,
    out_width,
    pad_height,
    pad_width,
    steps,
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
    BOX_HEIGHT: tl.constexpr,
    BOX_WIDTH: tl.constexpr,
    EDGE: tl.constexpr,
):
    """partial: (splits, O, kH * kW * C), of the pixels of a split; bias_partial: (splits, O).

    A tile of ROWS output channels x COLUMNS input channels of a tap sums over DEPTH pixels at a time. With
    boxes grad, y and x are descriptors, and strides 1; EDGE: some boxes reach over the image.
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
    first = split * steps_a_split
    last = tl.minimum(first + steps_a_split, steps)
    dtype = partial_ptr.dtype.element_ty
    acc = tl.zeros([ROWS, COLUMNS], dtype)
    bias = tl.zeros([ROWS], dtype)
    for step in range(first, last):
        image, out_y, out_x, there, _, first_image, first_y, first_x = _pixels(
            step, images, out_height, out_width, DEPTH, BOX_HEIGHT, BOX_WIDTH
        )
        top, left = out_y * STRIDE_HEIGHT - pad_height, out_x * STRIDE_WIDTH - pad_width
        y, x = top[:, None] + down, left[:, None] + right
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & there[:, None] & known[None, :]
        if BOX_HEIGHT == 0:
            corner = ((image * height + top) * width + left) * channels
            offsets = corner[:, None] + (down * width + right) * channels + channel[None, :]
            b = tl.load(x_ptr + offsets, mask=inside, other=0.0)
            pixel = _pixel(step, image, out_y, out_x, out_height, out_width, DEPTH, BOX_HEIGHT)
            offsets = pixel[:, None] * out_channels + out_channel[None, :]
            of_grad = there[:, None] & of_weight[None, :]
            a = tl.load(grad_ptr + offsets, mask=of_grad, other=0.0)
            if ACT != 0:
                a = _masked(a, tl.load(y_ptr + offsets, mask=of_grad, other=0.0), slope, ACT)
        else:
            y_box, x_box = first_y - pad_height + down, first_x - pad_width + right
            b = _box(x_ptr, first_image, y_box, x_box, (tile % blocks) * COLUMNS, DEPTH, COLUMNS)
            if EDGE and scale_ptr is None:  # pixels of x beside which there is no gradient may be infinite
                b = tl.where(there[:, None], b, 0.0)
            place = tl.program_id(0) // tiles * ROWS
            a = _box(grad_ptr, first_image, first_y, first_x, place, DEPTH, ROWS)
            if ACT != 0:
                a = _masked(a, _box(y_ptr, first_image, first_y, first_x, place, DEPTH, ROWS), slope, ACT)
        b = _prologue(b, inside, known, channel, center_ptr, scale_ptr, shift_ptr, prologue_slope, PROLOGUE)
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


def _tile(config: ConvConfig) -> dict[str, Any]:
    launch = {"ROWS": config.rows, "COLUMNS": config.columns, "DEPTH": config.depth}
    return launch | {"num_warps": config.num_warps, "num_stages": _stages(config)}


GROUP = 8
"""Rows of tiles that share weights."""


class _Shape(NamedTuple):
    """Sizes (N, C, H, W) as the kernels see them: of 1x1 all pixels are one row of one image."""

    x: Sequence[int]
    y: Sequence[int]
    lengths: tuple[int, ...]
    constants: dict[str, int]


def _shape(x: Sequence[int], y: Sequence[int], kernel: Any, stride: Any, padding: Any) -> _Shape:
    if tuple(kernel) == tuple(stride) == (1, 1) and tuple(padding) == (0, 0):
        x, y = ((1, size[1], 1, size[0] * size[2] * size[3]) for size in (x, y))
    names = ("KERNEL_HEIGHT", "KERNEL_WIDTH", "STRIDE_HEIGHT", "STRIDE_WIDTH")
    constants = dict(zip(names, (*kernel, *stride), strict=True))
    return _Shape(x, y, (*x[1:], *y[1:], *padding), constants)


def pointers_why(stride: Sequence[int], few: bool, *tensors: Tensor) -> list[str]:
    """Why tiles of images (N, C, H, W) are loaded by pointers, not by the copy engine."""
    arch = architecture(tensors[0].device)
    reasons = [f"{arch} has no copy engine"] * (arch not in ("sm_90", "sm_100"))
    reasons += ["few channels, which go through steps of 32, or of several taps"] * few
    if tuple(stride) != (1, 1):
        reasons.append(f"stride is {tuple(stride)}; pixels of a box are neighbours")
    for x in tensors:
        if x.element_size() != 2:
            reasons.append(f"{x.dtype}; tensor cores take half types as the engine lays them down")
        elif x.shape[1] % 8:
            reasons.append(f"{x.shape[1]} channels; the engine takes 16 bytes and multiples")
        if x.storage_offset() * x.element_size() % 16:
            reasons.append(f"an image begins at element {x.storage_offset()}; the engine's at 16 bytes")
    return reasons


def _described(x: Tensor | None, size: Sequence[int], box: Sequence[int], pixels: int, channels: int) -> Any:
    """A descriptor of boxes of pixels x channels of an image."""
    if x is None:
        return None
    n, c, h, w = size
    last = x.permute(0, 2, 3, 1).reshape(n, h, w, c)
    if last.data_ptr() % 16:
        last = last.clone()
    block = [pixels // (box[0] * box[1]), *box, channels]
    return TensorDescriptor(last, [n, h, w, c], [h * w * c, w * c, c, 1], block)


def _described_weight(weight: Tensor, rows: int, columns: int, whole: int = 1) -> Any:
    """A descriptor of rows x columns of a weight: (O, kH, kW, C), C filled up to a multiple of `whole`."""
    if short := -weight.shape[-1] % whole:
        weight = F.pad(weight, (0, short))
    matrix = weight.flatten(1)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _weight(weight: Tensor) -> Tensor:
    """(O, kH, kW, C)."""
    return weight.permute(0, 2, 3, 1).contiguous()


class _Plan(NamedTuple):
    """How a result of pixels x channels is tiled; box: (0, 0) for pixels that follow each other."""

    config: ConvConfig
    box: tuple[int, int]
    tiles: int
    beside: int
    splits: int
    steps_a_split: int
    rows: int

    @property
    def parts(self) -> int:
        """Tiles of which statistics are written down."""
        return self.tiles if self.splits == 1 else -(-self.rows // self.config.rows)

    @property
    def tile(self) -> dict[str, Any]:
        """Constants."""
        return _tile(self.config) | {"GROUP": GROUP, "BOX_HEIGHT": self.box[0], "BOX_WIDTH": self.box[1]}

    @property
    def finish(self) -> dict[str, int]:
        """Constants of the kernel that sums what is split."""
        return {"ROWS": self.config.rows, "COLUMNS": 32, "num_warps": 4}


def _box_of(rows: int, size: Sequence[int], why: list[str]) -> tuple[tuple[int, int], int]:
    """Box and tiles of images (N, C, H, W)."""
    pixels = size[0] * size[2] * size[3]
    in_line = triton.cdiv(pixels, rows)
    box, tiles = conv_box(rows, size[0], size[2], size[3])
    return ((0, 0), in_line) if why or 4 * tiles > 5 * in_line else (box, tiles)


def plan(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> _Plan:
    """Of the convolution of x, with channels innermost."""
    channels, out_channels, *kernel = x.shape[1], weight.shape[0], *weight.shape[2:]
    size = convolved_size(x.shape, weight.shape, stride, padding)
    shape = _shape(x.shape, size, kernel, stride, padding)
    rows = size[0] * size[2] * size[3]
    config = conv_config(rows, out_channels, channels, x.element_size())
    box, tiles = _box_of(config.rows, shape.y, pointers_why(stride, config.depth < 64, x))
    beside = triton.cdiv(out_channels, config.columns)
    split = conv_splits(tiles * beside, config.steps(channels, kernel[0] * kernel[1]))
    return _Plan(config, box, tiles, beside, *split, rows)


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
    channels, out_channels, kernel = x.shape[1], weight.shape[0], weight.shape[2:]
    chosen, shape = plan(x, weight, stride, padding), _shape(x.shape, size, kernel, stride, padding)
    config, wide_type = chosen.config, compute_dtype(x)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    partial = x.new_empty((3, chosen.parts, out_channels) if with_statistics else (0,), dtype=wide_type)
    work = None
    if chosen.splits > 1:
        work = x.new_empty((chosen.splits, chosen.rows, out_channels), dtype=wide_type)
    after = (bias, _last(residual), y, partial if with_statistics else None)
    image, matrix = x, _weight(weight)
    if chosen.box[0]:
        image = _described(x, shape.x, chosen.box, config.rows, config.depth)
        matrix = _described_weight(matrix, config.columns, config.depth, config.depth)
    with _device(x):
        forward_kernel[(chosen.tiles * chosen.beside, chosen.splits)](
            image,
            matrix,
            center,
            scale,
            shift,
            prologue_slope,
            *(after if work is None else (None, None, y, None)),
            work,
            slope,
            shape.x[0],
            *shape.lengths,
            chosen.tiles,
            chosen.steps_a_split,
            PROLOGUE=prologue,
            ACT=act,
            FLAT=config.flat(channels),
            PRECISION=_precision(x),
            **shape.constants,
            **chosen.tile,
        )
        if work is not None:
            finish_kernel[(chosen.parts, triton.cdiv(out_channels, 32))](
                work, *after, slope, chosen.rows, out_channels, chosen.splits, ACT=act, **chosen.finish
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
    grad, y = _last(grad), _last(y)
    channels, out_channels, kernel = size[1], weight.shape[0], weight.shape[2:]
    shape = _shape(size, grad.shape, kernel, stride, padding)
    rows, remainders = size[0] * size[2] * size[3], stride[0] * stride[1]
    of_one = [shape.x[0], 0, triton.cdiv(shape.x[2], stride[0]), triton.cdiv(shape.x[3], stride[1])]
    pixels = of_one[0] * of_one[2] * of_one[3]
    config = conv_config(pixels, channels, out_channels, grad.element_size(), CONV_INPUT_WIDEST)
    dx = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    images = [t for t in (grad, y if act else None, dx) if t is not None]
    box, tiles = _box_of(config.rows, of_one, pointers_why(stride, config.depth < 64, *images))
    beside = triton.cdiv(channels, config.columns)
    taps = triton.cdiv(kernel[0], stride[0]) * triton.cdiv(kernel[1], stride[1])
    split = conv_splits(remainders * tiles * beside, taps * triton.cdiv(out_channels, config.depth))
    chosen = _Plan(config, box, tiles, beside, *split, rows)
    given = scale is not None
    dtype, parts = compute_dtype(grad), chosen.parts if chosen.splits > 1 else remainders * tiles
    partial = grad.new_empty((2, parts, channels) if given else (2, 0), dtype=dtype)
    work = None
    if chosen.splits > 1:
        work = grad.new_empty((chosen.splits, rows, channels), dtype=dtype)
    before = (_last(added), _last(x), center, scale, shift, prologue_slope, dx, partial if given else None)
    of_work = (None, None, None, None, None, prologue_slope, dx, None)
    image, mask, matrix = grad, y, _weight(weight)
    if box[0]:
        image = _described(grad, shape.y, box, config.rows, config.depth)
        mask = _described(y if act else None, shape.y, box, config.rows, config.depth)
        matrix = _described_weight(matrix, config.depth, config.columns)
    with _device(grad):
        input_gradient_kernel[(remainders * tiles * beside, chosen.splits)](
            image,
            mask,
            matrix,
            *(before if work is None else of_work),
            work,
            slope,
            shape.x[0],
            *shape.lengths,
            tiles,
            chosen.steps_a_split,
            PROLOGUE=prologue,
            SCALED=scaled,
            ACT=act,
            PRECISION=_precision(grad),
            **shape.constants,
            **chosen.tile,
        )
        if work is not None:
            finish_input_gradient_kernel[(chosen.parts, triton.cdiv(channels, 32))](
                work,
                *before,
                rows,
                channels,
                chosen.splits,
                PROLOGUE=prologue,
                SCALED=scaled,
                **chosen.finish,
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
    grad, x, y = _last(grad), _last(x), _last(y)
    channels, out_channels, taps = x.shape[1], grad.shape[1], kernel[0] * kernel[1]
    shape = _shape(x.shape, grad.shape, kernel, stride, padding)
    config = weight_gradient_config(channels, x.element_size())
    flat = config.flat(channels)
    along = taps * channels
    columns = triton.cdiv(along, config.columns) if flat else taps * triton.cdiv(channels, config.columns)
    tiles = triton.cdiv(out_channels, config.rows) * columns
    images = [t for t in (grad, y if act else None, x) if t is not None]
    box, steps = _box_of(config.depth, shape.y, pointers_why(stride, flat, *images))
    splits, steps_a_split = conv_splits(tiles, steps)
    dtype = compute_dtype(x)
    partial = x.new_empty((splits, out_channels, along), dtype=dtype)
    of_bias = x.new_empty((splits, out_channels) if with_bias else (1, 0), dtype=dtype)
    places: list[Any] = [grad, y, x]
    if box[0]:
        places = [
            _described(grad, shape.y, box, config.depth, config.rows),
            _described(y if act else None, shape.y, box, config.depth, config.rows),
            _described(x, shape.x, box, config.depth, config.columns),
        ]
    with _device(x):
        weight_gradient_kernel[(tiles, splits)](
            *places,
            center,
            scale,
            shift,
            prologue_slope,
            partial,
            of_bias if with_bias else None,
            slope,
            shape.x[0],
            *shape.lengths,
            steps,
            steps_a_split,
            PROLOGUE=prologue,
            ACT=act,
            FLAT=flat,
            PRECISION=_precision(x),
            BOX_HEIGHT=box[0],
            BOX_WIDTH=box[1],
            EDGE=steps * config.depth != shape.y[0] * shape.y[2] * shape.y[3],
            **shape.constants,
            **_tile(config),
        )
    of_weight = partial.sum(0).to(x.dtype).view(out_channels, *kernel, channels)
    return of_weight.permute(0, 3, 1, 2), of_bias.sum(0)
