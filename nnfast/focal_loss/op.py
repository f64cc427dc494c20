"""Focal loss as operations: schemas, fakes, autograd, and who can serve.

Four opaque operators, and the same again as overload `triton`; and three with kernels on the CPU alone, of
sums and means, which save the losses' way through memory. The last makes the gradient of long rows as well:

    nnfast::softmax_focal_loss(x, target, alpha, gamma, ignore_index) -> (loss, slopes)
    nnfast::softmax_focal_loss_backward(grad, x, target, slopes, ignore_index) -> gradient
    nnfast::sigmoid_focal_loss(x, target, alpha, gamma) -> loss
    nnfast::sigmoid_focal_loss_backward(grad, x, target, alpha, gamma) -> gradient
    nnfast::softmax_focal_loss_total(x, target, alpha, weight, gamma, ignore_index, mean)
        -> (sum of losses / denominator, denominator, slopes)
    nnfast::softmax_focal_loss_total_backward(grad, denominator, x, target, slopes, ignore_index) -> gradient
    nnfast::softmax_focal_loss_total_and_gradient(x, target, alpha, weight, gamma, ignore_index, mean, factor)
        -> (factor * sum of losses / denominator, its gradient)

Those of softmax take x: (N, C, S), target: (N, S), alpha: (C,), and give losses (N, S) in the compute dtype:
float64 for float64, else float32. Slopes (3, N, S), in that dtype too, are what `gradient_from_slopes` of
reference.py makes a row's gradient of, without a sum over the row. Those of totals take x: (N, C) and target:
(N,) too. A mean's denominator is how many targets are not ignored, or the sum of their weights, weight: (C,);
else it is 1. None is differentiable itself; `SOFTMAX` and `SIGMOID` are, which take what the functions of
module.py take.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from ..core import extension, tuning
from ..core.op import Backend, Op, forced, forced_outside_compile
from ..core.operator import (
    DTYPES,
    LIBRARY,
    autocasts,
    compute_dtype,
    define,
    implement,
    place_why_not,
    plain_why_not,
    requires_grad,
    size_not_worth,
    traced,
    transformed,
)
from . import reference

REDUCTIONS = ("none", "mean", "sum")
INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)

_SIGMOID = "Tensor x, Tensor target, float alpha, float gamma"


def needs_formula(*tensors: Tensor) -> bool:
    """A backward must be differentiable, or is transformed."""
    return transformed() or requires_grad(*tensors)


class SoftmaxKernels:
    """The two operators of softmax focal loss on one backend."""

    def __init__(self, library: torch.library.Library, overload: str = "") -> None:
        def fake(x: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
            dtype = compute_dtype(x)
            return x.new_empty(target.shape, dtype=dtype), x.new_empty((3, *target.shape), dtype=dtype)

        schema = (
            "softmax_focal_loss(Tensor x, Tensor target, Tensor? alpha, float gamma, int ignore_index) "
            "-> (Tensor, Tensor)"
        )
        self.forward = define(library, schema, fake, overload)
        schema = (
            "softmax_focal_loss_backward(Tensor grad, Tensor x, Tensor target, Tensor slopes, "
            "int ignore_index) -> Tensor"
        )
        self.backward = define(library, schema, lambda grad, x, *_: x.new_empty(x.shape), overload)

    def __call__(
        self, x: Tensor, target: Tensor, alpha: Tensor | None, gamma: float, ignore_index: int
    ) -> Tensor:
        """Losses (N, S), with whatever differentiation asks for."""
        result: Tensor
        args = (x, target, alpha, gamma, ignore_index, self)
        if transformed():
            result = _SoftmaxTransformed.apply(*args)  # type: ignore[no-untyped-call]
        elif x.requires_grad and torch.is_grad_enabled():
            result = (_Softmax.apply if is_compiling() else _softmax)(*args)  # type: ignore[no-untyped-call]
        else:
            result = self.forward(*args[:-1])[0]
        return result


class _Softmax(torch.autograd.Function):
    """Losses of rows. Saves the arguments and the slopes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Tensor,
        alpha: Tensor | None,
        gamma: float,
        ignore_index: int,
        kernels: SoftmaxKernels,
    ) -> Tensor:
        loss: Tensor
        loss, slopes = kernels.forward(x, target, alpha, gamma, ignore_index)
        ctx.save_for_backward(x, target, alpha, slopes)
        ctx.options, ctx.kernels = (gamma, ignore_index), kernels
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, target, alpha, slopes = ctx.saved_tensors
        result: Tensor
        if needs_formula(grad, x):
            result = reference.softmax_focal_loss_backward(grad, x, target, alpha, *ctx.options)
        else:
            result = ctx.kernels.backward(grad, x, target, slopes, ctx.options[1])
        return result, None, None, None, None, None


