"""Convolution with a prologue and an epilogue as one operation: schemas, fakes, autograd, and who can serve.

    a = prologue_act((x - center) * scale + shift),  z = conv2d(a, weight) + bias + residual,  y = act(z)

Three opaque operators, and the same again as overloads `triton` and `cpu`:

    nnfast::conv2d_act(x, weight, bias, residual, *prologue, stride, padding, act, slope, with_statistics)
        -> (y, statistics)
    nnfast::conv2d_act_input_gradient(grad, y, weight, added, x, *prologue, size, ..., scaled)
        -> (dx, sum of dz, sum of dz * (x - center))
    nnfast::conv2d_act_weight_gradient(grad, y, x, *prologue, kernel, ..., with_bias) -> (dweight, dbias)

x: (N, C, H, W), channels last. statistics: (3, parts, O): count, mean and sum of squared deviations of y in
parts of its pixels, which batch norms merge. (C,) and (O,) tensors are in the compute type.

Saved for backward, of tensors as large as x or y: x, and y where act is not the identity; a is made again.
Where act's derivative cannot be told from y, as silu's, act is torch's in training.

The operators are not differentiable; `CONV2D_ACT` is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from ..activation.reference import ACTIVATIONS, IDENTITY, LEAKY_RELU, RELU, act_backward
from ..activation.reference import act as activated
from ..core import tuning
from ..core.op import Backend, Op, forced, forced_outside_compile
from ..core.operator import (
    LIBRARY,
    by_formula,
    compute_dtype,
    convolved_size,
    define,
    implement,
    place_why_not,
    plain_why_not,
    size_not_worth,
    transformed,
)
from . import reference, winograd

NAME = "conv2d_act"

LARGEST_KERNEL = 7


class Prologue(NamedTuple):
    """What is done to the input before it is padded and convolved: act((x - center) * scale + shift).

    Attributes:
        scale: (C,).
        shift: (C,).
        act: code of the activation.
        slope: leaky_relu's.
        center: (C,) or None: what is taken away first, for digits that scale and shift alone would lose.
    """

    scale: Tensor
    shift: Tensor
    act: int = IDENTITY
    slope: float = 0.01
    center: Tensor | None = None

    def __repr__(self) -> str:
        return f"prologue of {len(self.scale)} channels"


_PROLOGUE = "Tensor? center, Tensor? scale, Tensor? shift, int prologue, float prologue_slope"
_TAIL = "int[] stride, int[] padding, int act, float slope"


def _channels_last(x: Tensor, size: Sequence[Any]) -> Tensor:
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_forward(overload: str, x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    stride, padding, with_statistics = args[7], args[8], args[-1]
    size, dtype = convolved_size(x.shape, weight.shape, stride, padding), compute_dtype(x)
    y = _channels_last(x, size)
    if not with_statistics:
        return y, x.new_empty(0, dtype=dtype)
    parts = 1
    if overload == "triton":
        parts = _in_triton("plan")(x, weight, stride, padding).parts
    return y, x.new_empty((3, parts, weight.shape[0]), dtype=dtype)


def _fake_input_gradient(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    scale, size = args[5], args[9]
    sums = grad.new_empty(0 if scale is None else size[1], dtype=compute_dtype(grad))
    return _channels_last(grad, size), sums, torch.empty_like(sums)


def _fake_weight_gradient(grad: Tensor, y: Tensor | None, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    kernel, with_bias = args[5], args[-1]
    dweight = x.new_empty(grad.shape[1], *kernel, x.shape[1]).permute(0, 3, 1, 2)
    return dweight, x.new_empty(grad.shape[1] if with_bias else 0, dtype=compute_dtype(x))


class Kernels:
    """The three operators on one backend."""

    def __init__(self, library: torch.library.Library, overload: str = "") -> None:
        self.forward, self.input_gradient, self.weight_gradient = (
            define(library, f"{NAME}{schema}", fake, overload)
            for schema, fake in (
                (
                    f"(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, {_PROLOGUE}, {_TAIL}, "
                    "bool with_statistics) -> (Tensor, Tensor)",
                    partial(_fake_forward, overload),
                ),
                (
                    f"_input_gradient(Tensor grad, Tensor? y, Tensor weight, Tensor? added, Tensor? x, "
                    f"{_PROLOGUE}, SymInt[] size, {_TAIL}, bool scaled) -> (Tensor, Tensor, Tensor)",
                    _fake_input_gradient,
                ),
                (
                    f"_weight_gradient(Tensor grad, Tensor? y, Tensor x, {_PROLOGUE}, int[] kernel, {_TAIL}, "
                    "bool with_bias) -> (Tensor, Tensor)",
                    _fake_weight_gradient,
                ),
            )
        )


def _in_triton(function: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        from . import kernels  # imports triton

        return getattr(kernels, function)(*args)

    return call


class Options(NamedTuple):
    """What is not a tensor of a convolution."""

    prologue: int
    prologue_slope: float
    stride: list[int]
    padding: list[int]
    act: int
    slope: float


def wide(value: Tensor | None, x: Tensor) -> Tensor | None:
    """A (C,) tensor as operators take it."""
    return None if value is None else value.to(compute_dtype(x)).contiguous()


class _Conv2dAct(torch.autograd.Function):
    """y, its statistics, which are not differentiable, and, through, x again: a gradient that comes to it is
    added as x's own is written. What it saves is said at the top.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        center: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        options: Options,
        kernels: Kernels,
        with_statistics: bool,
        through: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        vectors = [wide(t, x) for t in (bias, center, scale, shift)]
        y, statistics = kernels.forward(
            x, weight, vectors[0], residual, *vectors[1:], *options, with_statistics
        )
        ctx.options, ctx.kernels = options, kernels
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x, weight, center, scale, shift, None if options.act == IDENTITY else y)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return y, statistics, x.view_as(x) if through else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None, added: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return added, *[None] * 10
        saved = ctx.saved_tensors
        gradients = _gradients_by_formula if by_formula(grad, added, *saved) else _gradients
        return *gradients(ctx, grad, added, *saved), *[None] * 4


