"""A linear layer with the softmax focal loss of its outputs, which are made a chunk of rows at a time.

It has no operator of its own: it calls those of the softmax focal loss for each chunk, so that the logits are
never whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from ..core import product, tuning
from ..core.op import Backend, Op
from ..core.operator import (
    LIBRARY,
    autocasts,
    compute_dtype,
    place_why_not,
    plain_why_not,
    requires_grad,
    size_not_worth,
    traced,
    transformed,
    without_autocast,
)
from . import reference
from .op import (
    INDEX_DTYPES,
    Number,
    SoftmaxKernels,
    aten_losses,
    check_options,
    check_per_class,
    kernel_losses,
    loss_why_not,
    mean_denominator,
    multiplied,
    needs_formula,
    out_of_range,
    reference_losses,
    scaled,
    softmax_kernels,
    split_alpha,
)


class LinearFocalLoss(Op):
    """A linear layer and the softmax focal loss of its outputs, which are made a chunk of rows at a time."""

    def __init__(self) -> None:
        kernels = {"cuda": LIBRARY, "triton": LIBRARY, "cpu": LIBRARY}
        ours = [
            Backend(
                key,
                partial(_run_linear, *_of_kernels(softmax_kernels(library, *["triton"] * (key == "triton")))),
                partial(_linear_why_not, key),
                partial(_linear_not_worth, key),
            )
            for key, library in kernels.items()
        ]
        theirs = {"aten": aten_losses, "reference": reference_losses}
        super().__init__(
            "linear_focal_loss",
            ours
            + [
                Backend(key, partial(_run_linear, partial(_slopes_by_autograd, losses), losses))
                for key, losses in theirs.items()
            ],
        )

    def example(self, device: str) -> tuple[Any, ...]:
        """The rows, matrix and targets of a vocabulary."""
        x = torch.empty(4096, 512, device=device)
        return x, torch.empty(32000, 512, device=device), x.select(1, 0).long()

    def compiled_in(self, library: torch.library.Library) -> Backend:
        """The `cuda` backend with the operators of another library, on any device."""
        run = partial(_run_linear, *_of_kernels(softmax_kernels(library)))
        return Backend("cuda", run, partial(_linear_why_not, ""))


Slopes = Callable[..., tuple[Tensor, Tensor | None]]
"""From logits (n, V), targets (n,), upstream gradients (n,) or None, and the loss's options, to the losses
(n,) and, given upstream gradients, that with respect to the logits."""


def _of_kernels(kernels: SoftmaxKernels) -> tuple[Slopes, Callable[..., Tensor]]:
    return partial(_slopes_by_kernels, kernels), partial(kernel_losses, kernels)


def _slopes_by_kernels(
    kernels: SoftmaxKernels,
    logits: Tensor,
    target: Tensor,
    upstream: Tensor | None,
    alpha: Tensor | None,
    weight: Tensor | None,
    gamma: float,
    ignore_index: int,
    _: float,
) -> tuple[Tensor, Tensor | None]:
    x, target = logits.unsqueeze(-1), target.unsqueeze(-1)
    loss, slopes = kernels.forward(x, target, multiplied(alpha, weight), gamma, ignore_index)
    slope = None
    if upstream is not None:
        slope = kernels.backward(upstream.unsqueeze(-1), x, target, slopes, ignore_index).squeeze(-1)
    return loss.squeeze(-1), slope


def _slopes_by_autograd(
    losses: Callable[..., Tensor], logits: Tensor, target: Tensor, upstream: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor | None]:
    with torch.set_grad_enabled(upstream is not None):
        x = logits.detach().unsqueeze(-1).requires_grad_(upstream is not None)
        loss = losses(x, target.unsqueeze(-1), *options).squeeze(-1)
        slope = None if upstream is None else torch.autograd.grad(loss, x, upstream)[0].squeeze(-1)
    return loss.detach(), slope


@dataclass(frozen=True)
class _Rows:
    """How the rows of a linear layer are gone through."""

    slopes: Slopes
    losses: Callable[..., Tensor]
    options: tuple[Any, ...]

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        """Losses (N,) from all logits at once, however they are differentiated."""
        logits = F.linear(x, weight, bias).unsqueeze(-1)
        return self.losses(logits, target.unsqueeze(-1), *self.options).squeeze(-1)

    def chunked(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        upstream: Tensor | None = None,
        needs: Sequence[bool] = (False, False, False),
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Losses (N,), and for upstream gradients (N,) those of x, weight and bias that are needed.

        Sums over rows are in the compute dtype.
        """
        count = tuning.linear_chunk(len(x), len(weight))
        losses: list[Tensor] = []
        of_x: list[Tensor] = []
        of_weight: Tensor | None = None
        of_bias: Tensor | None = None
        buffer = x.new_empty(count, len(weight))  # new memory would be new pages, chunk after chunk
        ours = not product.why_not(x[:count], weight, bias) and (
            upstream is None or not torch._C._functorch.is_legacy_batchedtensor(upstream)
        )
        for begin in range(0, len(x), count):
            rows = slice(begin, begin + count)
            some = x[rows]
            logits = buffer[: len(some)]
            (product.into if ours else product.torchs_into)(logits, some, weight.t(), bias, False)
            grad = None if upstream is None else upstream[rows]
            loss, slope = self.slopes(logits, target[rows], grad, *self.options)
            losses.append(loss)
            if slope is None:
                continue
            if needs[0]:
                of_x.append(product.product(slope, weight) if ours else slope @ weight)
            if needs[1]:
                of_weight = _add_product(ours, of_weight, slope.t(), some)
            if needs[2]:
                part = slope.sum(0, dtype=loss.dtype)
                of_bias = part if of_bias is None else of_bias.add_(part)
        return torch.cat(losses), (torch.cat(of_x) if of_x else None, of_weight, of_bias)

    def differentiable(
        self, grad: Tensor, inputs: Sequence[Any], target: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the losses, by a formula that can be differentiated again."""
        with torch.enable_grad():
            logits = F.linear(*inputs).unsqueeze(-1)
            loss = reference_losses(logits, target.unsqueeze(-1), *self.options).squeeze(-1)
            asked = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
            found = iter(torch.autograd.grad(loss, asked, grad.expand(loss.shape), create_graph=True))
        return [next(found) if need else None for need in needs]


def _add_product(ours: bool, total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b in the compute dtype, in total's memory."""
    if total is None:
        return product.product(a, b) if ours else reference.wide(a @ b)
    if ours:
        product.into(total, a, b, None, True)
        return total
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)