_softmax = super(torch.autograd.Function, _Softmax).apply
"""`_Softmax.apply` without its wrapper in Python, which only transforms need."""


def _total_fake(x: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x)
    one = x.new_empty((), dtype=dtype)
    return one, torch.empty_like(one), x.new_empty((3, *target.shape), dtype=dtype)


_total = define(
    LIBRARY,
    "softmax_focal_loss_total(Tensor x, Tensor target, Tensor? alpha, Tensor? weight, float gamma, "
    "int ignore_index, bool mean) -> (Tensor, Tensor, Tensor)",
    _total_fake,
)
_total_backward = define(
    LIBRARY,
    "softmax_focal_loss_total_backward(Tensor grad, Tensor denominator, Tensor x, Tensor target, "
    "Tensor slopes, int ignore_index) -> Tensor",
    lambda grad, denominator, x, *_: x.new_empty(x.shape),
)


_total_and_gradient = define(
    LIBRARY,
    "softmax_focal_loss_total_and_gradient(Tensor x, Tensor target, Tensor? alpha, Tensor? weight, "
    "float gamma, int ignore_index, bool mean, float factor) -> (Tensor, Tensor)",
    lambda x, *_: (x.new_empty((), dtype=compute_dtype(x)), x.new_empty(x.shape)),
)


