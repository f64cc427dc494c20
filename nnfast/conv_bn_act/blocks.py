"""Convolution, batch norm, residual and activation as one call, and the residual blocks made of such calls.

The convolution is torch's. In training the batch norm, the addition and the activation are `normalise`'s two
passes; in inference they are part of the convolution (`fold`). `CONV_BN_ACT` decides for each convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..activation.module import Mish, SiLU
from ..convolution import winograd
from ..convolution.op import CONV2D_ACT, plain_convolution, plain_gradients
from ..convolution.op import Kernels as Convolutions
from ..core import extension, tuning
from ..core.op import Backend, Explanation, Op, describe, forced, forced_outside_compile
from ..core.operator import autocasts, traced, transformed
from ..core.snapshot import unwatched
from . import fold, links, replay
from .module import activation_code, batch_norm_act, norm_of, normalise
from .op import BATCH_NORM_ACT, again, in_layout, recomputing, takes_any_layout
from .replay import observers

NAME = "conv_bn_act"


class Unit(NamedTuple):
    """A convolution and a batch norm, and an activation: a module, or a name and leaky_relu's slope."""

    conv: Any
    bn: Any
    act: nn.Module | str = "identity"
    slope: float = 0.01


class ConvBNAct(nn.Module):
    """act(bn(conv(x)) + residual): a convolution, its batch norm and an activation in one module.

    Children are `conv`, an nn.Conv2d, and `bn`, an nn.BatchNorm2d; state_dict has theirs.
    Input: (N, C, H, W), output: (N, out_channels, H', W').

    Args:
        in_channels: C.
        out_channels: channels of the result.
        kernel_size: nn.Conv2d's, as are stride, padding ("same" and "valid" too), dilation, groups.
        stride: of the convolution.
        padding: of the convolution.
        dilation: of the convolution.
        groups: of the convolution.
        bias: the convolution has a bias. In training it cancels; it is not added then.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        act: "identity", "relu", "leaky_relu", "silu" (or "swish") or "mish".
        negative_slope: of leaky_relu.
        eps: nn.BatchNorm2d's, as are momentum, affine and track_running_stats.
        momentum: of the running statistics.
        affine: the batch norm has a weight and a bias.
        track_running_stats: keep running statistics.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

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
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        act: str = "relu",
        negative_slope: float = 0.01,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        activation_code(act)
        self.act, self.negative_slope = act, negative_slope
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            **place,
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, **place)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(bn(conv(input)) + residual).

        Args:
            input: (N, C, H, W), of the parameters' dtype.
            residual: of the result's shape, dtype and device.

        Raises:
            ValueError: for a residual of another shape, dtype or device, and in training for one value per
                channel.
            RuntimeError: what nn.Conv2d raises for a wrong input.
        """
        if residual is None:
            return _repeated(self, self._units(), input, None, None)
        return _chain(self._units(), input, residual)

    def _units(self) -> list[Unit]:
        return [Unit(self.conv, self.bn, self.act, self.negative_slope)]

    def explain(self, input: Tensor, residual: Tensor | None = None) -> Explanation:
        """What `nnfast.explain(module, input)` says."""
        return explain_units(self._units(), input, residual)

    def extra_repr(self) -> str:
        """The activation."""
        return f"act={self.act!r}" + f", negative_slope={self.negative_slope}" * (self.act == "leaky_relu")


class _Residual(nn.Module):
    """What residual blocks share: units named conv1, bn1, conv2, ..., and a shortcut around them.

    Forward looks for nothing but these, `relu` (or `act1`, `act2`, ...) and `downsample` (or `shortcut`), so
    that an instance of another library's block may be given one of these classes.
    """

    nnfast_op = NAME
    _LENGTH = 2

    def forward(self, x: Tensor) -> Tensor:
        """The block's result. Input: (N, C, H, W); output: (N, C', H', W')."""
        return _repeated(self, self._units(), x, x, self._shortcut())

    def explain(self, x: Tensor) -> Explanation:
        """What `nnfast.explain(module, x)` says: of each convolution."""
        return explain_units(self._units(), x, x, self._shortcut())

    def _units(self) -> list[Unit]:
        children: dict[str, Any] = self._modules
        relu = children.get("relu", "relu")
        return [
            Unit(children[f"conv{i}"], children[f"bn{i}"], children.get(f"act{i}", relu))
            for i in range(1, self._LENGTH + 1)
        ]

    def _shortcut(self) -> nn.Module | None:
        return self._modules.get("downsample", self._modules.get("shortcut"))


class ResidualBlock(_Residual):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), with 3x3 convolutions that have a bias.

    The shortcut is empty, or a 1x1 convolution and its batch norm where stride or channels ask for one.
    state_dict has conv1, bn1, conv2, bn2 and shortcut.0, shortcut.1.

    Args:
        in_channels: C of the input (N, C, H, W).
        out_channels: channels of the result.
        stride: of the first convolution and of the shortcut's.

    Source: He et al. 2015, arXiv:1512.03385.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
            )


class BasicBlock(_Residual):
    """torchvision's BasicBlock: two 3x3 convolutions; ResNet-18's, -34's. Same constructor and state_dict.

    Args:
        inplanes: C of the input (N, C, H, W).
        planes: channels of the result.
        stride: of the first convolution.
        downsample: the shortcut; None for the input itself.
        groups: 1.
        base_width: 64.
        dilation: 1.
        norm_layer: makes a batch norm of a number of channels; None for nn.BatchNorm2d.

    Raises:
        ValueError: for other groups or base_width.
        NotImplementedError: for another dilation.

    Source: He et al. 2015, arXiv:1512.03385.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"nnfast.BasicBlock: groups is {groups} and base_width {base_width}; it needs 1 and 64"
            )
        if dilation > 1:
            raise NotImplementedError(f"nnfast.BasicBlock: dilation is {dilation}; it needs to be 1")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride


class Bottleneck(_Residual):
    """torchvision's Bottleneck: 1x1, 3x3 and 1x1 convolutions, of ResNet-50 and on, ResNeXt and Wide ResNet.

    Same constructor, same state_dict.

    Args:
        inplanes: C of the input (N, C, H, W).
        planes: a quarter of the result's channels.
        stride: of the 3x3 convolution.
        downsample: the shortcut; None for the input itself.
        groups: of the 3x3 convolution.
        base_width: its channels are planes * base_width / 64 * groups.
        dilation: of the 3x3 convolution.
        norm_layer: makes a batch norm of a number of channels; None for nn.BatchNorm2d.

    Source: He et al. 2015, arXiv:1512.03385; Xie et al. 2016, arXiv:1611.05431.
    """

    expansion = 4
    _LENGTH = 3

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    act: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """act(F.batch_norm(F.conv2d(input, weight, bias), ...) + residual).

    Nothing is folded: that pays for modules, which keep what is folded. See `ConvBNAct`.

    Args:
        input: (N, C, H, W).
        weight: (out_channels, C / groups, kH, kW).
        bias: (out_channels,) or None.
        running_mean: (out_channels,); F.batch_norm's, as are those up to eps.
        running_var: of the same shape.
        bn_weight: gamma.
        bn_bias: beta.
        training: normalise with the statistics of the batch, and update the running ones.
        momentum: the batch's share in them.
        eps: added to the variance.
        stride: F.conv2d's, as are padding, dilation and groups.
        padding: of the convolution.
        dilation: of the convolution.
        groups: of the convolution.
        act: "identity", "relu", "leaky_relu", "silu" (or "swish") or "mish".
        negative_slope: of leaky_relu.
        residual: of the result's shape, dtype and device.

    Raises:
        What F.conv2d and `batch_norm_act` raise.
    """
    activation_code(act)
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return batch_norm_act(
        y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
        act=act, negative_slope=negative_slope, residual=residual,
    )  # fmt: skip


# --- a chain of units ---------------------------------------------------------------------------------------


def _repeated(
    module: nn.Module, units: Sequence[Unit], x: Tensor, residual: Tensor | None, shortcut: nn.Module | None
) -> Tensor:
    """`_chain`, at once where a call like this one is known."""
    known = replay.again(module, x)
    if known is not None:
        return known
    if _traced(x) or torch.is_grad_enabled():
        return _chain(units, x, residual, shortcut)

    def calls() -> list[Any] | None:
        acts = [_known(unit) for unit in units]
        parts = () if shortcut is None else _parts(shortcut)
        if parts is None or None in acts:
            return None
        found: list[Any] = [(unit.conv, unit.bn, False, act) for unit, act in zip(units, acts, strict=True)]
        last = (*found.pop()[:2], residual is not None, acts[-1])
        return [*found, *((unit.conv, unit.bn, False, ("identity", 0.0)) for unit in parts), last]

    result: Tensor = replay.noted(module, x, calls, partial(_chain, units, x, residual, shortcut))
    return result


def _chain(
    units: Sequence[Unit], x: Tensor, residual: Tensor | None, shortcut: nn.Module | None = None
) -> Tensor:
    """The units one after another; the last adds the residual or shortcut(x) before its activation."""
    if _traced(x):
        return _as_written(units, x, residual, shortcut)
    parts = None if shortcut is None else _parts(shortcut)
    if parts is None:
        return chain(units, x, residual, shortcut=shortcut)
    return chain(units, x, None if parts else residual, parts[0] if parts else None)


def chain(
    units: Sequence[Unit],
    x: Tensor,
    residual: Tensor | None = None,
    projection: Unit | None = None,
    shortcut: nn.Module | None = None,
) -> Tensor:
    """The units one after another; the last adds residual, projection(x) or shortcut(x), then activates.

    x is an ordinary tensor; the projection's activation is the identity.
    """
    if len(units) == 1 and projection is None and shortcut is None:
        y = _again(units[0], x, residual)
        if y is not None:
            return y
    alone = len(units) == 1 and residual is not None  # which would take the same way
    via = not alone and _pays_channels_last([*units, *([projection] if projection else [])], x)
    y = entered = _enter(x) if via else x
    pair = (x, entered) if via else None
    if not via and (found := _links(units, x, projection)):
        return links.train(found[0], found[1], x, residual if shortcut is None else shortcut(x), found[2])
    for unit in units[:-1]:
        y = run(unit, y, via=pair)
    if shortcut is not None:
        residual = shortcut(x)
    elif residual is x:
        residual = entered
    y = run(units[-1], y, residual, (projection, entered) if projection else None, via=pair)
    return _leave(y) if via and not y.is_contiguous() else y


Links = tuple[Any, list[links.Link], links.Link | None]


def _links(units: Sequence[Unit], x: Tensor, projection: Unit | None) -> Links | None:
    """The units as links of a chain that trains by our own convolutions, if these are the choice."""
    if not _ours_possible(x):
        return None
    made = []
    for unit in (*units, *([projection] if projection else [])):
        act = ("identity", 0.01) if unit is projection else _known(unit)
        if act is None or not fold.plain_conv(unit.conv) or not fold.plain_norm(unit.bn):
            return None
        made.append(links.Link(unit.conv, unit.bn, activation_code(act[0]), act[1]))
    last = made.pop() if projection else None
    if last is not None and last.bn is made[-1].bn:
        return None
    kernels = links.convolutions(made, x, last)
    if kernels is None:
        return None
    for unit in units:
        fold.forget(unit.conv, unit.bn)
    return kernels, made, last


def _traced(x: Any) -> bool:
    """Somebody looks on who is to see torch's own operations: a compiler, tracer, transform, subclass."""
    if torch.compiler.is_compiling():
        return True
    return (type(x) is not Tensor and type(x) is not nn.Parameter) or transformed() or traced()


