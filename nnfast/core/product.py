"""Matrix products on the CPU, ours where the library that torch calls leaves much of the processor idle.

    nnfast::product_(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias, bool add) -> ()

a: (M, K) and b: (K, N) at any strides. out: (M, N), of rows without gaps, becomes a b, with a bias (N,) added
to each row, or with what it was.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import extension, tuning
from .op import constant, forced
from .operator import LIBRARY, autocasts, by_formula, define, requires_grad, traced, transformed
from .snapshot import unwatched


def _fake(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, add: bool) -> None:
    """Nothing."""


def torchs_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, add: bool) -> None:
    """`into` by torch's products."""
    if add:
        torch.addmm(out, a, b, out=out)
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


into = define(LIBRARY, "product_(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias, bool add) -> ()", _fake)
LIBRARY.impl("product_", torchs_into, "CompositeExplicitAutograd")


@constant
def missing() -> str:
    """Why this process's products are all torch's; "" if large ones are ours."""
    if why := extension.why_not("product_", "CPU"):
        return why
    pay = extension.function("nnfast_products_pay")
    if pay is None or not pay():
        return "measured to be faster on AMD processors with AVX2 and without AVX-512 alone"
    return ""


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str:
    """Why `linear` of these is torch's; "" if it is ours. Computes nothing.

    Args:
        x: (..., K), of any dtype, on any device.
        weight: (N, K), likewise.
        bias: (N,), likewise, or None.

    Returns:
        The first reason, in words.
    """
    given = (x, weight) if bias is None else (x, weight, bias)
    if any(type(t) is not Tensor and type(t) is not nn.Parameter for t in given):
        return "an input is no plain tensor"
    if not all(t.is_cpu for t in given):
        return "an input is not on the CPU"
    if is_compiling() or transformed() or traced() or autocasts(x):
        return "what is done to x is compiled, recorded, transformed or cast"
    if any(t.dtype != torch.float32 for t in given):
        return f"ours are of torch.float32; x has dtype {x.dtype}, the weight {weight.dtype}"
    if forced() not in (None, "cpu"):
        return f"{forced()!r} is forced"
    count, least = x.numel() * weight.shape[0], tuning.PRODUCT * torch.get_num_threads()
    if count < least or x.numel() < tuning.PRODUCT_ROWS * weight.shape[-1]:
        return f"{count} multiplications; measured to pay from {least} on, of {tuning.PRODUCT_ROWS} rows"
    if any(t.layout is not torch.strided or t.is_nested for t in given):
        return "an input is sparse or nested"
    size = weight.shape
    if x.dim() < 2 or size[1:] != x.shape[-1:] or (bias is not None and bias.shape != size[:1]):
        shapes = ", ".join(str(list(t.shape)) for t in given)
        return f"shapes {shapes}; ours are of (..., K), (N, K) and (N,), others torch's to take or refuse"
    return missing()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b, plus bias, without gradients; ours, whatever it is worth.

    Args:
        a: (M, K), in float32 or float64, at any strides.
        b: (K, N), likewise, of a's dtype.
        bias: (N,), likewise, or None.

    Returns:
        (M, N), in a's dtype.

    Raises:
        RuntimeError: for other shapes or dtypes.
    """
    out = a.new_empty(a.shape[0], b.shape[1])
    into(out, a, b, bias, False)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, by our products where `why_not` knows no reason against it; differentiable, again as well.

    Args:
        x: (..., K), of any dtype that F.linear takes; ours are of float32.
        weight: (N, K), in x's dtype.
        bias: (N,), likewise, or None.

    Returns:
        (..., N), in x's dtype, or autocast's.

    Raises:
        RuntimeError: for shapes or dtypes that do not fit together.
    """
    if why_not(x, weight, bias):
        return F.linear(x, weight, bias)
    if requires_grad(x, weight, bias):
        result: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return _linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])  # no view, which autograd lets nobody write to
    into(y.flatten(0, -2), x.flatten(0, -2), weight.t(), bias, False)
    return y


def applied(module: nn.Module, x: Tensor) -> Tensor:
    """module(x); of an nn.Linear itself, whose calls nobody watches, what `linear` gives.

    Args:
        module: any that takes one tensor.
        x: (..., in_features) for an nn.Linear, as `linear` takes it.

    Returns:
        (..., out_features), or what another module returns.

    Raises:
        RuntimeError: as `linear` does, or what another module raises.
    """
    if type(module) is not nn.Linear or not unwatched(module):
        result: Tensor = module(x)
        return result
    return linear(x, module.weight, module.bias)


class _Linear(torch.autograd.Function):
    """F.linear. Saves x if the weight needs a gradient and the weight if x does: what is not may change."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.shape = x.shape
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        multiply = torch.mm if by_formula(grad, x, weight) else product
        return (
            None if weight is None else multiply(rows, weight).view(ctx.shape),
            None if x is None else multiply(rows.t(), x.reshape(-1, x.shape[-1])),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )
