"""Chains of convolutions of our own: statistics are taken as a convolution writes its result, and what is
normalised and activated is so as the next convolution reads it.

    conv -> u1, its statistics;  conv(act(bn(u1))) -> u2, its statistics;  act(bn(u2) + residual)

Saved for backward, of tensors as large as activations: the input and every u, besides what `batch_norm_act`
saves at the end. act(bn(u1)) is nowhere: neither forward nor backward stores it. Of a basic block with relu
these are 3 tensors, the input among them, and a bit for each element, of a bottleneck 4; torch saves 5 and 7.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activation.reference import IDENTITY
from ..activation.reference import act as activated
from ..convolution import winograd
from ..convolution.op import CONV2D_ACT, Prologue, with_statistics
from ..convolution.op import Kernels as Convolutions
from ..convolution.op import run as convolve_and_act
from ..convolution.reference import convolve
from ..core.operator import autocasts, by_formula, compute_dtype, convolved_size
from . import fold, reference
from .module import activation_code, count_batch, norm_of
from .op import BATCH_NORM_ACT, Norm, check, enter_running, merge_statistics, recomputing, run


class Link(NamedTuple):
    """A convolution, the batch norm after it, and the activation after that."""

    conv: nn.Conv2d
    bn: Any
    act: int
    slope: float


def convolutions(links: Sequence[Link], x: Tensor, projection: Link | None) -> Convolutions | None:
    """Our operators, if they are the choice for every convolution, and every batch norm is of one batch."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return None
    found = None
    size: Sequence[int] = x.shape
    for link in (*links, *([projection] if projection else [])):
        if link is projection:
            size = x.shape
        if link.conv.in_channels != size[1] or not of_batch(link.bn) or _unlinked(link.conv, link.bn):
            return None
        found = CONV2D_ACT.ours(*_arguments(link.conv, x))
        size = convolved_size(size, link.conv.weight.shape, link.conv.stride, link.conv.padding)
        if found is None or min(size) < 1:
            return None
    return found


def _arguments(conv: nn.Conv2d, x: Tensor) -> tuple[Any, ...]:
    """As `CONV2D_ACT` takes them."""
    options = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return cast(x), cast(conv.weight), None, None, None, *options


def of_batch(bn: Any) -> bool:
    """A batch norm normalises with the statistics of the batch."""
    return bool(bn.training or getattr(bn, "running_mean", None) is None)


def _unlinked(conv: nn.Conv2d, bn: Any) -> list[str]:
    """Why the modules cannot be a link of a chain that trains."""
    shared = isinstance(bn, nn.SyncBatchNorm) or getattr(bn, "process_group", None) is not None
    return _unpadded(conv) + ["bn shares its statistics with other processes"] * shared


def _unpadded(conv: nn.Conv2d) -> list[str]:
    """Why our convolution does not pad as conv does."""
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return []
    return [f"padding is {conv.padding!r}, by {conv.padding_mode}; our kernels take numbers, of zeros"]


