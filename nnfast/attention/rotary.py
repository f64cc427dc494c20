"""Rotary embedding as an operation: schema, fake, autograd, and who can serve.

One opaque operator, and the same again as overload `triton`:

    nnfast::rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor

x: (N, H, L, D); cos, sin: (N, H, L, R) or 1 in place of N, H and L, in float32, or float64 for float64. The
result is laid out as `torch.empty_like(x)`. Its gradient is the same with -sin. `ROTARY`, which chooses among
the backends, takes any (..., L, D) and is differentiable in x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..core.op import Backend, Op, forced
from ..core.operator import (
    LIBRARY,
    by_formula,
    define,
    implement,
    place_why_not,
    plain_why_not,
    requires_grad,
    size_not_worth,
    transformed,
)
from . import reference

_SCHEMA = "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor"
COMPILED, TRITON = (
    define(LIBRARY, _SCHEMA, lambda x, *_: torch.empty_like(x), overload) for overload in ("", "triton")
)


def _fallback(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x).copy_(reference.rotary(x, *rest))


def _in_triton(*args: Any) -> Tensor:
    from . import kernels  # imports triton

    return kernels.rotary(*args)


implement("rotary", _fallback, _in_triton)


class _Rotate(torch.autograd.Function):
    """x turned. Saves cosines and sines alone."""

    @staticmethod
    def forward(
        ctx: Any, operator: Callable[..., Tensor], x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.operator, ctx.interleaved = operator, interleaved
        return operator(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        rotate = reference.rotary if by_formula(grad) else ctx.operator
        return None, rotate(grad, cos, -sin, ctx.interleaved), None, None, None


_rotate = super(torch.autograd.Function, _Rotate).apply
"""`_Rotate.apply` without its wrapper in Python, which only transforms need."""


def _run(operator: Callable[..., Tensor], x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    four = x
    if x.dim() > 4:
        four, cos, sin = (t.expand(*x.shape[:-1], t.shape[-1]).flatten(0, -4) for t in (x, cos, sin))
    four, cos, sin = (t if t.dim() == 4 else t[(None,) * (4 - t.dim())] for t in (four, cos, sin))
    if torch.is_grad_enabled() and x.requires_grad:
        apply = _Rotate.apply if is_compiling() else _rotate
        y: Tensor = apply(operator, four, cos, sin, interleaved)  # type: ignore[no-untyped-call]
    else:
        y = operator(four, cos, sin, interleaved)
    return y if four is x else y.view(x.shape)


def _why_not(backend: str, x: Tensor, cos: Tensor, *_: Any) -> list[str]:
    reasons = place_why_not("rotary", backend, "x", x) + plain_why_not("x", x)
    if requires_grad(cos):
        reasons.append("positions require grad; our kernels give none")
    if transformed():
        reasons.append("a torch.func transform or forward-mode differentiation is active")
    return reasons


def _not_worth(backend: str, x: Tensor, *_: Any) -> list[str]:
    return size_not_worth("rotary", backend, x)


class Rotary(Op):
    """Rotary embedding; called with x, cosines, sines and whether pairs are neighbours."""

    def __init__(self) -> None:
        ours = [
            Backend(name, partial(_run, operator), partial(_why_not, name), partial(_not_worth, name))
            for name, operator in (("triton", TRITON), ("cpu", COMPILED))
        ]
        super().__init__(
            "rotary", [*ours, Backend("aten", reference.rotary), Backend("reference", reference.rotary)]
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the chosen backend; under torch.compile torch's own operations, so that Inductor fuses them."""
        if (is_compiling() and forced() is None) or not args[0].numel():
            return reference.rotary(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def example(self, device: str) -> tuple[Any, ...]:
        """Sixteen heads of 64 over 1024 places."""
        cos, sin = torch.empty(2, 1024, 32, device=device)
        return torch.empty(8, 16, 1024, 64, device=device), cos, sin, False


ROTARY = Rotary()
