"""Convolution with a prologue and an epilogue, as a module and as a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..activation.reference import ACTIVATIONS
from ..core.operator import autocasts
from .op import CONV2D_ACT, NAME, Prologue, at_once, check
from .op import conv2d_act as _conv2d_act


def _code(name: object, what: str) -> int:
    code = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if code is None:
        raise ValueError(f"nnfast.{NAME}: {what} is {name!r}; it needs to be one of {', '.join(ACTIVATIONS)}")
    return code


def _pair(value: Any, name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise TypeError(f"nnfast.{NAME}: {name} is {value!r}; it needs an int or two")
    return pair[0], pair[1]


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """As autocast does."""
    castable = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if castable else x


def conv2d_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    act: str = "identity",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    prologue: tuple[Any, ...] | None = None,
) -> Tensor:
    """act(F.conv2d(p(input), weight, bias, ...) + residual), p(x) = prologue_act(x * scale + shift).

    Our kernels serve channels_last tensors, kernels to 7x7, stride 1 and 2; `nnfast.explain` names what keeps
    a call from them, and torch's own convolution serves it. float32 is multiplied as such unless
    torch.backends.cudnn.conv.fp32_precision is "tf32".

    Args:
        input: (N, C, H, W) in float64, float32, bfloat16 or float16.
        weight: (O, C / groups, kH, kW), of input's dtype; under autocast both are cast as for F.conv2d.
        bias: (O,).
        stride: of the convolution, in pixels; an int or (height, width), as are padding and dilation.
        padding: zeros on each side; they stand beside what the prologue makes of the input, not before it.
        dilation: between the kernel's pixels.
        groups: of channels that are convolved apart.
        act: "identity", "relu", "leaky_relu", "silu" (or "swish") or "mish".
        negative_slope: of leaky_relu.
        residual: of the result's shape, dtype and device; added before the activation.
        prologue: (scale, shift, act) or (scale, shift, act, negative_slope), scale and shift (C,): the
            activation of a batch norm, which is then not stored.

    Returns:
        (N, O, H', W') of input's dtype.

    Raises:
        TypeError: for an argument of a wrong type.
        NotImplementedError: for a dtype that is not floating-point.
        ValueError: for a wrong shape, dtype, device or activation.
        BackendError: if a forced backend cannot serve.
    """
    if prologue is None:
        y = at_once(input, weight, bias, residual, stride, padding, dilation, groups, act, negative_slope)
        if y is not None:
            return y
    arguments = _arguments(
        input, weight, bias, stride, padding, dilation, groups,
        act=act, negative_slope=negative_slope, residual=residual, prologue=prologue,
    )  # fmt: skip
    check(*arguments[:-2])
    return _conv2d_act(*arguments)


def _arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    act: str = "identity",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    prologue: tuple[Any, ...] | None = None,
) -> tuple[Any, ...]:
    """The operation's arguments, for `nnfast.explain`."""
    before = None
    if prologue is not None:
        if not isinstance(prologue, tuple) or len(prologue) not in (3, 4):
            raise TypeError(f"nnfast.{NAME}: prologue is {prologue!r}; it needs (scale, shift, act)")
        scale, shift, name, *slope = prologue
        before = Prologue(scale, shift, _code(name, "prologue's act"), *slope)
    if isinstance(input, Tensor) and autocasts(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = _cast(input, dtype), _cast(weight, dtype)
        residual = None if residual is None else _cast(residual, dtype)
    numbers = ((stride, "stride"), (padding, "padding"), (dilation, "dilation"))
    pairs = [_pair(value, name) for value, name in numbers]
    return input, weight, bias, residual, before, *pairs, groups, _code(act, "act"), negative_slope


conv2d_act.nnfast_op = NAME  # type: ignore[attr-defined]
CONV2D_ACT.arguments = _arguments


class Conv2dAct(nn.Conv2d):
    """nn.Conv2d, a residual and an activation: act(conv(x) + residual). Its parameters are nn.Conv2d's.

    Input: (N, C, H, W), output: (N, out_channels, H', W').

    Args:
        in_channels: C.
        out_channels: channels of the result.
        kernel_size: nn.Conv2d's, as are stride, padding, dilation, groups and bias.
        stride: of the convolution.
        padding: of the convolution, in pixels.
        dilation: of the convolution.
        groups: of the convolution.
        bias: have a bias.
        act: "identity", "relu", "leaky_relu", "silu" (or "swish") or "mish".
        negative_slope: of leaky_relu.
        device: of parameters.
        dtype: of parameters.

    Raises:
        ValueError: for an unknown activation, and what nn.Conv2d refuses.
    """

    nnfast_op = NAME

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        act: str = "relu",
        negative_slope: float = 0.01,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _code(act, "act"), _pair(padding, "padding")
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        super().__init__(*sizes, device=device, dtype=dtype)
        self.act, self.negative_slope = act, negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(conv(input) + residual); residual: like the result. See `nnfast.functional.conv2d_act`."""
        sizes: Any = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d_act(
            input, self.weight, self.bias, *sizes,
            act=self.act, negative_slope=self.negative_slope, residual=residual,
        )  # fmt: skip

    def nnfast_arguments(self, input: Tensor, residual: Tensor | None = None) -> tuple[Any, ...]:
        """The operation's arguments, for `nnfast.explain`."""
        sizes: Any = (self.stride, self.padding, self.dilation, self.groups)
        return _arguments(
            input, self.weight, self.bias, *sizes,
            act=self.act, negative_slope=self.negative_slope, residual=residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """nn.Conv2d's, and the activation."""
        slope = f", negative_slope={self.negative_slope}" * (self.act == "leaky_relu")
        return f"{super().extra_repr()}, act={self.act!r}{slope}"  # type: ignore[no-untyped-call]