def _as_written(
    units: Sequence[Unit], x: Tensor, residual: Tensor | None, shortcut: nn.Module | None
) -> Tensor:
    """The modules one after another."""
    y = x
    for unit in units[:-1]:
        y = _activate(unit, unit.bn(unit.conv(y)))
    last = units[-1]
    y = last.bn(last.conv(y))
    if shortcut is not None:
        residual = shortcut(x)
    if residual is not None:
        y += residual
    return _activate(last, y)


_FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda y, slope: y,
    "relu": lambda y, slope: F.relu(y),
    "leaky_relu": lambda y, slope: F.leaky_relu(y, slope),
    "silu": lambda y, slope: F.silu(y),
    "swish": lambda y, slope: F.silu(y),
    "mish": lambda y, slope: F.mish(y),
}


def _activate(unit: Unit, y: Tensor) -> Tensor:
    if isinstance(unit.act, str):
        return _FUNCTIONS[unit.act](y, unit.slope)
    result: Tensor = unit.act(y)
    return result


def _parts(shortcut: nn.Module) -> tuple[Unit, ...] | None:
    """The convolution and batch norm that a shortcut consists of; () if empty, None if it is neither."""
    if type(shortcut) is not nn.Sequential or not unwatched(shortcut):
        return None
    children = list(shortcut)
    if not children:
        return ()
    if len(children) == 2 and fold.plain_conv(children[0]) and fold.plain_norm(children[1]):
        return (Unit(children[0], children[1]),)
    return None


_ACTIVATIONS: dict[type, str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    SiLU: "silu",
    Mish: "mish",
}