def explain(conv: nn.Module, bn: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[str, list[str]]:
    """Whose convolution of our own serves a unit, in training as a link of a chain; or every reason why none.

    Of a chain the others may still refuse.
    """
    linked = of_batch(bn)
    reasons = fold.unplain(conv, bn) if linked else fold.folding_why_not(conv, bn, x, residual)
    if not reasons and x.dim() != 4:
        reasons = [f"x has shape {list(x.shape)}; our kernels take (N, C, H, W)"]
    if not reasons:
        assert isinstance(conv, nn.Conv2d)
        reasons = _unlinked(conv, bn) if linked else _unpadded(conv)
    if reasons:
        return "", reasons
    found = CONV2D_ACT.explain(*_arguments(conv, x))  # type: ignore[arg-type]
    if found.backend and found.backend not in THEIRS:
        return found.backend, []
    given = [(name, reason) for name, why in found.reasons.items() for reason in why if name not in THEIRS]
    return "", [f"{name}: {reason}" for name, reason in given]


THEIRS = ("aten", "reference")
"""Backends of a convolution that fuse nothing."""


def cast(x: Tensor) -> Tensor:
    """As autocast casts what is convolved."""
    if autocasts(x) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def train(
    kernels: Convolutions,
    links: Sequence[Link],
    x: Tensor,
    residual: Tensor | None,
    projection: Link | None,
) -> Tensor:
    """The links one after another; the last adds the residual or the projection of x.

    In backward the gradient that x has from there is added in the first convolution's.
    """
    first, last = links[0].conv, links[-1]
    norms = BATCH_NORM_ACT.in_triton
    u, parts, again = _convolved(kernels, first, x)
    for link, following in itertools.pairwise(links):
        norm = norm_of(link.bn, u, link.conv.bias)
        check(u, norm, None, None)
        moments = merge_statistics(parts)
        _enter(norms, link.bn, norm, u, moments)
        conv = following.conv
        options = (norm, link.act, link.slope, conv.stride, conv.padding, kernels, norms)
        parameters = (norm.weight, norm.bias, norm.offset, cast(conv.weight))
        u, parts = _NormConv.apply(u, *parameters, *moments, *options)  # type: ignore[no-untyped-call]
    norm, residual_norm = norm_of(last.bn, u, last.conv.bias), None
    of_last: tuple[Tensor, ...] = merge_statistics(parts)
    if projection is not None:
        conv = projection.conv
        residual, parts, _ = _convolved(kernels, conv, again)
        residual_norm = norm_of(projection.bn, residual, conv.bias)
        of_last += merge_statistics(parts)
    elif residual is x:
        residual = again
    elif residual is not None:
        residual = residual.to(u.dtype) if autocasts(u) else residual
    check(u, norm, residual, residual_norm)
    _enter(norms, last.bn, norm, u, of_last[:2])
    if projection is not None and residual_norm is not None:
        _enter(norms, projection.bn, residual_norm, u, of_last[2:])
    return run(norms, u, norm, residual, residual_norm, last.act, last.slope, of_last)


def _convolved(kernels: Convolutions, conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    padding: Any = conv.padding
    return with_statistics(kernels, cast(x), cast(conv.weight), conv.stride, padding)


def _enter(kernels: Any, bn: Any, norm: Norm, x: Tensor, moments: Sequence[Tensor]) -> None:
    """What a batch leaves in a module; nothing where checkpointing repeats a forward."""
    if not recomputing():
        enter_running(kernels, [norm], moments, x)
        count_batch(bn)


def _prologue(
    norm: Norm, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, act: int, slope: float
) -> Prologue:
    scale = 1 / (var + norm.eps).sqrt()
    scale = scale if weight is None else scale * weight.to(scale.dtype)
    shift = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    return Prologue(scale, shift, act, slope, mean)


def infer(
    conv: nn.Module, bn: nn.Module, x: Tensor, residual: Tensor | None, act: str, slope: float
) -> Tensor | None:
    """act(bn(conv(x)) + residual) by our convolution, the batch norm in it; None if not the choice."""
    if fold.folding_why_not(conv, bn, x, residual):
        return None
    assert isinstance(conv, nn.Conv2d)
    if _unpadded(conv):
        return None
    found = fold.folded(conv, bn)
    padding: Any = conv.padding
    arguments = (
        x, found.weight, found.bias, residual, None,
        conv.stride, padding, conv.dilation, conv.groups, activation_code(act), slope,
    )  # fmt: skip
    kernels = CONV2D_ACT.ours(*arguments)
    if kernels is None:
        return None
    if kernels is not CONV2D_ACT.on_cpu:
        return convolve_and_act(kernels, *arguments)
    return found.run(_by_winograd, conv, x, residual, act, slope)


def _by_winograd(
    found: fold.Folded, conv: nn.Conv2d, x: Tensor, residual: Tensor | None, act: str, slope: float
) -> Tensor:
    none, padding = (None, None, None, IDENTITY, 0.0), [int(p) for p in conv.padding]
    return winograd.forward(
        x, found.weight, found.bias, residual, *none, [1, 1], padding, activation_code(act), slope, False,
        found.transform(),
    )[0]  # fmt: skip


class _NormConv(torch.autograd.Function):
    """conv(act(norm(u))), and its statistics. Saves u."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        offset: Tensor | None,
        weight: Tensor,
        mean: Tensor,
        var: Tensor,
        norm: Norm,
        act: int,
        slope: float,
        stride: tuple[int, int],
        padding: tuple[int, int],
        kernels: Convolutions,
        norms: Any,
    ) -> tuple[Tensor, Tensor]:
        before = _prologue(norm, mean, var, gamma, beta, act, slope)
        ctx.options = (norm, act, slope, list(stride), list(padding), kernels, norms)
        ctx.save_for_backward(u, gamma, beta, weight, mean, var)
        y, parts = kernels.forward(
            u, weight, None, None, before.center, before.scale, before.shift, act, slope, list(stride),
            list(padding), IDENTITY, 0.0, True,
        )  # fmt: skip
        ctx.mark_non_differentiable(parts)
        return y, parts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = _gradients_by_formula if by_formula(grad, *saved) else _gradients
        du, dgamma, dbeta, dweight = gradients(ctx, grad, *saved)
        offset = ctx.options[0].offset
        zeros = None if offset is None else torch.zeros_like(offset)
        return du, dgamma, dbeta, zeros, dweight, *[None] * 9


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _gradients(
    ctx: Any,
    grad: Tensor,
    u: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
) -> Gradients:
    """By the operators: of u, gamma, beta and weight."""
    norm, act, slope, stride, padding, kernels, norms = ctx.options
    need_u, need_gamma, need_beta, _, need_weight, *_ = ctx.needs_input_grad
    before = _prologue(norm, mean, var, gamma, beta, act, slope)
    prologue = (before.center, before.scale, before.shift, act, slope)
    tail = (stride, padding, IDENTITY, 0.0)
    du = dgamma = dbeta = dweight = None
    if need_u or need_gamma or need_beta:
        dz, dbeta, sum_dz_u = kernels.input_gradient(
            grad, None, weight, None, u, *prologue, list(u.shape), *tail, False
        )
        dgamma = sum_dz_u / (var + norm.eps).sqrt()
        if need_u:
            wide_gamma, wide_beta = (None if t is None else t.to(mean.dtype) for t in (gamma, beta))
            own = (u, mean, var, wide_gamma, wide_beta, norm.eps, *[None] * 5, 0.0, None, IDENTITY, 0.0)
            du = norms.backward(dz, *own, dbeta, dgamma, None, float(u.numel() // u.shape[1]))[0]
    if need_weight:
        kernel = list(weight.shape[2:])
        dweight = kernels.weight_gradient(grad, None, u, *prologue, kernel, *tail, False)[0]
    return (
        du,
        dgamma.to(gamma.dtype) if need_gamma else None,  # type: ignore[union-attr]
        dbeta.to(beta.dtype) if need_beta else None,  # type: ignore[union-attr]
        dweight,
    )


def _gradients_by_formula(
    ctx: Any,
    grad: Tensor,
    u: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
) -> Gradients:
    """The same, differentiable: the gradients of the reference."""
    norm, act, slope, stride, padding, *_ = ctx.options
    need_u, need_gamma, need_beta, _, need_weight, *_ = ctx.needs_input_grad
    needs = (need_u, need_gamma, need_beta, need_weight)
    with torch.enable_grad():
        places: list[Any] = [None if t is None else t.view_as(t) for t in (u, gamma, beta, weight)]
        wide_u = places[0].to(compute_dtype(u))
        mean, var = reference.statistics(wide_u)
        z = reference.batch_norm(wide_u, mean, var, places[1], places[2], norm.eps)
        a = activated(z, act, slope)
        y = convolve(a, places[3], None, None, None, None, None, IDENTITY, 0.0, stride, padding)
        wanted = [p for p, need in zip(places, needs, strict=True) if need]
        found = iter(torch.autograd.grad(y.to(u.dtype), wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)  # type: ignore[return-value]