Gradients = tuple[Tensor | None, ...]


def _gradients(
    ctx: Any,
    grad: Tensor,
    added: Tensor | None,
    x: Tensor,
    weight: Tensor,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor | None,
) -> Gradients:
    """By the operators: of x, weight, bias, residual, center, scale and shift."""
    options, kernels = ctx.options, ctx.kernels
    need_x, need_weight, need_bias, need_residual, *need_prologue = ctx.needs_input_grad[:7]
    dresidual = None
    if need_residual:
        if y is not None:
            grad = act_backward(grad, y, options.act, options.slope)
            y, options = None, options._replace(act=IDENTITY)
        dresidual = grad
    prologue = (*(wide(t, x) for t in (center, scale, shift)), *options[:2])
    tail = options[2:]
    dx = sum_dz = sum_dz_x = dweight = dbias = None
    if need_x or any(need_prologue):
        of_prologue = (x if scale is not None else None, *prologue)
        dx, sum_dz, sum_dz_x = kernels.input_gradient(
            grad, y, weight, added, *of_prologue, list(x.shape), *tail, True
        )
    if need_weight or need_bias:
        dweight, dbias = kernels.weight_gradient(
            grad, y, x, *prologue, list(weight.shape[2:]), *tail, need_bias
        )
    need_center, need_scale, need_shift = need_prologue
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias.to(ctx.bias_dtype) if need_bias else None,  # type: ignore[union-attr]
        dresidual,
        (-prologue[1] * sum_dz).to(center.dtype) if need_center else None,  # type: ignore[union-attr]
        sum_dz_x.to(scale.dtype) if need_scale else None,  # type: ignore[union-attr]
        sum_dz.to(shift.dtype) if need_shift else None,  # type: ignore[union-attr]
    )


def _gradients_by_formula(
    ctx: Any,
    grad: Tensor,
    added: Tensor | None,
    x: Tensor,
    weight: Tensor,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor | None,
) -> Gradients:
    """The same, differentiable: the gradients of the reference."""
    options = ctx.options
    needs = ctx.needs_input_grad[:7]
    bias = residual = None  # z needs neither, their gradients do
    if needs[2]:
        bias = torch.zeros(weight.shape[0], dtype=ctx.bias_dtype, device=x.device, requires_grad=True)
    if needs[3]:
        residual = torch.zeros_like(grad, requires_grad=True)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        places: list[Any] = [
            None if t is None else t.view_as(t) for t in (x, weight, bias, residual, center, scale, shift)
        ]
        z = reference.convolve(*places, *options[:4])
        if y is not None:
            below = z * options.slope if options.act == LEAKY_RELU else 0
            z = torch.where(y > 0 if options.act == LEAKY_RELU else ~(y <= 0), z, below)
        wanted = [p for p, need in zip(places, needs, strict=True) if need]
        found = iter(torch.autograd.grad(z.to(x.dtype), wanted, grad, create_graph=create_graph))
    dx, *others = (next(found) if need else None for need in needs)
    return dx if dx is None or added is None else dx + added, *others