def _known(unit: Unit) -> tuple[str, float] | None:
    """Name and slope of the unit's activation; None if it is a module that must be called."""
    act = unit.act
    if isinstance(act, str):
        return act, unit.slope
    name = _ACTIVATIONS.get(type(act))
    if name is None or not unwatched(act):
        return None
    return name, getattr(act, "negative_slope", 0.01)


Via = tuple[Tensor, Tensor] | None


def run(
    unit: Unit,
    x: Tensor,
    residual: Tensor | None = None,
    projection: tuple[Unit, Tensor] | None = None,
    *,
    via: Via = None,
) -> Tensor:
    """One unit, with a residual or with a projection (unit, input) added before its activation.

    via: where the block runs in channels_last, its contiguous input and that in channels_last.
    """
    if unit.bn.training:
        fold.forget(unit.conv, unit.bn)
    known = _known(unit)
    act, slope = known or ("identity", 0.01)
    if projection is not None:
        found = _infer(projection[0], projection[1])
        if found is not None:
            residual, projection = found, None
    for observe in observers:
        observe(x, CONV_BN_ACT.explain(unit.conv, unit.bn, x, residual, act, slope))
    y = None if projection is not None else _infer(unit, x, residual, act, slope)
    if y is None:
        y = _unfolded(unit, x, residual, projection, act, slope, via)
    return y if known else _activate(unit, y)


