"""Focal loss in Triton: softmax over rows, on chip or in a loop, and sigmoid elementwise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.triton import exp, log1p_unit, power, tl, triton, wide
from ..core.tuning import RowsConfig, pointwise_config, rows_config, strided_rows_config


@triton.jit
def _rows_of(pid, rows, classes, ROWS: tl.constexpr, SPATIAL: tl.constexpr):
    """Rows of a program: whether inside, number among all, first element.

    SPATIAL: x is (batch, classes, rows); else (rows, classes), and pid alone numbers the programs.
    """
    blocks = tl.cdiv(rows, ROWS)
    batch = pid // blocks
    row = (pid % blocks) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    number = batch * rows + row
    first = batch * classes * rows + row if SPATIAL else number * classes
    return inside, number, first


@triton.jit
def _step(c, rows, SPATIAL: tl.constexpr):
    """Distance of class c from a row's first element."""
    return c * rows if SPATIAL else c


@triton.jit
def _true_class(target_ptr, number, inside, classes, ignore_index):
    """Whether a row counts, and its class, 0 where it does not. A class out of range stops the device."""
    target = tl.load(target_ptr + number, mask=inside, other=0)
    valid = inside & (target != ignore_index)
    known = (target >= 0) & (target < classes)
    tl.device_assert(known | ~valid, "nnfast::softmax_focal_loss: target out of range")
    return valid, tl.where(valid & known, target, 0)


@triton.jit
def softmax_forward_kernel(
    x_ptr,
    target_ptr,
    alpha_ptr,
    loss_ptr,
    slopes_ptr,
    gamma: tl.float64,
    rows: tl.int64,
    classes: tl.int64,
    all_rows: tl.int64,
    ignore_index: tl.int64,
    SPATIAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):
    """Loss and slopes of ROWS rows of x, each read once, BLOCK classes at a time.

    The true class stays out of the sum, so that 1 - p_t comes without cancellation.
    """
    pid = tl.program_id(0).to(tl.int64)
    inside, number, first = _rows_of(pid, rows, classes, ROWS, SPATIAL)
    valid, target = _true_class(target_ptr, number, inside, classes, ignore_index)
    true = wide(tl.load(x_ptr + first + _step(target, rows, SPATIAL), mask=inside, other=0.0))

    top = tl.full([ROWS], float("-inf"), true.dtype)
    rest = tl.zeros([ROWS], true.dtype)
    anchor = tl.zeros([ROWS], true.dtype)
    for start in range(0, classes if LOOP else 1, BLOCK):
        c = start + tl.arange(0, BLOCK).to(tl.int64)
        x = wide(
            tl.load(
                x_ptr + first[:, None] + _step(c, rows, SPATIAL)[None, :],
                mask=inside[:, None] & (c < classes)[None, :],
                other=float("-inf"),
            )
        )
        before = top
        top = tl.maximum(before, tl.max(x, 1))
        anchor = tl.where(top == float("-inf"), 0.0, top)  # of rows that have begun with -inf alone
        e = tl.where(
            c[None, :] == target[:, None], 0.0, exp(x - anchor[:, None], x_ptr.dtype.element_ty == tl.float32)
        )
        rest = rest * exp(before - anchor, True) + tl.sum(e, 1)

    e_true = exp(true - anchor, True)
    total = rest + e_true
    likely = rest <= e_true
    ce = tl.where(likely, log1p_unit(tl.where(likely, rest / e_true, 0.0)), (top - true) + tl.log(total))
    q, p = rest / total, e_true / total
    k = power(q, gamma)
    if alpha_ptr is not None:
        k *= tl.load(alpha_ptr + target, mask=inside, other=0.0)
    loss = k * ce
    ratio = tl.where(q == 0.0, 1.0, ce / tl.where(q == 0.0, 1.0, q))
    k *= 1.0 + tl.full(q.shape, gamma, q.dtype) * tl.where(p == 0.0, 0.0, p * ratio)
    tl.store(loss_ptr + number, tl.where(valid, loss, 0.0), mask=inside)
    tl.store(slopes_ptr + number, anchor, mask=inside)
    tl.store(slopes_ptr + all_rows + number, tl.where(valid, k / total, 0.0), mask=inside)
    tl.store(slopes_ptr + 2 * all_rows + number, tl.where(valid, -k * q, 0.0), mask=inside)


