"""The activations as operations: schemas, fakes, autograd, and who can serve.

Of each activation there are three opaque operators, and the same again as overload `triton`:

    nnfast::silu(Tensor x) -> Tensor
    nnfast::silu_(Tensor(a!) x) -> ()                        in place
    nnfast::silu_backward(Tensor grad, Tensor x) -> Tensor   gradient with respect to x

They are not differentiable themselves; `SILU` and `MISH`, which choose among them, are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from ..core import tuning
from ..core.op import Backend, Op, forced, forced_outside_compile
from ..core.operator import (
    LIBRARY,
    define,
    implement,
    place_why_not,
    plain_why_not,
    size_not_worth,
    traced,
    transformed,
)
from . import reference


@dataclass(frozen=True)
class Kernels:
    """The three operators of one activation on one backend, and its differentiable derivative."""

    forward: Callable[[Tensor], Tensor]
    forward_: Callable[[Tensor], None]
    backward: Callable[[Tensor, Tensor], Tensor]
    reference_backward: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def define(cls, library: torch.library.Library, name: str, overload: str = "") -> Kernels:
        """Give a library the schemas and fakes of an activation's operators."""
        forward, forward_, backward = (
            define(library, schema, fake, overload)
            for schema, fake in (
                (f"{name}(Tensor x) -> Tensor", torch.empty_like),
                (f"{name}_(Tensor(a!) x) -> ()", lambda x: None),
                (f"{name}_backward(Tensor grad, Tensor x) -> Tensor", lambda grad, x: torch.empty_like(x)),
            )
        )
        return cls(forward, forward_, backward, getattr(reference, f"{name}_backward"))

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """grad * activation'(x): by the kernel, or differentiable where that is asked for."""
        differentiable = torch.is_grad_enabled() and (grad.requires_grad or x.requires_grad)
        if differentiable or transformed():
            return self.reference_backward(grad, x)
        return self.backward(grad, x)