def _again(unit: Unit, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """What a unit like this gave before, at once; None where that is not known."""
    if torch.is_grad_enabled() or forced_outside_compile() is not None or observers:
        return None
    known = _known(unit)
    return None if known is None else fold.run_again(unit.conv, unit.bn, x, residual, *known)


def _infer(
    unit: Unit, x: Tensor, residual: Tensor | None = None, act: str = "identity", slope: float = 0.01
) -> Tensor | None:
    """One unit with the batch norm in the convolution, if that is the choice: in ours, or in torch's."""
    if unit.bn.training:
        return None
    arguments = (unit.conv, unit.bn, x, residual, act, slope)
    y = fold.run_again(*arguments) if forced() is None else None
    if y is None and (_ours_possible(x) or _winograd_possible(unit.conv, x)):
        y = links.infer(*arguments)
    return CONV_BN_ACT.infer(*arguments) if y is None else y


def _ours_possible(x: Tensor) -> bool:
    """Our own convolutions may be the choice: looked at before all that costs more."""
    name = forced()
    return name == "triton" or (name is None and x.is_cuda and x.numel() >= CONV2D_ACT.least)


def _winograd_possible(conv: Any, x: Tensor) -> bool:
    """The same of our convolution on the CPU, which serves one convolution alone too."""
    return (
        x.is_cpu
        and x.dtype is torch.float32
        and forced() in (None, "cpu")
        and x.dim() == 4
        and fold.plain_conv(conv)
        and (conv.kernel_size, conv.stride, conv.groups, conv.in_channels) == ((3, 3), (1, 1), 1, x.shape[1])
        and not torch.is_autocast_enabled("cpu")
    )


def _winograd_serves(conv: Any, x: Tensor) -> bool:
    """It does, of x in channels_last."""
    padded = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return padded and _winograd_possible(conv, x) and not extension.why_not(winograd.NAME, "CPU")


def _winograd(conv: nn.Conv2d, x: Tensor) -> Convolutions | None:
    """Its operators, if they are the choice for x."""
    if not _winograd_serves(conv, x):
        return None
    return CONV2D_ACT.ours(
        x, conv.weight, conv.bias, None, None, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _unfolded(
    unit: Unit,
    x: Tensor,
    residual: Tensor | None,
    projection: tuple[Unit, Tensor] | None,
    act: str,
    slope: float,
    via: Via,
) -> Tensor:
    if via is None and _small(unit, x) and (projection is None or _small(*projection)):
        y = _by_torch(unit, x, residual, projection, act, slope)
        if y is not None:
            return y
    y, offset = _convolve(unit, x, via)
    bn, residual_bn, residual_offset = unit.bn, None, None
    if projection is not None:
        residual, residual_offset = _convolve(*projection, via)
        residual_bn = projection[0].bn
    if residual is not None and residual.dtype != y.dtype and autocasts(y):
        residual = residual.to(y.dtype)  # as `y += residual` does
    if fold.plain_norm(bn):
        return normalise(
            bn, y, residual=residual, residual_bn=residual_bn, act=act, negative_slope=slope,
            offset=offset, residual_offset=residual_offset,
        )  # fmt: skip
    y = bn(y)
    if residual_bn is not None and residual is not None:
        residual = normalise(residual_bn, residual, offset=residual_offset)
    if residual is not None:
        y = y + residual
    return _FUNCTIONS[act](y, slope)


class Extent(NamedTuple):
    """What of some modules decides from which size of images on kernels of ours are the choice in training.

    Attributes:
        elements: most that a batch norm has for a pixel of the input.
        winograd: there is a convolution that Winograd's serves, if there are pixels enough.
    """

    elements: int
    winograd: bool

    def small(self, x: Tensor) -> bool:
        """x is so small that torch's own are, told at once."""
        if not x.is_cpu or forced_outside_compile() is not None:
            return False
        numel, channels = x.numel(), x.shape[1]
        if self.winograd and numel >= 4 * tuning.WINOGRAD.tiles * channels:
            return False
        least = BATCH_NORM_ACT.least.elements(x.element_size() < 4, x.shape[2:].numel())
        return numel * self.elements < least * channels


def extent(modules: Iterable[nn.Module]) -> Extent:
    """That of convolutions and batch norms among modules, each with the convolution before it."""
    elements, area, winograd = 0, 1, False
    for each in modules:
        if isinstance(each, nn.BatchNorm2d):
            elements, area = max(elements, -(-each.num_features // area)), 1
        elif isinstance(each, nn.Conv2d):
            area = each.stride[0] * each.stride[1]
            if each.kernel_size == (3, 3) and each.groups == 1 and area == 1:
                least = min(each.in_channels, each.out_channels)
                winograd = winograd or least >= tuning.WINOGRAD.channels
    return Extent(elements, winograd)


def _small(unit: Unit, x: Tensor) -> bool:
    """The unit trains on a small image, and goes wrong no later than a unit of ours would."""
    conv, bn = unit.conv, unit.bn
    plain = type(conv) is nn.Conv2d and type(bn) is nn.BatchNorm2d and conv.out_channels == bn.num_features
    if not (plain and bn.training and x.dim() == 4):
        return False
    found = extent((conv, bn))
    if found.winograd and not x.is_contiguous(memory_format=torch.channels_last):
        found = found._replace(winograd=False)  # which takes no other order
    return found.small(x)


def _by_torch(
    unit: Unit,
    x: Tensor,
    residual: Tensor | None,
    projection: tuple[Unit, Tensor] | None,
    act: str,
    slope: float,
) -> Tensor | None:
    """The modules themselves, one after another; None for what is to raise before statistics change."""
    y: Tensor = unit.conv(x)
    values = y.numel() // unit.conv.out_channels
    if values < 2 or (residual is not None and (residual.shape != y.shape or residual.dtype != y.dtype)):
        return None
    z = None
    if projection is not None:
        z = projection[0].conv(projection[1])
        if z.shape != y.shape or z.dtype != y.dtype:
            return None
    y = _once(unit.bn, y)
    if z is not None:
        residual = _once(projection[0].bn, z)  # type: ignore[index]
    if residual is not None:
        y += residual
    return F.relu_(y) if act == "relu" else _FUNCTIONS[act](y, slope)


def _once(bn: nn.BatchNorm2d, y: Tensor) -> Tensor:
    """bn(y) in training; a forward that checkpointing repeats does not count again."""
    with kept_statistics([bn]) if recomputing() else nullcontext():
        return bn(y)  # type: ignore[no-any-return]


@contextmanager
def kept_statistics(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Batch norms have the buffers afterwards that they had before."""
    before = [(buffer, buffer.clone()) for bn in norms for buffer in bn.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, values in before:
            buffer.data.copy_(values)  # which autograd has saved, and never reads


def _convolve(unit: Unit, x: Tensor, via: Via) -> tuple[Tensor, Tensor | None]:
    """The convolution's result, and its bias if that was left out: the batch norm takes it away."""
    conv, bn = unit.conv, unit.bn
    if not fold.plain_conv(conv):
        return conv(x), None
    assert isinstance(conv, nn.Conv2d)
    weight, bias, offset = conv.weight, conv.bias, None
    if bias is not None and (bn.training or bn.running_mean is None) and fold.plain_norm(bn):
        offset, bias = bias, None
    grad = torch.is_grad_enabled() and weight.requires_grad
    if grad and via is not None:
        weight = _contiguous_gradient(weight)
    less = grad and ((via is not None and x is via[1]) or _saving_pays(conv))
    weight_first = less and bias is None and _weight_first_serves(conv, x)
    kernels = _winograd(conv, x)
    with _saving_less(x, via) if less else nullcontext():
        if weight_first:
            y: Tensor = _weight_first(x, weight, conv, x.grad_fn, kernels)
            return y, offset
        if kernels is not None:
            return plain_convolution(kernels, x, weight, bias, conv.stride, conv.padding), offset
        return conv._conv_forward(x, weight, bias), offset


# --- what autograd keeps ------------------------------------------------------------------------------------


class _Again:
    """A tensor that is computed again when autograd asks for it."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute = compute


def _saving_less(x: Tensor, via: Via) -> AbstractContextManager[Any]:
    """In here the convolution of x keeps what x was made from, which something else keeps anyway, but not x.

    That costs a pass over x in backward.
    """
    compute = _entering(via[0]) if via is not None and x is via[1] else again(x)
    if compute is None or _others_save():
        return nullcontext()
    pointer, made = x.data_ptr(), _Again(compute)
    return saved_tensors_hooks(
        lambda saved: made if saved.data_ptr() == pointer else saved,
        lambda kept: kept.compute() if isinstance(kept, _Again) else kept,
    )


def _saving_pays(conv: nn.Conv2d) -> bool:
    least = tuning.RECOMPUTE_PRODUCTS * conv.in_channels * conv.stride[0] * conv.stride[1]
    return conv.weight.numel() >= least


def _weight_first_serves(conv: nn.Conv2d, x: Tensor) -> bool:
    zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    kept = again(x) is not None and not _others_save()
    return zeros and kept and not autocasts(x)


def _others_save() -> bool:
    """Somebody else decides what is kept, as checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _WeightFirst(torch.autograd.Function):
    """conv(x), where x is computed again in backward: it is gone before its gradient comes.

    kernels: our operators, or None for torch's.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, conv: nn.Conv2d, made_by: Any, kernels: Convolutions | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = (conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups)
        ctx.made_by, ctx.kernels = made_by, kernels
        if kernels is not None:
            return plain_convolution(kernels, x, weight, None, conv.stride, conv.padding)
        y: Tensor = conv._conv_forward(x, weight, None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_weight, *_ = ctx.needs_input_grad
        x, weight = ctx.saved_tensors
        back: Any = torch.ops.aten.convolution_backward
        if torch.is_grad_enabled():
            dx, dw, _ = back(grad, x, weight, None, *ctx.options, [need_x, need_weight, False])
            return dx, dw, None, None, None
        if ctx.kernels is not None:
            back = partial(_back, ctx.kernels)
        dw = back(grad, x, weight, None, *ctx.options, [False, True, False])[1] if need_weight else None
        del x
        if not need_x:
            return None, dw, None, None, None
        like = ctx.made_by.saved_tensors[0]  # of x's shape and layout; its values are not read
        dx = back(grad, like, weight, None, *ctx.options, [True, False, False])[0]
        return dx, dw, None, None, None


def _back(
    kernels: Convolutions,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    _: None,
    stride: Sequence[int],
    padding: Sequence[int],
    *options: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """aten's convolution_backward, of x or of the weight, by our operators."""
    return plain_gradients(kernels, grad, x, weight, stride, padding, options[-1][:2])


_weight_first: Callable[..., Tensor] = _WeightFirst.apply


def _entering(x: Tensor) -> Callable[[], Tensor]:
    """Brings x into channels_last again, if it is as it was."""
    kept, version = x.detach(), x._version

    def compute() -> Tensor:
        if kept._version != version:
            raise RuntimeError(
                "nnfast: the input of a residual block, needed for gradient computation, has been modified "
                f"by an inplace operation: it is at version {kept._version}; expected {version}"
            )
        return in_layout(kept, channels_last=True)

    return compute


# --- contiguous blocks inside in channels_last --------------------------------------------------------------


def _pays_channels_last(units: Sequence[Unit], x: Tensor) -> bool:
    """Contiguous x is worth the way into channels_last, and the result's back.

    Measured for float32 on the CPU: oneDNN's convolutions of contiguous tensors are slower, their strided
    gradients much.
    """
    if len(units) > 1 and x.numel() < tuning.WINOGRAD_ELEMENTS:  # which is the lesser one
        return False
    if not (
        x.is_cpu
        and x.dtype is torch.float32
        and x.dim() == 4
        and x.is_contiguous()
        and not x.is_contiguous(memory_format=torch.channels_last)
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
    ):
        return False
    stride, weights, safe = 1, [], True
    for conv, bn, *_ in units:
        if not (fold.plain_conv(conv) and fold.plain_norm(bn)):
            return False
        assert isinstance(conv, nn.Conv2d)
        weight = conv.weight
        if fold.channels_last(weight) or not weight.is_contiguous() or len(conv.stride) != 2:
            return False  # in channels_last so is torch's result
        stride = max(stride, *conv.stride)
        weights.append(weight)
        strided = conv.kernel_size == (1, 1) and max(conv.stride) > 1
        safe = safe and not (strided and weight.shape[1] < _LEAST_STRIDED)
    differentiates = torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights))
    if differentiates and not safe:
        return False
    if len(units) == 1:
        ours = _winograd_serves(units[0].conv, x) and not winograd.not_worth(x, weights[0])
        return ours or (differentiates and x.requires_grad and stride > 1)
    ours = all(unit[0].kernel_size == (3, 3) for unit in units) and stride == 1
    ours = ours and not extension.why_not(winograd.NAME, "CPU")
    if x.numel() < (tuning.WINOGRAD_ELEMENTS if ours else tuning.CHANNELS_LAST_ELEMENTS):
        return False
    least = tuning.WINOGRAD_PIXELS if ours else tuning.CHANNELS_LAST_PIXELS
    return not differentiates or x[0, 0].numel() >= least * stride**2


_LEAST_STRIDED = 16
"""Fewest channels of a strided 1x1 convolution whose weight gradient oneDNN finds in channels_last without
writing past its memory: with torch 2.13 fewer crash."""


class _Enter(torch.autograd.Function):
    """x in channels_last; its gradient contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return in_layout(x, channels_last=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if _batched(grad) else _leave(grad)  # differentiable


class _Leave(torch.autograd.Function):
    """x contiguous; its gradient in channels_last, or as it is if that is all the same to what made x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.as_it_is = takes_any_layout(x)
        return in_layout(x, channels_last=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if ctx.as_it_is or _batched(grad) else _enter(grad)


def _batched(grad: Tensor) -> bool:
    """Many gradients at once, whose format nobody can ask."""
    found: bool = torch._C._functorch.is_legacy_batchedtensor(grad)
    return found


class _ContiguousGradient(torch.autograd.Function):
    """x itself; its gradient contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if _batched(grad):
            return grad
        return grad.contiguous().flatten().view(grad.shape)  # of 1x1 weights too


_enter: Callable[[Tensor], Tensor] = _Enter.apply
_leave: Callable[[Tensor], Tensor] = _Leave.apply
_contiguous_gradient: Callable[[Tensor], Tensor] = _ContiguousGradient.apply


# --- who serves ---------------------------------------------------------------------------------------------


class ConvBNActOp(Op):
    """Who serves a unit: torch's convolution with the batch norm folded in, or that and `batch_norm_act`.

    Called with (conv, bn, x, residual, act, slope). The first backend has a name of its own, `folded`, since
    it is for inference alone, while `aten` is to serve any call.
    """

    def __init__(self) -> None:
        names = [b.name for b in BATCH_NORM_ACT.backends]
        ours = [
            Backend(name, _run_unit, partial(_ask, "why_not", name), partial(_ask, "not_worth", name))
            for name in names
        ]
        super().__init__(NAME, [Backend("folded", fold.run, fold.why_not, fold.not_worth), *ours])

    def example(self, device: str) -> tuple[Any, ...]:
        """Inference on a batch of 64 channels."""
        x = torch.empty(32, 64, 56, 56, device=device)
        unit = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))
        return *unit.requires_grad_(False).eval().to(x.device), x

    def infer(self, *arguments: Any) -> Tensor | None:
        """The result, if the choice is `folded`: what `choose` would say, without asking the others."""
        name = forced()
        if name == "folded":
            self.choose(*arguments)
        elif name is not None or fold.why_not(*arguments) or fold.not_worth(*arguments):
            return None
        return fold.run(*arguments)


def _run_unit(
    conv: nn.Module,
    bn: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.01,
) -> Tensor:
    return _unfolded(Unit(conv, bn), x, residual, None, act, slope, None)


def _ask(
    what: str,
    name: str,
    conv: nn.Module,
    bn: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.01,
) -> list[str]:
    """What a backend of `batch_norm_act` says of the convolution's result."""
    if not fold.plain_norm(bn):
        return ["bn is called as it is"] * (what == "why_not" and name != "aten")
    assert isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm)
    y = _stand_in(conv, bn, x)
    backend = next(b for b in BATCH_NORM_ACT.backends if b.name == name)
    found: list[str] = getattr(backend, what)(
        y, norm_of(bn, y, None), residual, None, activation_code(act), slope
    )
    return found


def _stand_in(conv: nn.Module, bn: nn.Module, x: Tensor) -> Tensor:
    """A tensor like the convolution's result, without its values."""
    shape = [x.shape[0], getattr(bn, "num_features", 1), *x.shape[2:]]
    if isinstance(conv, nn.Conv2d) and x.dim() == 4:
        shape = fold.output_shape(conv, x)
    y = x.new_empty(shape)
    if not x.is_contiguous() and x.dim() == 4:
        y = y.contiguous(memory_format=torch.channels_last)
    weight = getattr(conv, "weight", None)
    return y.requires_grad_(x.requires_grad or (weight is not None and weight.requires_grad))


def explain_units(
    units: Sequence[Unit], x: Tensor, residual: Tensor | None, shortcut: nn.Module | None = None
) -> Explanation:
    """Who serves each unit of a chain; `conv2: ` before a reason says whose it is.

    Beside the backends stands `conv2d_act`: why the convolutions are not ours, with statistics and batch norm
    in them, but torch's.
    """
    found: dict[str, Explanation] = {}
    ours: dict[str, tuple[str, list[str]]] = {}
    parts = None if shortcut is None else _parts(shortcut)
    chained = all(links.of_batch(unit.bn) for unit in (*units, *(parts or ())))
    alone = len(units) == 1 and residual is not None
    if not alone and _pays_channels_last([*units, *(parts or ())], x):  # as `chain` asks
        entered = torch.empty_like(x, memory_format=torch.channels_last, requires_grad=x.requires_grad)
        x, residual = entered, entered if residual is x else residual

    def ask(name: str, unit: Unit, x: Tensor, residual: Tensor | None, of_chain: Tensor) -> None:
        known = ("identity", 0.01) if name == "shortcut" else _known(unit)
        act, slope = known or ("identity", 0.01)
        found[name] = CONV_BN_ACT.explain(unit.conv, unit.bn, x, residual, act, slope)
        ours[name] = links.explain(unit.conv, unit.bn, of_chain if chained else x, residual)
        if chained and known is None:
            ours[name] = "", [*ours[name][1], "the activation is another module, in training called as it is"]

    y = x
    for i, unit in enumerate(units):
        last = i == len(units) - 1
        if last and parts:
            ask("shortcut", parts[0], x, None, x)
            residual = _stand_in(parts[0].conv, parts[0].bn, x)
        elif last and parts is None and shortcut is not None:
            residual = _stand_in(unit.conv, unit.bn, y).contiguous()
        ask(f"conv{i + 1}", unit, y, residual if last else None, x)
        y = _stand_in(unit.conv, unit.bn, y)
    all_or_none = chained and any(reasons for _, reasons in ours.values())
    for name, (backend, reasons) in ours.items():
        if all_or_none and not reasons:
            reasons.append("in training ours serves all convolutions of a chain, or none")
        found[name] = _with_ours(found[name], backend, reasons)
    if len(found) == 1:
        return found["conv1"]
    merged = {key: _merged({n: e.reasons[key] for n, e in found.items()}) for key in found["conv1"].reasons}
    chosen = next((one.backend for one in found.values() if one.backend != "folded"), "folded")
    return Explanation(NAME, chosen, merged, found["conv1"].forced, describe((x,), {}))


def _with_ours(found: Explanation, backend: str, reasons: list[str]) -> Explanation:
    """With a line for a convolution of our own: that it serves, before all others, or why it does not."""
    if reasons:
        return replace(found, reasons=found.reasons | {CONV2D_ACT.name: reasons})
    others = {
        name: [] if name == backend else why or ["our own convolution comes first"]
        for name, why in found.reasons.items()
    }
    return replace(found, backend=backend, reasons=others | {CONV2D_ACT.name: []})


def _merged(reasons: dict[str, list[str]]) -> list[str]:
    """Equal reasons in one line: `conv1, conv2: reason`."""
    whose: dict[str, list[str]] = {}
    for name, given in reasons.items():
        for reason in given:
            whose.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in whose.items()]


CONV_BN_ACT = ConvBNActOp()
