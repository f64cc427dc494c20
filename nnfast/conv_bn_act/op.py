"""Batch norm + residual + activation as one operation: schemas, fakes, autograd, and who can serve.

A batch norm is (mean, var, weight, bias, eps): mean and biased variance of the batch, or the running
statistics; z = (x - mean) / sqrt(var + eps) * weight + bias, plus the residual or the residual's own batch
norm; y = act(z). Five opaque operators, and the same again as overload `triton`:

    nnfast::batch_norm_stats(x) -> (mean, var)
    nnfast::batch_norm_update_(running_mean, running_var, mean, var, offset, correction, momentum)
    nnfast::batch_norm_act(x, *norm, residual, *residual_norm, act, slope, with_mask) -> (y, mask)
    nnfast::batch_norm_act_sums(grad, x, ..., mask, act, slope, with_dz) -> (three sums, dz)
    nnfast::batch_norm_act_backward(grad, x, ..., *sums, count) -> (dx, dresidual)

x: (N, C, *spatial), contiguous or with channels innermost; every (C,) tensor in the compute type: float64 for
float64 x, else float32. mask holds a bit for each element, z > 0, in rows of x's memory.

Saved for backward, of tensors as large as x:
    no residual                         x
    residual, identity                  x
    residual, relu or leaky_relu        x and a bit for each element
    residual, silu or mish              x and the residual
    residual with its own batch norm    x and the residual
From these z is computed again. torch saves x and y, and with silu or mish z and x.

The operators are not differentiable; `BATCH_NORM_ACT` is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.compiler import is_compiling

from ..activation import op as activation
from ..activation.reference import IDENTITY, LEAKY_RELU, MISH, RELU, SILU
from ..activation.reference import act as activated
from ..core import tuning
from ..core.op import Backend, Op, forced, forced_outside_compile, triton_why_not
from ..core.operator import (
    LIBRARY,
    by_formula,
    channels_innermost,
    compute_dtype,
    define,
    dense,
    implement,
    place_why_not,
    plain_why_not,
    transformed,
)
from . import reference

NAME = "batch_norm_act"


class Norm(NamedTuple):
    """One batch norm of a call.

    Attributes:
        weight: (C,) or None.
        bias: (C,) or None.
        running_mean: (C,); updated if batch, else what is normalised with. None: nothing to update.
        running_var: the same.
        batch: normalise with the statistics of the batch.
        momentum: the batch's share in the new running statistics.
        eps: added to the variance.
        offset: (C,), what was left out of the input; only with batch, where it moves the running mean alone.
        group: the process group whose processes share the statistics of the batch; None for this one alone.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batch: bool
    momentum: float
    eps: float
    offset: Tensor | None = None
    group: Any = None

    def __repr__(self) -> str:
        what = "batch" if self.batch else "running"
        shared = ", shared by a process group" * (self.group is not None)
        return f"batch norm of {what} statistics{shared}"


_NORM = "Tensor {0}mean, Tensor {0}var, Tensor? {0}weight, Tensor? {0}bias, float {0}eps"
_NORMS = (
    f"{_NORM.format('')}, Tensor? residual, "
    f"{_NORM.format('residual_').replace('Tensor r', 'Tensor? r').replace('??', '?')}"
)