@triton.jit
def softmax_backward_kernel(
    grad_ptr,
    x_ptr,
    target_ptr,
    slopes_ptr,
    out_ptr,
    grad_step: tl.int64,
    rows: tl.int64,
    classes: tl.int64,
    all_rows: tl.int64,
    ignore_index: tl.int64,
    SPATIAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = grad * exp(x_j - shift) * scale for ROWS rows and BLOCK classes, and the target's own slope."""
    pid = tl.program_id(0).to(tl.int64)
    columns = tl.cdiv(classes, BLOCK)
    inside, number, first = _rows_of(pid // columns, rows, classes, ROWS, SPATIAL)
    valid, target = _true_class(target_ptr, number, inside, classes, ignore_index)
    grad = tl.load(grad_ptr + number * grad_step, mask=inside, other=0.0)
    shift = tl.load(slopes_ptr + number, mask=inside, other=0.0)
    scale = grad * tl.load(slopes_ptr + all_rows + number, mask=inside, other=0.0)
    at_target = grad * tl.load(slopes_ptr + 2 * all_rows + number, mask=inside, other=0.0)

    c = (pid % columns) * BLOCK + tl.arange(0, BLOCK)
    offsets = first[:, None] + _step(c, rows, SPATIAL)[None, :]
    mask = inside[:, None] & (c < classes)[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    slope = exp(wide(x) - shift[:, None], x.dtype == tl.float32) * scale[:, None]
    out = tl.where(c[None, :] == target[:, None], at_target[:, None], slope)
    tl.store(out_ptr + offsets, tl.where(valid[:, None], out, 0.0).to(x.dtype), mask=mask)


@triton.jit
def _sigmoid(x, PRECISE: tl.constexpr):
    """sigmoid(x), sigmoid(-x) and log(1 + e**-|x|), each to full precision."""
    e = exp(-tl.abs(x), PRECISE)
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x >= 0.0, large, small), tl.where(x >= 0.0, small, large), log1p_unit(e)


@triton.jit
def sigmoid_forward_kernel(
    x_ptr, target_ptr, out_ptr, alpha: tl.float64, gamma: tl.float64, size: tl.int64, BLOCK: tl.constexpr
):
    """out = loss of every element; x, target, out: (size,)."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    narrow = tl.load(x_ptr + offsets, mask=mask)
    x, t = wide(narrow), wide(tl.load(target_ptr + offsets, mask=mask))
    p, not_p, log_term = _sigmoid(x, narrow.dtype == tl.float32)
    ce = tl.where(x > 0.0, x, 0.0) - x * t + log_term
    loss = power(p * (1.0 - t) + not_p * t, gamma) * ce
    if alpha >= 0.0:
        a = tl.full(x.shape, alpha, x.dtype)
        loss *= a * t + (1.0 - a) * (1.0 - t)
    tl.store(out_ptr + offsets, loss.to(narrow.dtype), mask=mask)


@triton.jit
def sigmoid_backward_kernel(
    grad_ptr,
    x_ptr,
    target_ptr,
    out_ptr,
    alpha: tl.float64,
    gamma: tl.float64,
    size: tl.int64,
    BLOCK: tl.constexpr,
):
    """out = grad * d loss / dx; grad, x, target, out: (size,)."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    narrow = tl.load(x_ptr + offsets, mask=mask)
    x, t = wide(narrow), wide(tl.load(target_ptr + offsets, mask=mask))
    p, not_p, log_term = _sigmoid(x, narrow.dtype == tl.float32)
    ce = tl.where(x > 0.0, x, 0.0) - x * t + log_term
    q = p * (1.0 - t) + not_p * t
    ratio = tl.where(q == 0.0, 1.0, p * not_p / tl.where(q == 0.0, 1.0, q)) * (1.0 - 2.0 * t)
    wide_gamma = tl.full(x.shape, gamma, x.dtype)
    slope = power(q, gamma) * (p * (1.0 - t) - not_p * t + wide_gamma * ce * ratio)
    if alpha >= 0.0:
        a = tl.full(x.shape, alpha, x.dtype)
        slope *= a * t + (1.0 - a) * (1.0 - t)
    grad = wide(tl.load(grad_ptr + offsets, mask=mask))
    tl.store(out_ptr + offsets, (grad * slope).to(narrow.dtype), mask=mask)


ASSERT = {"debug": True, "sanitize_overflow": False}
"""Compiler options that keep the check of targets, and nothing else, in the kernel."""


def _layout(x: Tensor, whole: bool) -> tuple[int, int, bool, RowsConfig]:
    """Of contiguous x: (N, C, S), batches, rows of a batch, whether classes are not innermost; the launch."""
    n, classes, s = x.shape
    if s > 1:
        return n, s, True, strided_rows_config(classes, x.element_size())
    return 1, n, False, rows_config(classes, x.element_size(), whole)


def softmax_forward(
    x: Tensor, target: Tensor, alpha: Tensor | None, gamma: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Loss (N, S) and slopes (3, N, S) of x: (N, C, S), target: (N, S), alpha: (C,)."""
    x, target = x.contiguous(), target.contiguous()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss = torch.empty(target.shape, dtype=dtype, device=x.device)
    slopes = torch.empty((3, *target.shape), dtype=dtype, device=x.device)
    if target.numel():
        batches, rows, spatial, config = _layout(x, whole=True)
        grid = (batches * triton.cdiv(rows, config.rows),)
        with torch.accelerator.device_index(x.device.index):
            softmax_forward_kernel[grid](
                x,
                target,
                None if alpha is None else alpha.contiguous(),
                loss,
                slopes,
                gamma,
                rows,
                x.shape[1],
                target.numel(),
                ignore_index,
                SPATIAL=spatial,
                ROWS=config.rows,
                BLOCK=config.block,
                LOOP=x.shape[1] > config.block,
                num_warps=config.num_warps,
                **ASSERT,
            )
    return loss, slopes


def softmax_backward(grad: Tensor, x: Tensor, target: Tensor, slopes: Tensor, ignore_index: int) -> Tensor:
    """Gradient with respect to x, contiguous; grad: (N, S) of any strides."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        batches, rows, spatial, config = _layout(x, whole=False)
        grid = (batches * triton.cdiv(rows, config.rows) * triton.cdiv(x.shape[1], config.block),)
        same = not any(grad.stride())  # a sum's or a mean's
        with torch.accelerator.device_index(x.device.index):
            softmax_backward_kernel[grid](
                grad if same else grad.contiguous(),
                x,
                target.contiguous(),
                slopes.contiguous(),
                out,
                0 if same else 1,
                rows,
                x.shape[1],
                target.numel(),
                ignore_index,
                SPATIAL=spatial,
                ROWS=config.rows,
                BLOCK=config.block,
                num_warps=config.num_warps,
                **ASSERT,
            )
    return out


def _elementwise(
    kernel: triton.JITFunction, out: Tensor, tensors: tuple[Tensor, ...], alpha: float, gamma: float
) -> Tensor:
    """Run a kernel over tensors of one shape, each laid out as out."""
    size = out.numel()
    if size:
        strides = out.stride()
        same = [t if t.stride() == strides else torch.empty_like(out).copy_(t) for t in tensors]
        config = pointwise_config(out.element_size(), heavy=True)
        grid = (triton.cdiv(size, config.block),)
        with torch.accelerator.device_index(out.device.index):
            kernel[grid](*same, out, alpha, gamma, size, BLOCK=config.block, num_warps=config.num_warps)
    return out


def sigmoid_forward(x: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """Loss of every element, laid out as torch lays it out."""
    return _elementwise(sigmoid_forward_kernel, torch.empty_like(x), (x, target), alpha, gamma)


def sigmoid_backward(grad: Tensor, x: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """Gradient with respect to x."""
    return _elementwise(sigmoid_backward_kernel, torch.empty_like(x), (grad, x, target), alpha, gamma)
