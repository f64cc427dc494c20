"""3x3 convolutions at stride 1 in float32 on the CPU, by Winograd's F(2x2, 3x3) in C++: 16 products where the
definition takes 36 (Winograd 1980; Lavin and Gray 2015, arXiv:1509.09308).

Errors are those of float32 relative to the largest of a patch of 4x4 pixels. An infinity or NaN, or what
overflows on the way, would spread over a patch: where any result is not finite, all are the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import extension, tuning
from ..core.operator import LIBRARY, define
from . import reference

NAME = "conv2d_act_winograd"

LARGEST_PADDING = 2

_NORM = "Tensor? center, Tensor? scale, Tensor? shift, int prologue, float prologue_slope"
_TAIL = "int pad_height, int pad_width, int act, float slope"


def _unknown(*args: object) -> None:
    raise NotImplementedError("nnfast: a part of an operator that is opaque itself")


transform = define(LIBRARY, f"{NAME}_weights(Tensor weight, bool backward) -> Tensor", _unknown)
"""Weights (O, C, 3, 3) as the forward takes them too, or, backward, as the input gradient does."""

_forward = define(
    LIBRARY,
    f"{NAME}(Tensor x, Tensor weights, int made, Tensor? bias, Tensor? residual, {_NORM}, "
    f"{_TAIL}, bool with_statistics) -> (Tensor, Tensor, bool)",
    _unknown,
)
_input_gradient = define(
    LIBRARY,
    f"{NAME}_input_gradient(Tensor grad, Tensor? y, Tensor weights, Tensor? added, Tensor? x, "
    f"{_NORM}, int channels, int height, int width, {_TAIL}, bool scaled) -> (Tensor, Tensor, Tensor, bool)",
    _unknown,
)
_weight_gradient = define(
    LIBRARY,
    f"{NAME}_weight_gradient(Tensor grad, Tensor? y, Tensor x, {_NORM}, {_TAIL}, "
    "bool with_bias) -> (Tensor, Tensor, bool)",
    _unknown,
)


def why_not(
    dtype: torch.dtype, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> list[str]:
    """Every reason why these kernels have no such convolution."""
    reasons = []
    if dtype != torch.float32:
        reasons.append(f"x has dtype {dtype}; Winograd's convolution takes torch.float32")
    if tuple(kernel) != (3, 3):
        reasons.append(f"the kernel is {kernel[0]}x{kernel[1]}; Winograd's convolution has 3x3")
    if tuple(stride) != (1, 1):
        reasons.append(f"stride is {tuple(stride)}; Winograd's convolution has 1")
    if max(padding) > LARGEST_PADDING:
        reasons.append(f"padding is {tuple(padding)}; Winograd's convolution has {LARGEST_PADDING} at most")
    return reasons


def not_worth(x: Tensor, weight: Tensor) -> list[str]:
    """Why torch's own convolution is the better choice."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return ["not measured to be faster without AVX2 or AVX-512"]
    made, channels = weight.shape[:2]
    tiles = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
    least = tuning.WINOGRAD
    found = {
        "channels": (min(made, channels), least.channels),
        "pairs of channels": (made * channels, least.pairs),
        "tiles of 2x2 pixels": (tiles, least.tiles),
        "pairs of channels times tiles": (made * channels * tiles, least.products),
    }
    return [
        f"{count} {what}; measured to pay from {needed} on"
        for what, (count, needed) in found.items()
        if count < needed
    ]


def small(x: Tensor, weight: Tensor) -> bool:
    """x: (N, C, H, W) on the CPU, in torch's own wide types, is too small for it, told at once."""
    if not (x.is_cpu and x.dim() == 4 and x.dtype in (torch.float32, torch.float64)):
        return False
    least = tuning.WINOGRAD
    return weight.numel() < 9 * least.pairs or x.numel() < least.channels * least.tiles


def _check(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
    missing = extension.why_not(NAME, "CPU")
    if reasons := [missing] * bool(missing) + why_not(x.dtype, kernel, stride, padding):
        raise RuntimeError(f"nnfast::conv2d_act.cpu: {'; '.join(reasons)}")


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _last_if(x: Tensor | None) -> Tensor | None:
    return None if x is None else _last(x)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: int,
    prologue_slope: float,
    stride: list[int],
    padding: list[int],
    act: int,
    slope: float,
    with_statistics: bool,
    transformed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator; transformed: what `transform` makes of the weight, where it is kept."""
    _check(x, weight.shape[2:], stride, padding)
    weights = weight if transformed is None else transformed
    norm = (center, scale, shift, prologue, prologue_slope)
    y, statistics, finite = _forward(
        _last(x), weights, weight.shape[0], bias, _last_if(residual), *norm, *padding, act, slope,
        with_statistics,
    )  # fmt: skip
    if finite:
        return y, statistics
    return reference.forward(x, weight, bias, residual, *norm, stride, padding, act, slope, with_statistics)


def input_gradient(
    grad: Tensor,
    y: Tensor | None,
    weight: Tensor,
    added: Tensor | None,
    x: Tensor | None,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: int,
    prologue_slope: float,
    size: list[int],
    stride: list[int],
    padding: list[int],
    act: int,
    slope: float,
    scaled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator."""
    _check(grad, weight.shape[2:], stride, padding)
    norm = (center, scale, shift, prologue, prologue_slope)
    dx, sum_dz, sum_dz_x, finite = _input_gradient(
        _last(grad), _last_if(y), weight, _last_if(added), _last_if(x), *norm, *size[1:],
        *padding, act, slope, scaled,
    )  # fmt: skip
    if finite:
        return dx, sum_dz, sum_dz_x
    return reference.input_gradient(
        grad, y, weight, added, x, *norm, size, stride, padding, act, slope, scaled
    )


def weight_gradient(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: int,
    prologue_slope: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    act: int,
    slope: float,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    """The operator."""
    _check(grad, kernel, stride, padding)
    norm = (center, scale, shift, prologue, prologue_slope)
    dweight, dbias, finite = _weight_gradient(
        _last(grad), _last_if(y), _last(x), *norm, *padding, act, slope, with_bias
    )
    if finite:
        return dweight, dbias
    return reference.weight_gradient(grad, y, x, *norm, kernel, stride, padding, act, slope, with_bias)