class _SoftmaxTotal(torch.autograd.Function):
    """Sum or mean of the losses of rows. Saves the arguments, the slopes and the denominator."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Tensor,
        alpha: Tensor | None,
        weight: Tensor | None,
        gamma: float,
        ignore_index: int,
        mean: bool,
    ) -> Tensor:
        loss: Tensor
        loss, denominator, slopes = _total(x, target, alpha, weight, gamma, ignore_index, mean)
        ctx.save_for_backward(x, target, alpha, slopes, denominator)
        ctx.options = gamma, ignore_index
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, target, alpha, slopes, denominator = ctx.saved_tensors
        result: Tensor
        if needs_formula(grad, x):
            result = _total_formula(grad, denominator, x, target, alpha, *ctx.options)
        else:
            result = _total_backward(grad, denominator, x, target, slopes, ctx.options[1])
        return result, None, None, None, None, None, None


class _SoftmaxTotalAndGradient(torch.autograd.Function):
    """The same times `factor`, with the gradient made in forward; for a second one all is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, *rest: Any) -> Tensor:
        loss: Tensor
        loss, ctx.gradient = _total_and_gradient(x, target, *rest)
        alpha, weight, *ctx.options = rest
        ctx.save_for_backward(x, target, alpha, weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, target, alpha, weight = ctx.saved_tensors
        gamma, ignore_index, mean, factor = ctx.options
        result, ctx.gradient = ctx.gradient, None
        formula = needs_formula(grad, x)
        upstream = math.nan if formula else grad.item()
        if result is None or not math.isfinite(upstream):  # not to be had from it: inf * 0 is not 0
            with torch.no_grad():
                _, denominator, slopes = _total(x, target, alpha, weight, gamma, ignore_index, mean)
            grad = grad * factor
            if formula:
                result = _total_formula(grad, denominator, x, target, alpha, gamma, ignore_index)
            else:
                result = _total_backward(grad, denominator, x, target, slopes, ignore_index)
        elif upstream != 1:
            result.mul_(upstream)
        return result, *(None,) * 7


def _total_formula(
    grad: Tensor,
    denominator: Tensor,
    x: Tensor,
    target: Tensor,
    alpha: Tensor | None,
    gamma: float,
    ignore_index: int,
) -> Tensor:
    """The gradient of a total, differentiable."""
    rows, targets = _deep(x, target)
    upstream = (grad / denominator).expand(targets.shape)
    result = reference.softmax_focal_loss_backward(upstream, rows, targets, alpha, gamma, ignore_index)
    return result.reshape(x.shape)


def _deep(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, S) and (N, S)."""
    return (x, target) if x.dim() == 3 else (x.unsqueeze(2), target.unsqueeze(1))


_softmax_total = super(torch.autograd.Function, _SoftmaxTotal).apply
_softmax_total_and_gradient = super(torch.autograd.Function, _SoftmaxTotalAndGradient).apply


def _run_total(
    x: Tensor,
    target: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    gamma: float,
    ignore_index: int,
    mean: bool,
    factor: Number | Tensor,
) -> Tensor:
    """`factor` times the losses' sum or mean by the kernels on the CPU; not under transforms."""
    result: Tensor
    args = x, target, alpha, weight, gamma, ignore_index, mean
    if not (x.requires_grad and torch.is_grad_enabled()):
        result = _total(*args)[0]
    elif is_compiling():
        result = _SoftmaxTotal.apply(*args)  # type: ignore[no-untyped-call]
    elif _worth_gradient(x) and not isinstance(factor, Tensor):
        return _softmax_total_and_gradient(*args, float(factor))  # type: ignore[no-untyped-call, no-any-return]
    else:
        result = _softmax_total(*args)  # type: ignore[no-untyped-call]
    return scaled(result, factor)


def _worth_gradient(x: Tensor) -> bool:
    """Long rows are worth reading once; half types would lose digits where a gradient is scaled."""
    return (
        x.dtype == compute_dtype(x)
        and _LONG_ROW <= x.shape[1] <= tuning.GRADIENT_IN_FORWARD // x.itemsize
        and (x.dim() == 2 or x.shape[2] == 1)
    )


_LONG_ROW = 64  # FocalDevice::long_row


class _SoftmaxTransformed(torch.autograd.Function):
    """The same under torch.func transforms and forward-mode differentiation, which need another form."""

    @staticmethod
    def forward(
        x: Tensor,
        target: Tensor,
        alpha: Tensor | None,
        gamma: float,
        ignore_index: int,
        kernels: SoftmaxKernels,
    ) -> Tensor:
        loss: Tensor = kernels.forward(x, target, alpha, gamma, ignore_index)[0]
        return loss

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, target, alpha, *ctx.options, _ = inputs
        ctx.save_for_backward(x, target, alpha)
        ctx.save_for_forward(x, target, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient = reference.softmax_focal_loss_backward(grad, *ctx.saved_tensors, *ctx.options)
        return gradient, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        x, target, alpha = ctx.saved_tensors
        one = x.new_ones(target.shape, dtype=compute_dtype(x))
        slope = reference.softmax_focal_loss_backward(one, reference.wide(x), target, alpha, *ctx.options)
        return (slope * tangent).sum(1)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        target: Tensor,
        alpha: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, int]:
        if alpha is not None and in_dims[2] is not None:
            gamma, ignore_index, _ = rest

            def formula(x: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
                return reference.softmax_focal_loss(x, target, alpha, gamma, ignore_index)

            batched: Tensor = torch.vmap(formula, in_dims[:3])(x, target, alpha)
            return batched, 0
        x, target = _batch_first(info.batch_size, in_dims, x, target)
        flat = _SoftmaxTransformed.apply(x.flatten(0, 1), target.flatten(0, 1), alpha, *rest)  # type: ignore[no-untyped-call]
        return flat.unflatten(0, target.shape[:2]), 0


def _batch_first(size: int, in_dims: tuple[int | None, ...], *tensors: Tensor) -> list[Tensor]:
    """Tensors whose first dimension is vmap's."""
    return [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=False)
    ]


class SigmoidKernels:
    """The two operators of sigmoid focal loss on one backend."""

    def __init__(self, library: torch.library.Library, overload: str = "") -> None:
        schema = f"sigmoid_focal_loss({_SIGMOID}) -> Tensor"
        self.forward = define(library, schema, lambda x, *_: torch.empty_like(x), overload)
        schema = f"sigmoid_focal_loss_backward(Tensor grad, {_SIGMOID}) -> Tensor"
        self.backward = define(library, schema, lambda grad, x, *_: torch.empty_like(x), overload)

    def __call__(self, x: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
        """Loss of every element, with whatever differentiation asks for."""
        result: Tensor
        args = (x, target, alpha, gamma, self)
        if transformed():
            result = _SigmoidTransformed.apply(*args)  # type: ignore[no-untyped-call]
        elif x.requires_grad and torch.is_grad_enabled():
            result = (_Sigmoid.apply if is_compiling() else _sigmoid)(*args)  # type: ignore[no-untyped-call]
        else:
            result = self.forward(*args[:-1])
        return result


class _Sigmoid(torch.autograd.Function):
    """Loss of every element. Saves the arguments alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Tensor, alpha: float, gamma: float, kernels: SigmoidKernels
    ) -> Tensor:
        ctx.save_for_backward(x, target)
        ctx.options, ctx.kernels = (alpha, gamma), kernels
        loss: Tensor = kernels.forward(x, target, alpha, gamma)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, target = ctx.saved_tensors
        formula = needs_formula(grad, x)
        gradient = reference.sigmoid_focal_loss_backward if formula else ctx.kernels.backward
        return gradient(grad, x, target, *ctx.options), None, None, None, None


_sigmoid = super(torch.autograd.Function, _Sigmoid).apply


class _SigmoidTransformed(torch.autograd.Function):
    """The same under torch.func transforms and forward-mode differentiation."""

    @staticmethod
    def forward(x: Tensor, target: Tensor, alpha: float, gamma: float, kernels: SigmoidKernels) -> Tensor:
        loss: Tensor = kernels.forward(x, target, alpha, gamma)
        return loss

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, target, *ctx.options, ctx.kernels = inputs
        ctx.save_for_backward(x, target)
        ctx.save_for_forward(x, target)

    backward = _Sigmoid.backward

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return reference.sigmoid_focal_loss_backward(tangent, *ctx.saved_tensors, *ctx.options)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, target: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        both = _batch_first(info.batch_size, in_dims, x, target)
        return _SigmoidTransformed.apply(*both, *rest), 0  # type: ignore[no-untyped-call]


def _rows(inputs: Tensor) -> Tensor:
    """Logits as (N, C, S). Those with classes innermost (channels_last) become rows, (N * S, C, 1)."""
    if inputs.dim() <= 2:
        return inputs.reshape(-1, inputs.shape[-1], 1)
    x = inputs.flatten(2)
    if x.stride(1) == 1 and x.shape[1] > 1 and x.transpose(1, 2).is_contiguous():
        return x.transpose(1, 2).reshape(-1, x.shape[1], 1)
    return x


def _targets(targets: Tensor, x: Tensor) -> Tensor:
    """Targets beside `_rows`' x: (N, S) classes, or (N, C, S) probabilities."""
    if not targets.is_floating_point():
        return targets.long().reshape(x.shape[0], x.shape[2])
    rows = _rows(targets)
    if rows.shape == x.shape:
        return rows
    flat = targets.flatten(2)
    return flat.transpose(1, 2).reshape(x.shape) if x.shape[2] == 1 else flat


Number = int | float


def _run_softmax(
    losses: Callable[..., Tensor],
    inputs: Tensor,
    targets: Tensor,
    alpha: Number | Tensor = 1,
    gamma: float = 2,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    *,
    total: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Reduce `losses(x, target, alpha, weight, gamma, ignore_index, label_smoothing)` -> (N, S).

    Or by `total(x, target, alpha * weight, weight, gamma, ignore_index, mean, factor)`, where losses are of
    kernels.
    """
    x = _rows(inputs)
    target = _targets(targets, x)
    classes = not target.is_floating_point()
    dtype = compute_dtype(x)
    of_class, factor = split_alpha(alpha, dtype)
    weight = None if weight is None else weight.to(dtype)
    if total is not None and reduction != "none" and not transformed():
        scale = multiplied(of_class, weight)
        loss = total(x, target, scale, weight, float(gamma), ignore_index, reduction == "mean", factor)
        return _as_given(inputs, loss, dtype)
    loss = losses(x, target, of_class, weight, float(gamma), ignore_index, label_smoothing)
    if reduction == "none":
        loss = loss.reshape(
            targets.shape if classes else inputs.shape[:1] * (inputs.dim() > 1) + inputs.shape[2:]
        )
    elif reduction == "sum" or classes:
        loss = loss.sum()
        if reduction == "mean":
            loss = loss / mean_denominator(target, weight, ignore_index)
    else:
        loss = loss.mean()
    return _as_given(inputs, scaled(loss, factor), dtype)


def _as_given(inputs: Tensor, loss: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """In inputs' dtype, unless autocast is on."""
    if inputs.dtype == loss.dtype == compute_dtype:
        return loss
    return loss.to(compute_dtype if autocasts(inputs) else inputs.dtype)


def multiplied(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a * b, where None is one."""
    return b if a is None else a if b is None else a * b


def split_alpha(alpha: Number | Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Number | Tensor]:
    """Alpha as a factor of each class, and as one of all."""
    if isinstance(alpha, Tensor) and alpha.dim() == 1:
        return alpha.to(dtype), 1
    return None, alpha


def scaled(loss: Tensor, factor: Number | Tensor) -> Tensor:
    """loss * factor."""
    return loss if isinstance(factor, (int, float)) and factor == 1 else loss * factor


def mean_denominator(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The mean's denominator: how many targets are not ignored, or the sum of their weights."""
    valid = target != ignore_index
    return valid.sum() if weight is None else weight[target.where(valid, 0)].where(valid, 0).sum()


def kernel_losses(
    kernels: SoftmaxKernels,
    x: Tensor,
    target: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    gamma: float,
    ignore_index: int,
    _: float,
) -> Tensor:
    """Losses (N, S) of indices, by operators."""
    return kernels(x, target, multiplied(alpha, weight), gamma, ignore_index)


def reference_losses(
    x: Tensor,
    target: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    gamma: float,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Losses (N, S), by the formula."""
    if label_smoothing or target.is_floating_point():
        return reference.smoothed_focal_loss(x, target, alpha, weight, gamma, ignore_index, label_smoothing)
    return reference.softmax_focal_loss(x, target, multiplied(alpha, weight), gamma, ignore_index)


def aten_losses(
    x: Tensor,
    target: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    gamma: float,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The seed formulation: cross entropy first, then p_t from it; safe where p_t is 1."""
    if label_smoothing or target.is_floating_point():
        return reference.smoothed_focal_loss(x, target, alpha, weight, gamma, ignore_index, label_smoothing)
    rows = x.shape[2] == 1  # torch is faster and more exact over the last dimension
    logits, classes = (x.squeeze(2), target.squeeze(1)) if rows else (x, target)
    ce = F.cross_entropy(logits, classes, ignore_index=ignore_index, reduction="none")
    ce = reference.wide(ce).reshape(target.shape)
    loss = reference.power(1 - torch.exp(-ce), gamma) * ce if gamma else ce
    if alpha is not None or weight is not None:
        index = target.where(target != ignore_index, 0)
        for scale in (alpha, weight):
            loss = loss if scale is None else loss * scale[index]
    return loss


def _softmax_why_not(
    backend: str,
    inputs: Tensor,
    targets: Tensor,
    alpha: Number | Tensor = 1,
    gamma: float = 2,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> list[str]:
    reasons = place_why_not("softmax_focal_loss", backend, "inputs", inputs) if backend else []
    reasons += plain_why_not("inputs", inputs)
    if targets.is_floating_point():
        reasons.append("targets are class probabilities; our kernels take class indices")
    elif type(targets) is not Tensor:
        reasons.append(f"targets is a {type(targets).__name__}; our kernels take plain tensors")
    return reasons + loss_why_not(label_smoothing, alpha=alpha, weight=weight)


def loss_why_not(label_smoothing: float, **factors: Number | Tensor | None) -> list[str]:
    """What no kernel of softmax focal loss takes."""
    reasons = [f"label_smoothing is {label_smoothing}; our kernels have none"] * bool(label_smoothing)
    for name, value in factors.items():
        if isinstance(value, Tensor) and value.dim() == 1 and value.requires_grad:
            reasons.append(f"{name} requires grad; our kernels give none")
    return reasons


def _softmax_not_worth(backend: str, inputs: Tensor, *_: Any, **__: Any) -> list[str]:
    return size_not_worth("softmax_focal_loss", backend, inputs)


def _run_sigmoid(
    losses: Callable[..., Tensor],
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
) -> Tensor:
    """Reduce `losses(x, target, alpha, gamma)`."""
    if not targets.is_floating_point():
        targets = targets.to(inputs.dtype)
    if autocasts(inputs):
        inputs, targets = reference.wide(inputs), reference.wide(targets)
    loss = losses(inputs, targets, float(alpha), float(gamma))
    if reduction == "none":
        return loss
    if reduction == "mean" and loss.itemsize >= 4:  # a sum in a half type may overflow
        return loss.sum() / loss.numel()  # mean's own gradient is written out, a value an element
    return loss.mean() if reduction == "mean" else loss.sum()


def _sigmoid_why_not(
    backend: str,
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
) -> list[str]:
    reasons = place_why_not("sigmoid_focal_loss", backend, "inputs", inputs) if backend else []
    reasons += plain_why_not("inputs", inputs)
    if type(targets) is not Tensor:
        reasons.append(f"targets is a {type(targets).__name__}; our kernels take plain tensors")
    if targets.is_floating_point() and targets.dtype != inputs.dtype:
        reasons.append(f"targets has dtype {targets.dtype}; our kernels take that of inputs, {inputs.dtype}")
    if targets.requires_grad:
        reasons.append("targets requires grad; our kernels give none")
    return reasons


def _sigmoid_not_worth(backend: str, inputs: Tensor, *_: Any, **__: Any) -> list[str]:
    return size_not_worth("sigmoid_focal_loss", backend, inputs)


class FocalLoss(Op):
    """Softmax or sigmoid focal loss; called with the arguments of its function, checked."""

    def __init__(
        self,
        name: str,
        kernels: Callable[..., Callable[..., Tensor]],
        run: Callable[..., Tensor],
        formulas: dict[str, Callable[..., Tensor]],
        why_not: Callable[..., list[str]],
        not_worth: Callable[..., list[str]],
        targets: Callable[[Tensor], Tensor],
        on_cpu: Callable[..., Tensor] | None = None,
    ) -> None:
        self.run, self.why_not, self.kernels, self.targets = run, why_not, kernels, targets
        compiled, triton = kernels(LIBRARY), kernels(LIBRARY, "triton")
        ours = [
            Backend(key, partial(run_it, found), partial(why_not, key), partial(not_worth, key))
            for key, found, run_it in (
                ("cuda", compiled, run),
                ("triton", triton, run),
                ("cpu", compiled, on_cpu or run),
            )
        ]
        self.aten = partial(run, formulas["aten"])
        super().__init__(name, ours + [Backend(key, partial(run, f)) for key, f in formulas.items()])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the chosen backend; under torch.compile torch's own operations, so that Inductor fuses them."""
        if is_compiling() and forced() is None:
            return self.aten(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def example(self, device: str) -> tuple[Any, ...]:
        """Logits of 16384 rows and 1000 classes, and their targets."""
        x = torch.empty(16384, 1000, device=device)
        return x, self.targets(x)

    def compiled_in(self, library: torch.library.Library) -> Backend:
        """The `cuda` backend with the operators of another library, on any device."""
        return Backend("cuda", partial(self.run, self.kernels(library)), partial(self.why_not, ""))


def _in_triton(function: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        from . import kernels  # imports triton

        return getattr(kernels, function)(*args)

    return call


def _softmax_in_triton(
    x: Tensor, target: Tensor, alpha: Tensor | None, gamma: float, ignore_index: int
) -> Any:
    if message := out_of_range(target, x.shape[1], ignore_index):  # the interpreter asserts nothing
        raise IndexError(f"nnfast::softmax_focal_loss.triton: {message}")
    return _in_triton("softmax_forward")(x, target, alpha, gamma, ignore_index)


def _softmax_forward(*args: Any) -> tuple[Tensor, Tensor]:
    return reference.softmax_focal_loss(*args), reference.softmax_focal_loss_slopes(*args)


def _softmax_total_forward(
    x: Tensor,
    target: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    gamma: float,
    ignore_index: int,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = 3, *target.shape
    x, target = _deep(x, target)
    loss, slopes = _softmax_forward(x, target, alpha, gamma, ignore_index)
    denominator = mean_denominator(target, weight, ignore_index).to(loss.dtype) if mean else loss.new_ones(())
    return loss.sum() / denominator, denominator, slopes.reshape(shape)


def _softmax_total_and_gradient_forward(x: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *options, factor = rest
    loss, denominator, slopes = _softmax_total_forward(x, target, *options)
    scale = loss.new_full((), factor)
    return loss * factor, _softmax_total_backward(scale, denominator, x, target, slopes, options[3])


def _softmax_total_backward(
    grad: Tensor, denominator: Tensor, x: Tensor, target: Tensor, slopes: Tensor, ignore_index: int
) -> Tensor:
    rows, target = _deep(x, target)
    upstream = (grad / denominator).expand(target.shape)
    result = reference.gradient_from_slopes(
        upstream, rows, target, slopes.reshape(3, *target.shape), ignore_index
    )
    return result.reshape(x.shape)


@cache
def softmax_kernels(library: torch.library.Library, overload: str = "") -> SoftmaxKernels:
    """The operators of a library, defined at the first call."""
    return SoftmaxKernels(library, overload)


SOFTMAX = FocalLoss(
    "softmax_focal_loss",
    lambda *args: partial(kernel_losses, softmax_kernels(*args)),
    _run_softmax,
    {"aten": aten_losses, "reference": reference_losses},
    _softmax_why_not,
    _softmax_not_worth,
    lambda x: x.select(1, 0).long(),
    partial(_run_softmax, total=_run_total),
)
SIGMOID = FocalLoss(
    "sigmoid_focal_loss",
    SigmoidKernels,
    _run_sigmoid,
    {"aten": reference.sigmoid_formula, "reference": reference.sigmoid_focal_loss},
    _sigmoid_why_not,
    _sigmoid_not_worth,
    torch.empty_like,
)
LIBRARY.impl("softmax_focal_loss_total", _softmax_total_forward, "CompositeExplicitAutograd")
LIBRARY.impl("softmax_focal_loss_total_backward", _softmax_total_backward, "CompositeExplicitAutograd")
LIBRARY.impl(
    "softmax_focal_loss_total_and_gradient", _softmax_total_and_gradient_forward, "CompositeExplicitAutograd"
)
implement("softmax_focal_loss", _softmax_forward, _softmax_in_triton)
implement("softmax_focal_loss_backward", reference.gradient_from_slopes, _in_triton("softmax_backward"))
implement("sigmoid_focal_loss", reference.sigmoid_focal_loss, _in_triton("sigmoid_forward"))
implement(
    "sigmoid_focal_loss_backward", reference.sigmoid_focal_loss_backward, _in_triton("sigmoid_backward")
)


def softmax_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: Number | Tensor,
    gamma: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """Check the arguments and let the chosen backend run.

    Rows on the CPU and a number alpha take its kernels at once; `SOFTMAX.explain` gives the same answer with
    its reasons.
    """
    name = "nnfast.softmax_focal_loss"
    if weight is None and not label_smoothing and _is_plain(inputs, targets, alpha, gamma, reduction):
        try:
            mean = reduction == "mean"
            loss = _run_total(inputs, targets, None, None, float(gamma), ignore_index, mean, alpha)
        except RuntimeError as error:
            if message := out_of_range(targets, inputs.shape[1], ignore_index):
                raise IndexError(f"{name}: {message}") from error
            raise
        return _as_given(inputs, loss, loss.dtype)
    _check_tensors(name, inputs, targets)
    check_options(name, gamma, reduction)
    if not inputs.dim():
        raise ValueError(f"{name}: inputs has no dimension; it needs shape (N, C), (C,) or (N, C, d1, ...)")
    classes = inputs.shape[min(1, inputs.dim() - 1)]
    if not classes:
        raise ValueError(f"{name}: inputs has shape {list(inputs.shape)}; it needs at least one class")
    if targets.is_floating_point():
        if targets.shape != inputs.shape:
            raise ValueError(
                f"{name}: targets has shape {list(targets.shape)}; class probabilities need that of inputs, "
                f"{list(inputs.shape)}"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"{name}: ignore_index is {ignore_index}; class probabilities have no such class"
            )
    elif targets.dtype not in INDEX_DTYPES:
        raise TypeError(
            f"{name}: targets has dtype {targets.dtype}; it needs classes in "
            f"{', '.join(map(str, INDEX_DTYPES))}, or class probabilities"
        )
    else:
        expected = inputs.shape[:1] * (inputs.dim() > 1) + inputs.shape[2:]
        if targets.shape != expected:
            raise ValueError(
                f"{name}: targets has shape {list(targets.shape)}; inputs {list(inputs.shape)} need "
                f"{list(expected)}, or class probabilities"
            )
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        check_per_class(name, "alpha", alpha, inputs, classes)
    if weight is not None:
        check_per_class(name, "weight", weight, inputs, classes, number=False)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}; it needs to be within [0, 1]")
    args = (inputs, targets, alpha, gamma, weight, ignore_index, label_smoothing, reduction)
    if is_compiling():
        compiled: Tensor = SOFTMAX(*args)
        return compiled
    try:
        result: Tensor = SOFTMAX(*args)
    except Exception as error:  # each backend has its own
        if message := out_of_range(targets, classes, ignore_index):
            raise IndexError(f"{name}: {message}") from error
        raise
    return result


def _is_plain(inputs: Tensor, targets: Tensor, alpha: Number | Tensor, gamma: float, reduction: str) -> bool:
    """Valid rows for which the CPU's kernels are sure to be chosen."""
    return (
        not is_compiling()
        and type(inputs) is Tensor
        and type(targets) is Tensor
        and inputs.dtype in DTYPES
        and targets.dtype is torch.int64
        and inputs.is_cpu
        and targets.is_cpu
        and inputs.dim() == 2
        and targets.dim() == 1
        and targets.shape[0] == inputs.shape[0]
        and inputs.numel() >= _LEAST
        and inputs.is_contiguous()
        and (type(alpha) is int or type(alpha) is float)
        and (type(gamma) is int or type(gamma) is float)
        and 0 <= gamma < math.inf
        and (reduction == "mean" or reduction == "sum")
        and forced_outside_compile() is None
        and not extension.why_not("softmax_focal_loss_total", "CPU")
        and not (transformed() or traced())
    )


_LEAST = max(tuning.threshold("softmax_focal_loss", "cpu", grad) for grad in (False, True))


def sigmoid_focal_loss(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str) -> Tensor:
    """Check the arguments and let the chosen backend run."""
    name = "nnfast.sigmoid_focal_loss"
    _check_tensors(name, inputs, targets)
    check_options(name, gamma, reduction)
    if targets.is_complex():
        raise TypeError(f"{name}: targets has dtype {targets.dtype}; it needs a real one")
    if targets.shape != inputs.shape:
        raise ValueError(
            f"{name}: targets has shape {list(targets.shape)}; it needs that of inputs, {list(inputs.shape)}"
        )
    if not isinstance(alpha, (int, float)):
        raise TypeError(f"{name}: alpha is a {type(alpha).__name__}; it needs a number")
    if not alpha <= 1:
        raise ValueError(f"{name}: alpha is {alpha}; it needs to be within [0, 1], or negative for none")
    result: Tensor = SIGMOID(inputs, targets, alpha, gamma, reduction)
    return result


def _check_tensors(name: str, inputs: Tensor, targets: Tensor) -> None:
    for argument, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {argument} is a {type(value).__name__}; it needs a torch.Tensor")
    if not inputs.is_floating_point():
        raise TypeError(f"{name}: inputs has dtype {inputs.dtype}; it needs a floating-point one")
    if targets.device != inputs.device:
        raise ValueError(
            f"{name}: targets is on {targets.device}; it needs to be on {inputs.device} as inputs"
        )


def check_options(name: str, gamma: float, reduction: str) -> None:
    """What both losses need of these."""
    if not isinstance(gamma, (int, float)):
        raise TypeError(f"{name}: gamma is a {type(gamma).__name__}; it needs a number")
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"{name}: gamma is {gamma}; it needs to be finite and at least 0")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction is {reduction!r}; it needs to be one of {', '.join(REDUCTIONS)}")


def check_per_class(
    name: str, argument: str, value: object, inputs: Tensor, classes: int, number: bool = True
) -> None:
    """Raise unless value is a tensor of a value per class, or, with number, of one for all."""
    wanted = "a number or " * number + "a floating-point tensor of a value per class"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument} is a {type(value).__name__}; it needs {wanted}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: {argument} has dtype {value.dtype}; it needs {wanted}")
    if value.dim() or not number:
        if value.shape != (classes,):
            raise ValueError(
                f"{name}: {argument} has shape {list(value.shape)}; inputs has {classes} classes "
                f"and needs [{classes}]"
            )
        if value.device != inputs.device:
            raise ValueError(
                f"{name}: {argument} is on {value.device}; it needs to be on {inputs.device} as inputs"
            )


def out_of_range(
    targets: Tensor, classes: int, ignore_index: int, name: str = "targets", of: str = "inputs"
) -> str:
    """The first target on the cpu that is no class, in words; "" if there is none, or no telling."""
    if targets.is_floating_point() or not targets.is_cpu or transformed():
        return ""
    flat = targets.long().flatten()
    wrong = ((flat != ignore_index) & ((flat < 0) | (flat >= classes))).nonzero()
    if not len(wrong):
        return ""
    at = int(wrong[0])
    place: object = (
        at if targets.dim() <= 1 else [int(i) for i in torch.unravel_index(wrong[0, 0], targets.shape)]
    )
    return (
        f"{name} has class {int(flat[at])} at index {place}; {of} has {classes} classes "
        f"(ignore_index={ignore_index})"
    )