_FLOAT16_SCALE = 256.0
"""Keeps a small probability's digits in a float16 gradient for an upstream gradient of one."""


class _LinearTotal(torch.autograd.Function):
    """Sum of the losses. The gradients for an upstream gradient of one are made in the forward.

    Made in the backward they would cost the logits, a third of all products, once more. What the forward
    saves, the backward scales into new tensors, so that the graph can be used again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: _Rows
    ) -> Tensor:
        ctx.rows, ctx.scale = rows, _FLOAT16_SCALE if x.dtype == torch.float16 else 1.0
        needs = ctx.needs_input_grad[:3]
        upstream = torch.full(target.shape, ctx.scale, dtype=compute_dtype(x), device=x.device)
        losses, gradients = rows.chunked(x, weight, bias, target, upstream, needs)
        ctx.save_for_backward(x, weight, bias, target, *gradients)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, target, of_x, of_weight, of_bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if needs_formula(grad, *(t for t in inputs if t is not None)):
            return (*ctx.rows.differentiable(grad, inputs, target, needs), None, None)
        # A mean over ignored targets alone divides by none: its gradient is infinite, and what it meets zero.
        ignore_index = ctx.rows.options[3]
        grad = grad.where((target != ignore_index).any(), 0) / ctx.scale
        gradients = (
            None if saved is None else (saved * grad).to(given.dtype)
            for saved, given in zip((of_x, of_weight, of_bias), inputs, strict=True)
        )
        return (*gradients, None, None)


class _LinearRows(torch.autograd.Function):
    """Losses of rows. Each has an upstream gradient of its own, so the backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: _Rows
    ) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, weight, bias, target)
        return rows.chunked(x, weight, bias, target)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, target = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if needs_formula(grad, *(t for t in inputs if t is not None)):
            return (*ctx.rows.differentiable(grad, inputs, target, needs), None, None)
        _, gradients = ctx.rows.chunked(*inputs, target, grad, needs)
        same = (None if g is None else g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True))
        return (*same, None, None)


