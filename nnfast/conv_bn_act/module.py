"""Batch norm with residual and activation, as a module and as a function: nn.BatchNorm2d's drop-in."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import has_torch_function

from ..activation.reference import ACTIVATIONS
from ..core.operator import autocasts
from .op import BATCH_NORM_ACT, NAME, Norm, check, recomputing
from .op import batch_norm_act as _batch_norm_act

WORLD = "world"
"""As a process group: all processes."""


def activation_code(name: object) -> int:
    """The operators' code of an activation's name."""
    code = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if code is None:
        raise ValueError(f"nnfast.{NAME}: act is {name!r}; it needs to be one of {', '.join(ACTIVATIONS)}")
    return code


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    act: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """act(F.batch_norm(input, ...) + residual), in one pass after that of the statistics.

    Args:
        input: (N, C, *spatial) in float64, float32, bfloat16 or float16; contiguous or channels last.
        running_mean: (C,) in input's dtype, or float32 for half types; updated in training, used otherwise.
            None in training: nothing is updated.
        running_var: the same, of the variance; updated with the unbiased one.
        weight: (C,), gamma; None for ones.
        bias: (C,), beta; None for zeros.
        training: normalise with the statistics of input, not the running ones.
        momentum: the batch's share in the new running statistics.
        eps: added to the variance.
        act: "identity", "relu", "leaky_relu", "silu" (or "swish") or "mish".
        negative_slope: of leaky_relu.
        residual: input's shape, dtype and device; added before the activation. Under autocast of any dtype.

    Returns:
        A tensor like input. Under activation checkpointing the statistics are updated once, not again when
        the forward is repeated during backward.

    Raises:
        TypeError: if input or residual is not a tensor.
        NotImplementedError: for a dtype that is not floating-point.
        ValueError: for a wrong shape, dtype, device or activation, and in training for one value per channel.
        BackendError: if a forced backend cannot serve.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """
    parameters = (running_mean, running_var, weight, bias, training, momentum, eps)
    return _run(*_arguments(input, *parameters, act=act, negative_slope=negative_slope, residual=residual))


def _arguments(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    act: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> tuple[Any, ...]:
    """The operation's arguments, for `nnfast.explain`."""
    norm = Norm(weight, bias, running_mean, running_var, training, momentum, eps)
    return input, norm, residual, None, activation_code(act), negative_slope


batch_norm_act.nnfast_op = NAME  # type: ignore[attr-defined]
BATCH_NORM_ACT.arguments = _arguments


def _run(
    x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: Norm | None, act: int, slope: float
) -> Tensor:
    if not isinstance(x, Tensor) and has_torch_function((x,)):  # torch.fx traces
        return BATCH_NORM_ACT.aten(x, norm, residual, residual_norm, act, slope)
    if (
        isinstance(residual, Tensor)
        and residual.dtype != x.dtype
        and autocasts(x)
        and residual.is_floating_point()
    ):
        residual = residual.to(x.dtype)  # as `x += residual` does
    check(x, norm, residual, residual_norm)
    return _batch_norm_act(x, norm, residual, residual_norm, act, slope)


def _group(bn: _BatchNorm) -> Any:
    """The process group that shares a module's statistics; None if no process but this one does."""
    group: Any = None
    shares = isinstance(bn, nn.SyncBatchNorm) or getattr(bn, "process_group", None) is not None
    if shares and bn.training and dist.is_available() and dist.is_initialized():
        group = bn.process_group
        group = dist.group.WORLD if group is None or group == WORLD else group
        if dist.get_world_size(group) < 2:
            group = None
    return group


def norm_of(bn: _BatchNorm, x: Any, offset: Tensor | None) -> Norm:
    """What the module would normalise x with now, as its own forward finds it. Changes nothing."""
    if isinstance(x, Tensor):
        bn._check_input_dim(x)
    training, mean, var, momentum = bn.training, bn.running_mean, bn.running_var, bn.momentum
    batch = training or (mean is None and var is None)
    if training and not bn.track_running_stats:
        mean = var = None
    if momentum is None:
        momentum = 0.0
        if training and bn.track_running_stats and bn.num_batches_tracked is not None:
            momentum = 1.0 / float(bn.num_batches_tracked + 1)
    return Norm(bn.weight, bn.bias, mean, var, batch, momentum, bn.eps, offset, _group(bn))