def with_statistics(
    kernels: Kernels, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """conv2d(x, weight), its statistics, which are not differentiable, and x.

    Who else uses x takes that one: its gradient is added in the convolution's, without a pass of its own.
    """
    options = Options(IDENTITY, 0.0, list(stride), list(padding), IDENTITY, 0.0)
    through = x.requires_grad and torch.is_grad_enabled()
    arguments = (x, weight, *[None] * 5, options, kernels, True, through)
    y, statistics, again = _Conv2dAct.apply(*arguments)  # type: ignore[no-untyped-call]
    return y, statistics, again if through else x


def plain_convolution(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Any,
) -> Tensor:
    """conv2d(x, weight, bias), differentiable where anything asks for a gradient."""
    return run(kernels, x, weight, bias, None, None, stride, padding)


def plain_gradients(
    kernels: Kernels,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Its gradients of x and weight, as far as they are needed."""
    none = (None, None, None, IDENTITY, 0.0)
    tail = (list(stride), list(padding), IDENTITY, 0.0)
    dx = dweight = None
    if needs[0]:
        dx = kernels.input_gradient(grad, None, weight, None, None, *none, list(x.shape), *tail, True)[0]
    if needs[1]:
        dweight = kernels.weight_gradient(grad, None, x, *none, list(weight.shape[2:]), *tail, False)[0]
    return dx, dweight


def _told_from_result(act: int, slope: float) -> bool:
    """act's derivative can be told from its result."""
    return act in (IDENTITY, RELU) or (act == LEAKY_RELU and slope >= 0)


def run(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    prologue: Prologue | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    act: int = IDENTITY,
    slope: float = 0.01,
) -> Tensor:
    """Run a backend's operators, with whatever differentiation asks for."""
    before = (None, None, None) if prologue is None else (prologue.center, *prologue[:2])
    tensors = (x, weight, bias, residual, *before)
    of_prologue = (IDENTITY, 0.01) if prologue is None else prologue[2:4]
    differentiates = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    later = differentiates and not _told_from_result(act, slope)
    options = Options(*of_prologue, list(stride), list(padding), IDENTITY if later else act, slope)
    if differentiates:
        y: Tensor = _Conv2dAct.apply(*tensors, options, kernels, False, False)[0]  # type: ignore[no-untyped-call]
    else:
        vectors = [wide(t, x) for t in (bias, *before)]
        y = kernels.forward(x, weight, vectors[0], residual, *vectors[1:], *options, False)[0]
    return activated(y, act, slope) if later else y


def _run_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    prologue: Prologue | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    act: int = IDENTITY,
    slope: float = 0.01,
) -> Tensor:
    center, scale, shift = (None, None, None) if prologue is None else (prologue.center, *prologue[:2])
    code, of_prologue = (IDENTITY, 0.01) if prologue is None else prologue[2:4]
    before = (center, scale, shift, code, of_prologue)
    z = reference.convolve(x, weight, bias, residual, *before, stride, padding, dilation, groups)
    return activated(z, act, slope).to(x.dtype)


def _run_aten(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    prologue: Prologue | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    act: int = IDENTITY,
    slope: float = 0.01,
) -> Tensor:
    """torch's own, one after another."""
    if prologue is not None:
        z = reference.prologue_argument(x, prologue.center, prologue.scale, prologue.shift)[1]
        x = activated(z, prologue.act, prologue.slope).to(x.dtype)
    own_bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight, own_bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    return activated(y if residual is None else y + residual, act, slope)


def _why_not(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    prologue: Prologue | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    *_: Any,
) -> list[str]:
    reasons = place_why_not(winograd.NAME if backend == "cpu" else NAME, backend, "x", x)
    tensors = {"x": x, "weight": weight, "residual": residual}
    for name, tensor in tensors.items():
        if tensor is not None:
            reasons += plain_why_not(name, tensor)
            if tensor.dtype != x.dtype:
                reasons.append(f"{name} has dtype {tensor.dtype}; our kernels need that of x, {x.dtype}")
    if groups != 1:
        reasons.append(f"groups is {groups}; our kernels have 1")
    if tuple(dilation) != (1, 1):
        reasons.append(f"dilation is {tuple(dilation)}; our kernels have 1")
    kernel = tuple(weight.shape[2:])
    if backend == "cpu":
        reasons += winograd.why_not(x.dtype, kernel, stride, padding)
    elif max(kernel) > LARGEST_KERNEL:
        reasons.append(f"the kernel is {kernel[0]}x{kernel[1]}; ours go to {LARGEST_KERNEL}x{LARGEST_KERNEL}")
    elif not set(stride) <= {1, 2}:
        reasons.append(f"stride is {tuple(stride)}; our kernels have 1 and 2")
    if not x.is_contiguous(memory_format=torch.channels_last):
        reasons.append("x is not laid out in torch.channels_last")
    size = convolved_size(x.shape, weight.shape, stride, padding)
    pixels = x.shape[0] * max(x.shape[2] * x.shape[3], size[2] * size[3])
    if not x.numel() or not weight.numel():
        reasons.append("x or weight is empty")
    elif min(size) < 1:
        reasons.append("x is smaller than the kernel")
    elif pixels >= 1 << 31:
        reasons.append(f"{pixels} pixels; our kernels count to {(1 << 31) - 1}")
    if transformed():
        reasons.append("a torch.func transform or forward-mode differentiation; our kernels know none")
    return reasons


def _not_worth(backend: str, x: Tensor, weight: Tensor, *_: Any) -> list[str]:
    if backend == "cpu":
        return winograd.not_worth(x, weight)
    return size_not_worth(NAME, backend, x)


class Conv2dActOp(Op):
    """The operation; called with (x, weight, bias, residual, prologue, stride, ..., act, slope), checked."""

    def __init__(self) -> None:
        self.least = tuning.smallest(NAME)
        Kernels(LIBRARY)
        self.kernels = Kernels(LIBRARY, "triton")
        self.on_cpu = Kernels(LIBRARY, "cpu")
        for operator, function in (
            (NAME, "forward"),
            (f"{NAME}_input_gradient", "input_gradient"),
            (f"{NAME}_weight_gradient", "weight_gradient"),
        ):
            implement(operator, getattr(reference, function), _in_triton(function))
            LIBRARY.impl(f"{operator}.cpu", getattr(winograd, function), "CPU")
        ours = [
            Backend(name, partial(run, kernels), partial(_why_not, name), partial(_not_worth, name))
            for name, kernels in (("triton", self.kernels), ("cpu", self.on_cpu))
        ]
        super().__init__(NAME, [*ours, Backend("aten", _run_aten), Backend("reference", _run_reference)])

    def example(self, device: str) -> tuple[Any, ...]:
        """A 3x3 convolution of 64 channels."""
        x = torch.empty(32, 64, 56, 56, device=device).contiguous(memory_format=torch.channels_last)
        return x, x.new_empty(64, 64, 3, 3), None, None, None, (1, 1), (1, 1)

    def ours(self, *args: Any) -> Kernels | None:
        """Our operators, if they are the choice; a call that they cannot serve is torch's, forced or not."""
        name = forced()
        for backend, kernels in zip(self.backends, (self.kernels, self.on_cpu), strict=False):
            if name not in (None, backend.name) or backend.why_not(*args):
                continue
            if name or not backend.not_worth(*args):
                return kernels
        return None


CONV2D_ACT = Conv2dActOp()


def conv2d_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    prologue: Prologue | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: int,
    slope: float,
) -> Tensor:
    """Let the chosen backend run what `check` has found right."""
    arguments = (x, weight, bias, residual, prologue, stride, padding, dilation, groups, act, slope)
    if is_compiling() and forced() is None:
        return _run_aten(*arguments)
    result: Tensor = CONV2D_ACT(*arguments)
    return result