class _Activate(torch.autograd.Function):
    """y = activation(x). Saves x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x)
        return kernels.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.kernels.gradient(grad, x), None


_activate = super(torch.autograd.Function, _Activate).apply
"""`_Activate.apply` without its wrapper in Python, which only transforms need."""


class _ActivateTransformed(torch.autograd.Function):
    """The same under torch.func transforms and forward-mode differentiation, which need another form."""

    @staticmethod
    def forward(x: Tensor, kernels: Kernels) -> Tensor:
        return kernels.forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Kernels], output: Tensor) -> None:
        x, ctx.kernels = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    backward = _Activate.backward

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors
        kernels: Kernels = ctx.kernels
        return kernels.reference_backward(tangent, x)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, kernels: Kernels) -> tuple[Tensor, int]:
        return _ActivateTransformed.apply(x, kernels), in_dims[0]  # type: ignore[no-untyped-call]


class _ActivateInPlace(torch.autograd.Function):
    """x = activation(x). Saves a copy of the x that is overwritten, as torch does.

    The copy is made outside, with autograd, so that double backward finds its way through it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, original: Tensor, kernels: Kernels) -> Tensor:
        ctx.kernels = kernels
        ctx.mark_dirty(x)
        ctx.save_for_backward(original)
        kernels.forward_(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (original,) = ctx.saved_tensors
        return ctx.kernels.gradient(grad, original), None, None


def run(kernels: Kernels, x: Tensor, inplace: bool = False) -> Tensor:
    """Run an activation's operators on x, with whatever differentiation asks for."""
    differentiate = x.requires_grad and torch.is_grad_enabled()
    result = x
    if inplace and differentiate:
        result = _ActivateInPlace.apply(x, x.clone(), kernels)  # type: ignore[no-untyped-call]
    elif inplace:
        kernels.forward_(x)
        torch.autograd.graph.increment_version(x)
    elif transformed():
        result = _ActivateTransformed.apply(x, kernels)  # type: ignore[no-untyped-call]
    elif differentiate:
        result = (_Activate.apply if is_compiling() else _activate)(x, kernels)  # type: ignore[no-untyped-call]
    else:
        result = kernels.forward(x)
    return result


def _run_reference(formula: Callable[[Tensor], Tensor], x: Tensor, inplace: bool = False) -> Tensor:
    return x.copy_(formula(x.clone())) if inplace else formula(x)


def _run_aten(function: Callable[..., Tensor], x: Tensor, inplace: bool = False) -> Tensor:
    return function(x, inplace=inplace)


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense.default(x)


def kernel_why_not(x: Tensor, inplace: bool) -> list[str]:
    """What none of our kernels takes."""
    reasons = plain_why_not("x", x)
    if inplace and not reasons:
        if not _dense(x):
            reasons.append("in place on a view with gaps or overlaps")
        if transformed():
            reasons.append("in place under a torch.func transform or forward-mode differentiation")
        elif x._is_view() and x.requires_grad and torch.is_grad_enabled():
            reasons.append("in place on a view that requires grad")
    return reasons


def _not_worth(name: str, backend: str, x: Tensor, inplace: bool = False) -> list[str]:
    reasons = size_not_worth(name, backend, x)
    if not inplace and not _dense(x):
        reasons.append("x has gaps or overlaps: torch's own kernel reads it in one pass, ours after a copy")
    return reasons


def _why_not(name: str, backend: str, x: Tensor, inplace: bool = False) -> list[str]:
    return place_why_not(name, backend, "x", x) + kernel_why_not(x, inplace)


def _aten_why_not(name: str, x: Tensor, inplace: bool = False) -> list[str]:
    if x.is_floating_point() or (x.is_complex() and name == "silu"):
        return []
    return [f"x has dtype {x.dtype}; {name} needs a floating-point{' or complex' * (name == 'silu')} one"]


def _implement(name: str) -> None:
    """The reference as fallback of every device, and Triton; what is compiled registers itself."""
    formula, derivative = getattr(reference, name), getattr(reference, f"{name}_backward")

    def formula_(x: Tensor) -> None:
        x.copy_(formula(x))

    def call(function: str, *tensors: Tensor) -> Any:
        from . import kernels  # imports triton

        return getattr(kernels, function)(name, *tensors)

    for operator, fallback, function in (
        (name, formula, "forward"),
        (f"{name}_", formula_, "forward_"),
        (f"{name}_backward", derivative, "backward"),
    ):
        implement(operator, fallback, partial(call, function))


class Activation(Op):
    """An activation with torch's own function of it.

    Attributes:
        function: torch's function, `function(x, inplace)`.
        builtin, builtin_: the same below Python, `builtin(x)`, and in place.
        least: fewest elements for which it is worth asking who serves, without and with a gradient.
    """

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.least = tuning.smallest(name), tuning.smallest(name, grad=True)
        self.builtin: Callable[[Tensor], Tensor]
        self.builtin_: Callable[[Tensor], Tensor]
        self.builtin, self.builtin_ = (getattr(torch._C._nn, f"{name}{end}") for end in ("", "_"))
        compiled, triton = Kernels.define(LIBRARY, name), Kernels.define(LIBRARY, name, "triton")
        self.kernels = {"cuda": compiled, "triton": triton, "cpu": compiled}
        _implement(name)
        ours = [
            Backend(key, partial(run, kernels), partial(_why_not, name, key), partial(_not_worth, name, key))
            for key, kernels in self.kernels.items()
        ]
        formula = getattr(reference, name)
        theirs = {"aten": partial(_run_aten, function), "reference": partial(_run_reference, formula)}
        why_not = partial(_aten_why_not, name)
        super().__init__(name, ours + [Backend(key, run_it, why_not) for key, run_it in theirs.items()])

    def compiled_in(self, library: torch.library.Library) -> Backend:
        """The `cuda` backend with the operators of another library, on any device."""
        kernels = Kernels.define(library, self.name)
        return Backend("cuda", partial(run, kernels), lambda x, inplace=False: kernel_why_not(x, inplace))


def small_first(op: Activation) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorates a function(x, inplace): small plain tensors take torch's own at once, below Python.

    Every check is paid for there: 1024 elements take torch a microsecond. torch.compile sees the function
    alone, and so do exports, whose tensors are no plain ones.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        builtin, builtin_, least = op.builtin, op.builtin_, op.least
        lowest = min(least)

        @functools.wraps(function)
        def call(input: Tensor, inplace: bool = False) -> Tensor:
            if (
                type(input) is Tensor
                and not is_dynamo_compiling()
                and forced_outside_compile() is None
                and ((n := input.numel()) < lowest or (n < least[input.requires_grad] and not traced()))
            ):
                try:
                    if not inplace:
                        return builtin(input)
                    if not (input.requires_grad and input.is_leaf):
                        return builtin_(input)
                except NotImplementedError:  # a dtype: what is needed is said by `function`
                    pass
            return function(input, inplace)

        return call

    return decorate


def activate(op: Activation, x: Tensor, inplace: bool) -> Tensor:
    """Check the arguments and let the chosen backend run.

    Subclasses and torch.compile take torch's own at once; `op.explain` gives that answer with its reasons.
    """
    if is_compiling() and forced() is None:
        return op.function(x, inplace)
    if type(x) is not Tensor:
        if torch.overrides.has_torch_function_unary(x) and forced() in (None, "aten"):
            return op.function(x, inplace)
        if not isinstance(x, Tensor):
            raise TypeError(f"nnfast.{op.name}: x is a {type(x).__name__}; it needs a torch.Tensor")
    if reasons := _aten_why_not(op.name, x):
        raise NotImplementedError(f"nnfast.{op.name}: {reasons[0]}")
    if inplace and x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise RuntimeError(
            f"nnfast.{op.name}: x is a leaf that requires grad, so it cannot be changed in place; "
            "pass inplace=False, or a tensor computed from it"
        )
    result: Tensor = op(x, inplace=True) if inplace else op(x)
    return result


SILU = Activation("silu", F.silu)
MISH = Activation("mish", F.mish)