def _run_linear(
    slopes: Slopes,
    losses: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: Number | Tensor = 1,
    gamma: float = 2,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    keep = x.dtype
    if autocasts(x) and x.dtype != torch.float64:
        half = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(half), weight.to(half), None if bias is None else bias.to(half)
        keep = torch.float32
    dtype = compute_dtype(x)
    of_class, factor = split_alpha(alpha, dtype)
    class_weight = None if class_weight is None else class_weight.to(dtype)
    rows = _Rows(slopes, losses, (of_class, class_weight, float(gamma), ignore_index, label_smoothing))
    flat = x.reshape(-1, x.shape[-1]), weight, bias, target.long().reshape(-1)
    with without_autocast(x):
        if _in_one_piece(slopes, flat, of_class, class_weight):
            loss = rows.whole(*flat)
            loss = loss if reduction == "none" else loss.sum()
        elif not requires_grad(*flat):
            loss = rows.chunked(*flat)[0]
            loss = loss if reduction == "none" else loss.sum()
        else:
            function = _LinearRows if reduction == "none" else _LinearTotal
            loss = function.apply(*flat, rows)  # type: ignore[no-untyped-call]
        if reduction == "none":
            loss = loss.reshape(target.shape)
        elif reduction == "mean":
            loss = loss / mean_denominator(flat[-1], class_weight, ignore_index)
        return scaled(loss, factor).to(keep)


def _in_one_piece(slopes: Slopes, flat: tuple[Any, ...], *factors: Tensor | None) -> bool:
    """Transforms, tracing, gradients of factors, and torch.compile of torch's own need all logits."""
    torchs = isinstance(slopes, partial) and slopes.func is _slopes_by_autograd
    return (
        not len(flat[0])
        or transformed()
        or traced()
        or requires_grad(*factors)
        or (torchs and is_compiling())
    )


def _linear_why_not(
    backend: str,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: Number | Tensor = 1,
    gamma: float = 2,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> list[str]:
    reasons = place_why_not("softmax_focal_loss", backend, "x", x) if backend else []
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        reasons += [] if tensor is None else plain_why_not(name, tensor)
    if type(target) is not Tensor:
        reasons.append(f"target is a {type(target).__name__}; our kernels take plain tensors")
    return reasons + loss_why_not(label_smoothing, alpha=alpha, class_weight=class_weight)


def _linear_not_worth(backend: str, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[str]:
    logits = math.prod(x.shape[:-1]) * len(weight)
    return size_not_worth("softmax_focal_loss", backend, x, logits, x.requires_grad or weight.requires_grad)


LINEAR = LinearFocalLoss()


def linear_focal_loss(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    alpha: float | Tensor,
    gamma: float,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """Check the arguments and let the chosen backend run."""
    name = "nnfast.linear_focal_loss"
    check_options(name, gamma, reduction)
    for argument, value in (("x", x), ("weight", weight), ("target", target), ("bias", bias)):
        if not isinstance(value, Tensor) and (argument != "bias" or value is not None):
            raise TypeError(f"{name}: {argument} is a {type(value).__name__}; it needs a torch.Tensor")
    if not x.is_floating_point() or not x.dim():
        raise TypeError(f"{name}: x is {x.dtype}{list(x.shape)}; it needs a floating-point (..., D)")
    if weight.dim() != 2 or not len(weight) or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{name}: weight has shape {list(weight.shape)}; x {list(x.shape)} needs [classes, {x.shape[-1]}]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: bias has shape {list(bias.shape)}; weight {list(weight.shape)} needs [{len(weight)}]"
        )
    if target.dtype not in INDEX_DTYPES:
        raise TypeError(
            f"{name}: target has dtype {target.dtype}; it needs classes in "
            f"{', '.join(map(str, INDEX_DTYPES))}"
        )
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"{name}: target has shape {list(target.shape)}; x {list(x.shape)} needs {list(x.shape[:-1])}"
        )
    for argument, value in (("weight", weight), ("target", target), *[("bias", bias)] * (bias is not None)):
        assert isinstance(value, Tensor)
        if value.device != x.device:
            raise ValueError(f"{name}: {argument} is on {value.device}; it needs to be on {x.device} as x")
        if argument != "target" and value.dtype != x.dtype and not autocasts(x):
            raise TypeError(
                f"{name}: {argument} has dtype {value.dtype}; x has {x.dtype}, and both must be equal"
            )
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        check_per_class(name, "alpha", alpha, x, len(weight))
    if class_weight is not None:
        check_per_class(name, "class_weight", class_weight, x, len(weight), number=False)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}; it needs to be within [0, 1]")
    options = {
        "alpha": alpha,
        "gamma": gamma,
        "class_weight": class_weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    result: Tensor
    if is_compiling():
        result = LINEAR(x, weight, target, bias, **options)
        return result
    try:
        result = LINEAR(x, weight, target, bias, **options)
    except Exception as error:  # each backend has its own
        if message := out_of_range(target, len(weight), ignore_index, "target", "weight"):
            raise IndexError(f"{name}: {message}") from error
        raise
    return result