def at_once(
    input: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    act: Any,
    slope: Any,
) -> Tensor | None:
    """What torch gives for a plain call that is too small for ours; None for all others, and wrong ones.

    On small images our own checks take as long as the convolution, and torch checks the same.
    """
    if (
        is_compiling()
        or type(input) is not Tensor
        or not (type(weight) is Tensor or type(weight) is torch.nn.Parameter)
        or not winograd.small(input, weight)
        or forced_outside_compile() is not None
        or torch.is_autocast_enabled("cpu")
        or type(act) is not str
        or act not in ACTIVATIONS
        or not (residual is None or type(residual) is Tensor)
        or not _are_pairs(stride, padding, dilation)
    ):
        return None
    try:
        y = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    except (RuntimeError, TypeError):  # what is needed is said by `check`
        return None
    if residual is not None:
        if residual.shape != y.shape or residual.dtype != y.dtype or not residual.is_cpu:
            return None
        y = y + residual  # not in place: vmap may batch one of them alone
    code = ACTIVATIONS[act]
    return y.relu_() if code == RELU else activated(y, code, slope)


def _are_pairs(*values: Any) -> bool:
    for value in values:  # all() takes four times as long
        if type(value) is not int and not (type(value) is tuple and len(value) == 2):
            return False
    return True


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    prologue: Prologue | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Raise what is wrong with a call."""
    for name, tensor in (("input", x), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"nnfast.{NAME}: {name} is a {type(tensor).__name__}; it needs a torch.Tensor")
        if tensor.dim() != 4:
            needed = "(N, C, H, W)" if name == "input" else "(O, C / groups, kH, kW)"
            raise ValueError(f"nnfast.{NAME}: {name} has shape {list(tensor.shape)}; it needs {needed}")
    if not x.is_floating_point():
        raise NotImplementedError(f"nnfast.{NAME}: input has dtype {x.dtype}; it needs a floating-point one")
    for name, device in (("weight", weight.device), ("bias", None if bias is None else bias.device)):
        if device is not None and device != x.device:
            raise ValueError(f"nnfast.{NAME}: {name} is on {device}; it needs to be on {x.device} as input")
    if weight.dtype != x.dtype:
        raise ValueError(f"nnfast.{NAME}: weight has dtype {weight.dtype}; it needs that of input, {x.dtype}")
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if min(values) < least:
            raise ValueError(f"nnfast.{NAME}: {name} is {tuple(values)}; it needs to be {least} at least")
    channels = weight.shape[1] * groups
    if groups < 1 or x.shape[1] != channels or weight.shape[0] % groups:
        raise ValueError(
            f"nnfast.{NAME}: input has {x.shape[1]} channels; weight {list(weight.shape)} in {groups} groups "
            f"needs {channels}, and as many groups of results"
        )
    _check_vector("bias", bias, weight.shape[0], "the result")
    if prologue is not None:
        for name in ("scale", "shift", "center"):
            value = getattr(prologue, name)
            if value is None and name != "center":
                raise TypeError(f"nnfast.{NAME}: prologue's {name} is None; it needs a torch.Tensor")
            _check_vector(f"prologue's {name}", value, x.shape[1], "input")
    extent = [dilation[i] * (weight.shape[i + 2] - 1) + 1 for i in (0, 1)]
    size = convolved_size(x.shape, (weight.shape[0], 0, *extent), stride, padding)
    if min(size[2:]) < 1:
        raise ValueError(
            f"nnfast.{NAME}: input of {list(x.shape[2:])} pixels is smaller than the kernel, {extent}"
        )
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"nnfast.{NAME}: residual is a {type(residual).__name__}; it needs a torch.Tensor")
    wanted: dict[str, Any] = {"shape": size, "dtype": x.dtype, "device": x.device}
    for what, needed in wanted.items():
        found = list(residual.shape) if what == "shape" else getattr(residual, what)
        if found != needed:
            raise ValueError(f"nnfast.{NAME}: residual has {what} {found}; it needs {needed}")


def _check_vector(name: str, value: Any, channels: int, whose: str) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"nnfast.{NAME}: {name} is a {type(value).__name__}; it needs a torch.Tensor")
    if value.shape != (channels,):
        raise ValueError(
            f"nnfast.{NAME}: {name} has shape {list(value.shape)}; {whose} has {channels} channels and "
            f"needs [{channels}]"
        )