def _fake_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    x = dense(x)
    y = torch.empty_like(x)
    if not args[-1]:
        return y, x.new_empty(0, dtype=torch.uint8)
    n, c, s = x.shape[0], x.shape[1], x.shape[2:].numel()
    rows, columns = (n * s, c) if channels_innermost(x) else (n * c, s)
    return y, x.new_empty((rows, (columns + 7) // 8), dtype=torch.uint8)


def _fake_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    shape, dtype = x.shape[1:2], compute_dtype(x)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _fake_sums(grad: Tensor, x: Tensor, mean: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual_mean, with_dz = args[5], args[-1]
    of_residual = mean.new_empty(0 if residual_mean is None else mean.shape)
    dz = torch.empty_like(dense(x)) if with_dz else x.new_empty(0)
    return torch.empty_like(mean), torch.empty_like(mean), of_residual, dz


def _fake_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    residual_mean = args[6]
    x = dense(x)
    return torch.empty_like(x), x.new_empty(0) if residual_mean is None else torch.empty_like(x)


class Kernels:
    """The five operators on one backend."""

    def __init__(self, library: torch.library.Library, overload: str = "") -> None:
        gradient = f"Tensor grad, Tensor x, {_NORMS}, Tensor? mask, int act, float slope"
        self.statistics, self.update_, self.forward, self.sums, self.backward = (
            define(library, schema, fake, overload)
            for schema, fake in (
                ("batch_norm_stats(Tensor x) -> (Tensor, Tensor)", _fake_statistics),
                (
                    "batch_norm_update_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, "
                    "Tensor var, Tensor? offset, float correction, float momentum) -> ()",
                    lambda *_: None,
                ),
                (
                    f"batch_norm_act(Tensor x, {_NORMS}, int act, float slope, bool with_mask) "
                    "-> (Tensor, Tensor)",
                    _fake_forward,
                ),
                (
                    f"batch_norm_act_sums({gradient}, bool with_dz) -> (Tensor, Tensor, Tensor, Tensor)",
                    _fake_sums,
                ),
                (
                    f"batch_norm_act_backward({gradient}, Tensor? sum_dz, Tensor? sum_dz_xhat, "
                    "Tensor? sum_dz_residual_xhat, float count) -> (Tensor, Tensor)",
                    _fake_backward,
                ),
            )
        )


def _wide(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A (C,) tensor as operators take it."""
    return None if value is None else value.to(dtype).contiguous()


def _count(x: Tensor) -> int:
    """Values of a channel."""
    return x.shape[0] * x.shape[2:].numel()


def _merge(moments: Sequence[Tensor], count: int, group: Any) -> tuple[list[Tensor], Tensor]:
    """(mean, var, ...) of all processes by Chan's formula, with one all-gather, and the count of all."""
    if not count:
        moments = [torch.zeros_like(m) for m in moments]
    channels = [len(m) for m in moments]
    local = torch.cat([*moments, moments[0].new_full((1,), count)])
    everyone = local.new_empty(dist.get_world_size(group), len(local))
    dist.all_gather(list(everyone.unbind()), local, group=group)
    counts = everyone[:, -1:]
    total = counts.sum()
    share = counts / total
    parts = everyone[:, :-1].split(channels, 1)
    merged = []
    for mean, var in zip(parts[::2], parts[1::2], strict=True):
        of_all = (share * mean).sum(0)
        merged += [of_all, (share * (var + (mean - of_all).square())).sum(0)]
    return merged, total


def _moments(kernels: Any, x: Tensor, residual: Tensor | None, norm: Norm, residual_norm: Norm | None) -> Any:
    """(mean, var) of both batch norms, in one list. Those of the batch enter the running ones."""
    dtype = compute_dtype(x)
    norms = [norm] if residual_norm is None else [norm, residual_norm]
    if not norm.batch:
        return [_wide(t, dtype) for n in norms for t in (n.running_mean, n.running_var)]
    moments = list(kernels.statistics(x))
    if residual_norm is not None:
        moments += kernels.statistics(residual)
    return enter_running(kernels, norms, moments, x)


def enter_running(
    kernels: Any, norms: Sequence[Norm], moments: Sequence[Tensor], x: Tensor
) -> Sequence[Tensor]:
    """Let (mean, var) of each norm, found in x or in what is like it, enter the running statistics.

    Returns those of all processes that share them.
    """
    norm, dtype = norms[0], compute_dtype(x)
    count = _count(x)
    correction = count / (count - 1) if count > 1 else 1.0
    unbiased: Sequence[Tensor] = moments
    if norm.group is not None:
        moments, total = _merge(moments, count, norm.group)
        unbiased = [m * (total / (total - 1)) if i % 2 else m for i, m in enumerate(moments)]
        correction = 1.0
    for i, each in enumerate(norms):
        if each.running_mean is not None and each.running_var is not None:
            mean, var = unbiased[2 * i : 2 * i + 2]
            offset = _wide(each.offset, dtype)
            # uncounted, as torch's: its batch norm keeps them for backward
            running = (each.running_mean.data, each.running_var.data)
            written = [t.contiguous() for t in running]
            kernels.update_(*written, mean, var, offset, correction, each.momentum)
            for given, new in zip(running, written, strict=True):
                if new is not given:
                    given.copy_(new)
    return moments


def _arguments(
    x: Tensor,
    moments: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_eps: float,
) -> tuple[Any, ...]:
    """What operators take from x to residual_eps."""
    dtype = compute_dtype(x)
    mean, var = moments[:2]
    residual_mean, residual_var = moments[2:] or (None, None)
    own = (x, mean, var, _wide(weight, dtype), _wide(bias, dtype), eps)
    of_residual = (residual_mean, residual_var, _wide(residual_weight, dtype), _wide(residual_bias, dtype))
    return (*own, residual, *of_residual, residual_eps)


def _forward(
    kernels: Any,
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
    act: int,
    slope: float,
    with_mask: bool = False,
    moments: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """y, the mask, and what was normalised with."""
    moments = moments or _moments(kernels, x, residual, norm, residual_norm)
    weight, bias, eps = (
        (None, None, 0.0) if residual_norm is None else (*residual_norm[:2], residual_norm.eps)
    )
    arguments = _arguments(x, moments, norm.weight, norm.bias, norm.eps, residual, weight, bias, eps)
    return (*kernels.forward(*arguments, act, slope, with_mask), moments)


class _BatchNormAct(torch.autograd.Function):
    """act(norm(x) [+ residual | + residual_norm(residual)]). What it saves is said at the top."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        offset: Tensor | None,
        residual: Tensor | None,
        residual_weight: Tensor | None,
        residual_bias: Tensor | None,
        residual_offset: Tensor | None,
        norm: Norm,
        residual_norm: Norm | None,
        act: int,
        slope: float,
        kernels: Any,
        *given: Tensor,
    ) -> Tensor:
        ctx.moments_given = len(given)
        with_mask = residual is not None and residual_norm is None and act in (RELU, LEAKY_RELU)
        y, mask, moments = _forward(kernels, x, norm, residual, residual_norm, act, slope, with_mask, given)
        ctx.options = (norm, residual_norm, act, slope, kernels)
        ctx.has_residual = residual is not None
        needs_residual = residual_norm is not None or act in (SILU, MISH)
        ctx.save_for_backward(
            x,
            weight,
            bias,
            residual if needs_residual else None,
            residual_weight,
            residual_bias,
            mask if with_mask else None,
            *moments,
        )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        norm, residual_norm, *_ = ctx.options
        zeros = [
            None if n is None or n.offset is None else torch.zeros_like(n.offset)
            for n in (norm, residual_norm)
        ]
        saved = ctx.saved_tensors
        gradients = _gradients_by_formula if by_formula(grad, *saved) else _gradients
        dx, dw, db, dr, drw, drb = gradients(ctx, grad, *saved)
        rest = [None] * (5 + ctx.moments_given)
        return dx, dw, db, zeros[0], dr, drw, drb, zeros[1], *rest


_batch_norm_act = super(torch.autograd.Function, _BatchNormAct).apply
"""`_BatchNormAct.apply` without its wrapper in Python, which only transforms need."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _gradients(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    mask: Tensor | None,
    *moments: Tensor,
) -> Gradients:
    """Gradients by the operators: of x, weight, bias, residual, and the residual's weight and bias."""
    norm, residual_norm, act, slope, kernels = ctx.options
    need_x, need_weight, need_bias, _, need_residual, need_rw, need_rb, *_ = ctx.needs_input_grad
    eps = 0.0 if residual_norm is None else residual_norm.eps
    arguments = _arguments(x, moments, weight, bias, norm.eps, residual, residual_weight, residual_bias, eps)
    if x.dim() == 4 and grad.stride() != x.stride():
        grad = in_layout(grad, channels_innermost(x))  # a copy that is gone as soon as dz is written
    need_dz = need_residual and residual_norm is None
    need_backward = need_x or (need_residual and not need_dz)
    need_parameters = need_weight or need_bias or need_rw or need_rb
    sum_dz = sum_dz_xhat = sum_dz_residual_xhat = dx = dresidual = None
    dz = grad if need_dz else None
    write_dz = need_dz and act != IDENTITY
    if need_parameters or write_dz or (norm.batch and need_backward):
        sum_dz, sum_dz_xhat, sum_dz_residual_xhat, written = kernels.sums(
            grad, *arguments, mask, act, slope, write_dz
        )
        dz = written if write_dz else dz
    if need_backward:
        if write_dz:
            grad, arguments, mask, act = written, (*arguments[:6], *[None] * 5, 0.0), None, IDENTITY
        sums: Sequence[Tensor | None] = (None, None, None)
        count = 1.0
        if norm.batch:
            sums, count = (sum_dz, sum_dz_xhat, sum_dz_residual_xhat), float(_count(x))
        if norm.batch and norm.group is not None:
            sums, count = _mean_of_all(sums, count, norm.group), 1.0
        if residual_norm is None:
            sums = (*sums[:2], None)
        dx, dresidual = kernels.backward(grad, *arguments, mask, act, slope, *sums, count)
    return (
        dx if need_x else None,
        sum_dz_xhat.to(weight.dtype) if need_weight else None,  # type: ignore[union-attr]
        sum_dz.to(bias.dtype) if need_bias else None,  # type: ignore[union-attr]
        dz if need_dz else dresidual if need_residual else None,
        sum_dz_residual_xhat.to(residual_weight.dtype) if need_rw else None,  # type: ignore[union-attr]
        sum_dz.to(residual_bias.dtype) if need_rb else None,  # type: ignore[union-attr]
    )


def _mean_of_all(sums: Sequence[Tensor | None], count: float, group: Any) -> list[Tensor]:
    """Sums of all processes over the count of all, with one all-reduce."""
    given = [s for s in sums if s is not None]
    everyone = torch.cat([*given, given[0].new_full((1,), count)])
    dist.all_reduce(everyone, group=group)
    means = everyone[:-1] / everyone[-1]
    return list(means.split([len(s) for s in given]))


def _gradients_by_formula(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    mask: Tensor | None,
    *moments: Tensor,
) -> Gradients:
    """The same, differentiable: the gradients of the reference."""
    norm, residual_norm, act, slope, _ = ctx.options
    if norm.group is not None:
        raise RuntimeError(
            f"nnfast.{NAME}: statistics shared by a process group cannot be differentiated twice"
        )
    need_x, need_weight, need_bias, _, need_residual, need_rw, need_rb, *_ = ctx.needs_input_grad
    if ctx.has_residual and residual is None:  # z does not need it, its gradient does
        residual = torch.zeros_like(x, requires_grad=need_residual)
    tensors = (x, weight, bias, residual, residual_weight, residual_bias)
    needs = (need_x, need_weight, need_bias, need_residual, need_rw, need_rb)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # a tensor may be there twice: gradients are those of its places
        places: list[Any] = [None if t is None else t.view_as(t) for t in tensors]
        x, weight, bias, residual, residual_weight, residual_bias = places
        dtype = x.dtype
        x = x.to(compute_dtype(x))  # once: its gradients are summed in the compute dtype
        if norm.batch:
            moments = reference.statistics(x)
            if residual_norm is not None:
                moments += reference.statistics(residual)
        z = _z(x, norm, residual, residual_norm, moments, weight, bias, residual_weight, residual_bias)
        if mask is not None:
            y = torch.where(reference.unpack(mask, dense(x)), z, z * slope if act == LEAKY_RELU else 0)
        else:
            y = activated(z, act, slope)
        wanted = [p for p, need in zip(places, needs, strict=True) if need]
        found = iter(torch.autograd.grad(y.to(dtype), wanted, grad, create_graph=create_graph))
    return tuple(next(found) if need else None for need in needs)  # type: ignore[return-value]


def _z(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
    moments: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
) -> Tensor:
    """act's argument by the formula, in the compute dtype."""
    z = reference.batch_norm(x, moments[0], moments[1], weight, bias, norm.eps)
    if residual is None:
        return z
    if residual_norm is None:
        return z + residual
    return z + reference.batch_norm(
        residual, moments[2], moments[3], residual_weight, residual_bias, residual_norm.eps
    )


def run(
    kernels: Any,
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: int = IDENTITY,
    slope: float = 0.01,
    moments: Sequence[Tensor] = (),
) -> Tensor:
    """Run a backend's operators, with whatever differentiation asks for.

    moments: of the batch, of both norms; known already, and entered in the running ones.
    """
    if not x.numel() and norm.group is None:  # nothing to compute
        return _run_aten(x, norm, residual, residual_norm, act, slope)
    of_residual = (None, None, None) if residual_norm is None else (*residual_norm[:2], residual_norm.offset)
    tensors = (x, norm.weight, norm.bias, norm.offset, residual, *of_residual)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return _forward(kernels, x, norm, residual, residual_norm, act, slope, moments=moments)[0]
    options = (norm, residual_norm, act, slope, kernels)
    if is_compiling():  # which knows no function that changes running statistics
        if residual is x:  # nor one with a tensor twice
            tensors = (*tensors[:4], x.view_as(x), *of_residual)
        with torch.no_grad():
            moments = _moments(kernels, x, residual, norm, residual_norm)
        return _BatchNormAct.apply(*tensors, *options, *moments)  # type: ignore[no-any-return, no-untyped-call]
    return _batch_norm_act(*tensors, *options, *moments)  # type: ignore[no-any-return, no-untyped-call]


class _Formulas:
    """The operators' formulas, in place of operators."""

    statistics = staticmethod(reference.statistics)
    update_ = staticmethod(reference.update_)
    forward = staticmethod(reference.forward)
    sums = staticmethod(reference.sums)
    backward = staticmethod(reference.backward)


def _run_reference(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: int = IDENTITY,
    slope: float = 0.01,
) -> Tensor:
    if norm.group is not None or not (transformed() or is_compiling()):
        return run(_Formulas, x, norm, residual, residual_norm, act, slope)
    norm, residual_norm = _with_offset(norm), _with_offset(residual_norm)
    moments: list[Tensor] = []
    for value, each in ((x, norm), (residual, residual_norm)):
        if each is None or value is None:
            continue
        if not each.batch:
            moments += [each.running_mean, each.running_var]  # type: ignore[list-item]
            continue
        mean, var = reference.statistics(value)
        moments += [mean, var]
        count = _count(value)
        if each.running_mean is not None and each.running_var is not None and count:
            correction = count / (count - 1) if count > 1 else 1.0
            with torch.no_grad():
                reference.update_(
                    each.running_mean,
                    each.running_var,
                    mean,
                    var,
                    each.offset,
                    correction,
                    each.momentum,
                )
    own = (norm.weight, norm.bias)
    of_residual = (None, None) if residual_norm is None else residual_norm[:2]
    z = _z(x, norm, residual, residual_norm, moments, *own, *of_residual)
    return activated(z, act, slope).to(x.dtype)


def _with_offset(norm: Norm | None) -> Any:
    """The norm with its bias a function of the offset, whose gradient is zero."""
    if norm is None or norm.offset is None or not norm.offset.requires_grad:
        return norm
    zero = norm.offset * 0
    if norm.bias is not None:
        return norm._replace(bias=norm.bias + zero.to(norm.bias.dtype))
    weight = torch.ones_like(zero) if norm.weight is None else norm.weight
    return norm._replace(weight=weight, bias=zero)


def _aten_norm(x: Tensor, norm: Norm) -> Tensor:
    norm = _with_offset(norm)
    statistics = (norm.running_mean, norm.running_var)
    if norm.group is None:
        y = F.batch_norm(x, *statistics, norm.weight, norm.bias, norm.batch, norm.momentum, norm.eps)
    else:
        from torch.nn.modules._functions import SyncBatchNorm

        of_all = (norm.eps, norm.momentum, norm.group, dist.get_world_size(norm.group))
        y = SyncBatchNorm.apply(x, norm.weight, norm.bias, *statistics, *of_all)
    if norm.offset is not None and norm.running_mean is not None:
        # uncounted: torch keeps it for backward
        norm.running_mean.data.add_(norm.momentum * norm.offset.detach())
    return y


_ATEN_ACTS: tuple[Callable[[Tensor, float, bool], Tensor], ...] = (
    lambda z, slope, inplace: z,
    lambda z, slope, inplace: F.relu(z, inplace),
    lambda z, slope, inplace: F.leaky_relu(z, slope, inplace and slope >= 0 and not z.requires_grad),
    lambda z, slope, inplace: activation.activate(activation.SILU, z, False),  # which has kernels of its own
    lambda z, slope, inplace: activation.activate(activation.MISH, z, False),
)


def _run_aten(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: int = IDENTITY,
    slope: float = 0.01,
) -> Tensor:
    """torch's own, one after another; in place where nobody can tell."""
    z = _aten_norm(x, norm)
    inplace = type(x) is Tensor and not is_compiling() and not transformed()
    if residual is not None:
        if residual_norm is not None:
            residual = _aten_norm(residual, residual_norm)
        z = z.add_(residual) if inplace else z + residual
    return _ATEN_ACTS[act](z, slope, inplace)


def _one_dtype(norm: Norm) -> bool:
    return len({t.dtype for t in norm[:4] if t is not None}) < 2


def _why_not(
    backend: str,
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: int = IDENTITY,
    slope: float = 0.01,
) -> list[str]:
    reasons = place_why_not(NAME, backend, "x", x) if backend else []
    reasons += plain_why_not("x", x)
    if residual is not None and type(residual) is not Tensor:
        reasons += plain_why_not("residual", residual)
    if transformed():
        reasons.append("a torch.func transform or forward-mode differentiation; our kernels know none")
    return reasons


def _mode(x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: Norm | None) -> str:
    """What `tuning.NORM_THRESHOLDS` tells apart."""
    tensors = (x, residual, *norm[:2], *(residual_norm or ())[:2])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "autograd"
    return "statistics" if norm.batch else "inference"


_MODES = {
    "inference": "in inference",
    "statistics": "with the batch's statistics",
    "autograd": "with autograd",
}
_SMALLEST = {
    (mode, innermost): tuning.smallest_norm(innermost, mode) for mode in _MODES for innermost in (False, True)
}


def _is_small(x: Tensor, mode: str) -> bool:
    """Whether x is torch's by its size, at the cost of a microsecond."""
    least = _SMALLEST[mode, channels_innermost(x)]
    return x.numel() < least.elements(x.element_size() < 4, x.shape[2:].numel())


def _not_worth(
    backend: str,
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: int = IDENTITY,
    slope: float = 0.01,
) -> list[str]:
    if norm.group is not None and x.is_cpu and backend == "cpu":
        return []  # torch has none on the cpu
    if backend == "triton" and x.is_cpu:
        return ["interpreted: for tests, not for speed"]
    mode, innermost = _mode(x, norm, residual, residual_norm), channels_innermost(x)
    least = tuning.NORM_THRESHOLDS.get((backend, mode, innermost))
    if least is None:
        return ["not measured to be faster than torch's own kernel"]
    if innermost and dense(x) is not x:
        return ["x is neither contiguous nor channels last, and would be copied"]
    reasons = []
    stretch, what = (_count(x), "channel") if innermost else (x.shape[2:].numel(), "plane")
    numel = least.elements(x.element_size() < 4, stretch)
    if numel == tuning.NEVER:
        reasons.append(f"torch's own is faster in half types {_MODES[mode]}")
    elif x.numel() < numel:
        reasons.append(f"{x.numel()} elements; measured to pay from {numel} on {_MODES[mode]}")
    if stretch < least.stretch:
        reasons.append(f"{stretch} values of a {what}; measured to pay from {least.stretch} on")
    if residual is None and act == IDENTITY and not least.plain:
        reasons.append("neither an activation nor a residual: torch's own takes as few passes over memory")
    return reasons


def _aten_why_not(
    x: Tensor, norm: Norm, residual: Tensor | None = None, residual_norm: Norm | None = None, *_: Any
) -> list[str]:
    reasons = []
    if norm.group is not None and x.is_cpu:
        reasons.append("statistics are shared by a process group, which torch cannot do on the cpu")
    half = x.dtype not in (torch.float32, torch.float64)  # else all have x's
    if half and not (_one_dtype(norm) and (residual_norm is None or _one_dtype(residual_norm))):
        reasons.append("weight, bias and running statistics have several dtypes; torch's own needs one")
    return reasons


class BatchNormAct(Op):
    """The operation; called with (x, norm, residual, residual_norm, act, slope), checked."""

    def __init__(self) -> None:
        self.least = tuning.smallest_norm(True, *_MODES)  # the memory format that blocks run in
        compiled, triton = Kernels(LIBRARY), Kernels(LIBRARY, "triton")
        self.in_triton = triton
        ours = [
            Backend(key, partial(run, kernels), partial(_why_not, key), partial(_not_worth, key))
            for key, kernels in (("cuda", compiled), ("triton", triton), ("cpu", compiled))
        ]
        aten = Backend("aten", _run_aten, _aten_why_not)
        self.aten = _run_aten
        super().__init__(NAME, [*ours, aten, Backend("reference", _run_reference)])

    def example(self, device: str) -> tuple[Any, ...]:
        """A training step's batch of 64 channels, and relu."""
        x = torch.empty(32, 64, 56, 56, device=device)
        return x, Norm(None, None, x.new_zeros(64), x.new_ones(64), True, 0.1, 1e-5), None, None, RELU, 0.0

    def compiled_in(self, library: torch.library.Library) -> Backend:
        """The `cuda` backend with the operators of another library, on any device."""
        return Backend("cuda", partial(run, Kernels(library)), partial(_why_not, ""))


def _fake_merge(partial: Tensor) -> tuple[Tensor, Tensor]:
    return partial.new_empty(partial.shape[2]), partial.new_empty(partial.shape[2])


for _overload in ("", "triton"):
    define(LIBRARY, "batch_norm_merge(Tensor partial) -> (Tensor, Tensor)", _fake_merge, _overload)


def merge_statistics(partial: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of what a convolution wrote down beside its result: (3, parts, C)."""
    operators = torch.ops.nnfast.batch_norm_merge
    merged: tuple[Tensor, Tensor] = (
        operators.default if triton_why_not(partial.device.type) else operators.triton
    )(partial)
    return merged


def _in_triton(function: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        from . import kernels  # imports triton

        return getattr(kernels, function)(*args)

    return call


LAYOUT = "image_layout"
_FORMATS = (torch.contiguous_format, torch.channels_last)


def _in_order(x: Tensor, channels_last: bool) -> Tensor:
    return x.clone(memory_format=_FORMATS[channels_last])


_layout = define(LIBRARY, f"{LAYOUT}(Tensor x, bool channels_last) -> Tensor", _in_order)
LIBRARY.impl(LAYOUT, _in_order, "CompositeExplicitAutograd")


def in_layout(x: Tensor, channels_last: bool) -> Tensor:
    """x: (N, C, H, W) in channels_last, or contiguous; not differentiable."""
    wanted, other = _FORMATS[channels_last], _FORMATS[not channels_last]
    plain = x.is_cpu and x.dtype is torch.float32 and x.numel() >= tuning.LEAST_LAYOUT
    if plain and x.is_contiguous(memory_format=other) and not x.is_contiguous(memory_format=wanted):
        return _layout(x, channels_last)  # type: ignore[no-any-return]
    return x.contiguous(memory_format=wanted)


BATCH_NORM_ACT = BatchNormAct()
for _operator, _function in (
    ("batch_norm_stats", "statistics"),
    ("batch_norm_merge", "merge"),
    ("batch_norm_update_", "update_"),
    ("batch_norm_act", "forward"),
    ("batch_norm_act_sums", "sums"),
    ("batch_norm_act_backward", "backward"),
):
    implement(_operator, getattr(reference, _function), _in_triton(_function))


def recomputing() -> bool:
    """Inside a backward pass: activation checkpointing runs a forward again, which counts once."""
    return not is_compiling() and torch._C._current_graph_task_id() != -1


def _with_copies(norm: Norm) -> Norm:
    """The norm with running statistics that nobody will read."""
    if norm.running_mean is None or norm.running_var is None:
        return norm
    return norm._replace(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())


def check(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
) -> None:
    """Raise what is wrong with a call, before anything changes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"nnfast.{NAME}: input is a {type(x).__name__}; it needs a torch.Tensor")
    if not x.is_floating_point():
        raise NotImplementedError(f"nnfast.{NAME}: input has dtype {x.dtype}; it needs a floating-point one")
    if x.dim() < 2:
        raise ValueError(f"nnfast.{NAME}: input has shape {list(x.shape)}; it needs (N, C, ...)")
    _check_norm(x, norm, "")
    if residual is None:
        if residual_norm is not None:
            raise ValueError(f"nnfast.{NAME}: residual_bn is given without a residual")
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"nnfast.{NAME}: residual is a {type(residual).__name__}; it needs a torch.Tensor")
    for what in ("shape", "dtype", "device"):
        found, needed = getattr(residual, what), getattr(x, what)
        if found != needed:
            if what == "shape":
                found, needed = list(found), list(needed)
            raise ValueError(f"nnfast.{NAME}: residual has {what} {found}; it needs that of input, {needed}")
    if residual_norm is not None:
        _check_norm(residual, residual_norm, "residual's ")


def _check_norm(x: Tensor, norm: Norm, whose: str) -> None:
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(
            f"nnfast.{NAME}: {whose}running_mean and running_var need to be given both, or neither"
        )
    if norm.running_mean is None and not norm.batch:
        raise ValueError(f"nnfast.{NAME}: {whose}running_mean and running_var are None; eval mode needs them")
    channels, dtype, device = x.shape[1], x.dtype, x.device
    half = dtype in (torch.float16, torch.bfloat16)
    for i in range(4):
        value: Any = norm[i]
        if value is None:
            continue
        name = whose + Norm._fields[i]
        if not isinstance(value, Tensor):
            raise TypeError(f"nnfast.{NAME}: {name} is a {type(value).__name__}; it needs a torch.Tensor")
        if value.shape != (channels,):
            raise ValueError(
                f"nnfast.{NAME}: {name} has shape {list(value.shape)}; input has {channels} channels "
                f"and needs [{channels}]"
            )
        if value.dtype != dtype and not (half and value.dtype == torch.float32):
            raise ValueError(
                f"nnfast.{NAME}: {name} has dtype {value.dtype}; input needs {dtype}"
                f"{' or torch.float32' * half}"
            )
        if value.device != device:
            raise ValueError(
                f"nnfast.{NAME}: {name} is on {value.device}; it needs to be on {device} as input"
            )
    if norm.batch and norm.group is None and _count(x) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def batch_norm_act(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
    act: int,
    slope: float,
) -> Tensor:
    """Let the chosen backend run what `check` has found right."""
    if residual_norm is not None and (norm.batch, norm.group) != (residual_norm.batch, residual_norm.group):
        z = batch_norm_act(x, norm, None, None, IDENTITY, slope)
        return batch_norm_act(residual, residual_norm, z, None, act, slope)  # type: ignore[arg-type]
    if is_compiling() and norm.group is not None:
        return _outside_compile(x, norm, residual, residual_norm, act, slope)
    if is_compiling() and forced() is None:
        return _run_aten(x, norm, residual, residual_norm, act, slope)
    if norm.batch and recomputing():
        norm = _with_copies(norm)
        residual_norm = None if residual_norm is None else _with_copies(residual_norm)
    small = (
        _is_small(x, _mode(x, norm, residual, residual_norm))
        and not is_compiling()
        and forced_outside_compile() is None
    )
    if small and not _aten_why_not(x, norm, residual, residual_norm):  # at once what `choose` would find
        return _run_aten(x, norm, residual, residual_norm, act, slope)
    result: Tensor = BATCH_NORM_ACT(x, norm, residual, residual_norm, act, slope)
    return result


def takes_any_layout(y: Tensor) -> bool:
    """y is our batch norm's, whose backward brings a gradient into the memory format it needs."""
    kind: Any = _BatchNormAct._backward_cls
    return isinstance(y.grad_fn, kind)


def again(y: Tensor) -> Callable[[], Tensor] | None:
    """What computes y = act(norm(x)) again from what its backward has of it; None if y is no such result."""
    node: Any = y.grad_fn
    kind: Any = _BatchNormAct._backward_cls
    if not isinstance(node, kind) or node.has_residual:
        return None

    def compute() -> Tensor:
        norm, _, act, slope, kernels = node.options
        x, weight, bias, *_, mean, var = node.saved_tensors
        arguments = _arguments(x, (mean, var), weight, bias, norm.eps, None, None, None, 0.0)
        with torch.no_grad():
            return kernels.forward(*arguments, act, slope, False)[0]  # type: ignore[no-any-return]

    return compute


_outside_compile = _disable_dynamo(batch_norm_act)
"""The same where processes talk: torch.compile does without it."""
