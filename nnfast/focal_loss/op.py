"""Focal loss as operations: schemas, fakes, autograd, and who can serve.

Four opaque operators, and the same again as overload `triton`:

    nnfast::softmax_focal_loss(x, target, alpha, gamma, ignore_index) -> (loss, log_sum_exp)
    nnfast::softmax_focal_loss_backward(grad, x, target, alpha, log_sum_exp, gamma, ignore_index) -> gradient
    nnfast::sigmoid_focal_loss(x, target, alpha, gamma) -> loss
    nnfast::sigmoid_focal_loss_backward(grad, x, target, alpha, gamma) -> gradient

The first two take x: (N, C, S), target: (N, S), alpha: (C,), and give losses (N, S) in the compute dtype:
float64 for float64, else float32. They are not differentiable themselves; `SOFTMAX` and `SIGMOID` are, which
take what the functions of module.py take.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from ..core.op import Backend, Op, forced
from ..core.operator import (
    LIBRARY,
    define,
    implement,
    place_why_not,
    plain_why_not,
    size_not_worth,
    transformed,
)
from . import reference

REDUCTIONS = ("none", "mean", "sum")
INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)

_SOFTMAX = "Tensor x, Tensor target, Tensor? alpha"
_SIGMOID = "Tensor x, Tensor target, float alpha, float gamma"


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _needs_formula(*tensors: Tensor) -> bool:
    """A backward must be differentiable, or is transformed."""
    return transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


class SoftmaxKernels:
    """The two operators of softmax focal loss on one backend."""

    def __init__(self, library: torch.library.Library, overload: str = "") -> None:
        def fake(x: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
            dtype = _compute_dtype(x)
            return x.new_empty(target.shape, dtype=dtype), x.new_empty(target.shape, dtype=dtype)

        schema = f"softmax_focal_loss({_SOFTMAX}, float gamma, int ignore_index) -> (Tensor, Tensor)"
        self.forward = define(library, schema, fake, overload)
        schema = (
            f"softmax_focal_loss_backward(Tensor grad, {_SOFTMAX}, Tensor log_sum_exp, float gamma, "
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
    """Losses of rows. Saves the arguments and the log-sum-exp."""

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
        loss, log_sum_exp = kernels.forward(x, target, alpha, gamma, ignore_index)
        ctx.save_for_backward(x, target, alpha, log_sum_exp)
        ctx.options, ctx.kernels = (gamma, ignore_index), kernels
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, target, alpha, log_sum_exp = ctx.saved_tensors
        result: Tensor
        if _needs_formula(grad, x):
            result = reference.softmax_focal_loss_backward(grad, x, target, alpha, *ctx.options)
        else:
            result = ctx.kernels.backward(grad, x, target, alpha, log_sum_exp, *ctx.options)
        return result, None, None, None, None, None


_softmax = super(torch.autograd.Function, _Softmax).apply
"""`_Softmax.apply` without its wrapper in Python, which only transforms need."""


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
        one = x.new_ones(target.shape, dtype=_compute_dtype(x))
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
                return reference.softmax_focal_loss(x, target, alpha, gamma, ignore_index)[0]

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
        formula = _needs_formula(grad, x)
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
) -> Tensor:
    """Reduce `losses(x, target, alpha, weight, gamma, ignore_index, label_smoothing)` -> (N, S)."""
    x = _rows(inputs)
    target = _targets(targets, x)
    classes = not target.is_floating_point()
    dtype = _compute_dtype(x)
    of_class = alpha.to(dtype) if isinstance(alpha, Tensor) and alpha.dim() == 1 else None
    weight = None if weight is None else weight.to(dtype)
    loss = losses(x, target, of_class, weight, float(gamma), ignore_index, label_smoothing)
    if reduction == "none":
        loss = loss.reshape(
            targets.shape if classes else inputs.shape[:1] * (inputs.dim() > 1) + inputs.shape[2:]
        )
    elif reduction == "sum" or classes:
        loss = loss.sum()
        if reduction == "mean":
            valid = target != ignore_index
            if weight is None:
                loss = loss / valid.sum()
            else:
                loss = loss / weight[target.where(valid, 0)].where(valid, 0).sum()
    else:
        loss = loss.mean()
    if of_class is None and not (isinstance(alpha, (int, float)) and alpha == 1):
        loss = loss * alpha
    keep = inputs.dtype if not torch.is_autocast_enabled(inputs.device.type) else dtype
    return loss.to(keep)


def _kernel_losses(
    kernels: SoftmaxKernels,
    x: Tensor,
    target: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    gamma: float,
    ignore_index: int,
    _: float,
) -> Tensor:
    scale = weight if alpha is None else alpha if weight is None else alpha * weight
    return kernels(x, target, scale, gamma, ignore_index)


def _reference_losses(
    x: Tensor,
    target: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    gamma: float,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    if label_smoothing or target.is_floating_point():
        return reference.smoothed_focal_loss(x, target, alpha, weight, gamma, ignore_index, label_smoothing)
    scale = weight if alpha is None else alpha if weight is None else alpha * weight
    return reference.softmax_focal_loss(x, target, scale, gamma, ignore_index)[0]


def _aten_losses(
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
    if label_smoothing:
        reasons.append(f"label_smoothing is {label_smoothing}; our kernels have none")
    for name, value in (("alpha", alpha), ("weight", weight)):
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
    if torch.is_autocast_enabled(inputs.device.type):
        inputs, targets = reference.wide(inputs), reference.wide(targets)
    loss = losses(inputs, targets, float(alpha), float(gamma))
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


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
    ) -> None:
        self.run, self.why_not, self.kernels, self.targets = run, why_not, kernels, targets
        compiled, triton = kernels(LIBRARY), kernels(LIBRARY, "triton")
        ours = [
            Backend(key, partial(run, found), partial(why_not, key), partial(not_worth, key))
            for key, found in (("cuda", compiled), ("triton", triton), ("cpu", compiled))
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
    if message := _out_of_range(target, x.shape[1], ignore_index):  # the interpreter asserts nothing
        raise IndexError(f"nnfast::softmax_focal_loss.triton: {message}")
    return _in_triton("softmax_forward")(x, target, alpha, gamma, ignore_index)


def _softmax_backward(
    grad: Tensor, x: Tensor, target: Tensor, alpha: Tensor | None, _: Tensor, gamma: float, ignore_index: int
) -> Tensor:
    return reference.softmax_focal_loss_backward(grad, x, target, alpha, gamma, ignore_index)


SOFTMAX = FocalLoss(
    "softmax_focal_loss",
    lambda *args: partial(_kernel_losses, SoftmaxKernels(*args)),
    _run_softmax,
    {"aten": _aten_losses, "reference": _reference_losses},
    _softmax_why_not,
    _softmax_not_worth,
    lambda x: x.select(1, 0).long(),
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
implement("softmax_focal_loss", reference.softmax_focal_loss, _softmax_in_triton)
implement("softmax_focal_loss_backward", _softmax_backward, _in_triton("softmax_backward"))
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
    """Check the arguments and let the chosen backend run."""
    name = "nnfast.softmax_focal_loss"
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
        _check_per_class(name, "alpha", alpha, inputs, classes)
    if weight is not None:
        _check_per_class(name, "weight", weight, inputs, classes, number=False)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}; it needs to be within [0, 1]")
    args = (inputs, targets, alpha, gamma, weight, ignore_index, label_smoothing, reduction)
    if is_compiling():
        compiled: Tensor = SOFTMAX(*args)
        return compiled
    try:
        result: Tensor = SOFTMAX(*args)
    except Exception as error:  # each backend has its own
        if message := _out_of_range(targets, classes, ignore_index):
            raise IndexError(f"{name}: {message}") from error
        raise
    return result


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


def _check_per_class(
    name: str, argument: str, value: object, inputs: Tensor, classes: int, number: bool = True
) -> None:
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


def _out_of_range(targets: Tensor, classes: int, ignore_index: int) -> str:
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
        f"targets has class {int(flat[at])} at index {place}; inputs has {classes} classes "
        f"(ignore_index={ignore_index})"
    )