def normalise(
    bn: _BatchNorm,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    residual_bn: _BatchNorm | None = None,
    act: str = "identity",
    negative_slope: float = 0.01,
    offset: Tensor | None = None,
    residual_offset: Tensor | None = None,
) -> Tensor:
    """act(bn(x) [+ residual | + residual_bn(residual)]), with the modules behaving as they would themselves.

    Args:
        bn: nn.BatchNorm1d, 2d, 3d, nn.SyncBatchNorm, or a subclass whose forward is theirs.
        x: (N, C, *spatial), as bn takes it.
        residual: x's shape, dtype and device.
        residual_bn: normalises the residual before it is added.
        act: the activation's name.
        negative_slope: of leaky_relu.
        offset: (C,), the bias of the convolution that made x and did not add it. With the statistics of the
            batch it cancels: it moves running_mean alone and its gradient is exactly zero. Else it is added.
        residual_offset: the same of the residual.

    Raises:
        What `batch_norm_act` does, with the modules unchanged.
    """
    code = activation_code(act)
    if residual_bn is bn and residual is not None:  # twice, one after another
        x = normalise(bn, x, offset=offset)
        return normalise(
            bn, residual, residual=x, act=act, negative_slope=negative_slope, offset=residual_offset
        )
    norm = norm_of(bn, x, offset)
    if offset is not None and not norm.batch:
        x, norm = _add(x, offset), norm._replace(offset=None)
    residual_norm = None
    if residual_bn is not None:
        residual_norm = norm_of(residual_bn, residual, residual_offset)
        if residual_offset is not None and not residual_norm.batch:
            residual, residual_norm = _add(residual, residual_offset), residual_norm._replace(offset=None)
    y = _run(x, norm, residual, residual_norm, code, negative_slope)
    if (bn.training or (residual_bn is not None and residual_bn.training)) and not recomputing():
        for each in (bn, residual_bn):
            if each is not None:
                count_batch(each)
    return y


def count_batch(bn: _BatchNorm) -> None:
    """A batch more that the module has seen, if it trains."""
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)


def _add(x: Any, offset: Tensor) -> Tensor:
    y: Tensor = x + offset.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
    return y


class BatchNormAct2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, a residual and an activation: act(bn(x) + residual). Input and output: (N, C, H, W).

    Parameters, buffers and state_dict are nn.BatchNorm2d's.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: the batch's share in the new running statistics; None for the mean of all batches.
        affine: have a weight and a bias.
        track_running_stats: keep running statistics; without, every batch's own are used, in eval mode too.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: if affine, have a bias too.
        act: "identity", "relu", "leaky_relu", "silu" (or "swish") or "mish".
        negative_slope: of leaky_relu.
        process_group: a process group, or "world" for all processes, that share the statistics of their
            batches in training as nn.SyncBatchNorm's do; on the cpu too.

    Raises:
        ValueError: for an unknown activation.
    """

    nnfast_op = NAME

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str = "relu",
        negative_slope: float = 0.01,
        process_group: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        activation_code(act)
        self.act, self.negative_slope, self.process_group = act, negative_slope, process_group

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(bn(input) + residual); residual: like input. See `nnfast.functional.batch_norm_act`."""
        return normalise(self, input, residual=residual, act=self.act, negative_slope=self.negative_slope)

    def extra_repr(self) -> str:
        """nn.BatchNorm2d's, and the activation."""
        slope = f", negative_slope={self.negative_slope}" * (self.act == "leaky_relu")
        return f"{super().extra_repr()}, act={self.act!r}{slope}"  # type: ignore[no-untyped-call]

    def nnfast_arguments(self, input: Tensor, residual: Tensor | None = None) -> tuple[Any, ...]:
        """The operation's arguments, for `nnfast.explain`."""
        code = activation_code(self.act)
        return input, norm_of(self, input, None), residual, None, code, self.negative_slope


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Let the batch norms of a model share their statistics over processes.

    Args:
        module: BatchNormAct2d in it, in place, and by nn.SyncBatchNorm.convert_sync_batchnorm every other
            batch norm.
        process_group: whose processes share; None for all.

    Returns:
        The module, or, if it is torch's batch norm itself, what replaces it.
    """
    if isinstance(module, BatchNormAct2d):
        module.process_group = WORLD if process_group is None else process_group
        return module
    if isinstance(module, _BatchNorm):
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        return converted
    for name, child in module.named_children():
        module.add_module(name, convert_sync_batchnorm(child, process_group))
    return module
