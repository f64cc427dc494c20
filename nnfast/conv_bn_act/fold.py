"""Inference: a batch norm folded into the convolution before it, and run by torch's fused convolutions.

W' = W * gamma / sqrt(var + eps),  b' = (b - mean) * gamma / sqrt(var + eps) + beta

(Jacob et al. 2018, arXiv:1712.05877, section 3.2.) On the CPU oneDNN adds b', the residual and the activation
as it writes the convolution's result; on CUDA cuDNN does, for relu.
"""

# Folded tensors lie beside the modules, not in them: no state_dict, copy or pickle sees them. They are made
# out of place, for each pair of a convolution and a batch norm, and hold as long as all they were made from.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activation.module import mish, silu
from ..convolution import winograd
from ..core import tuning
from ..core.op import forced
from ..core.operator import autocasts, plain_why_not
from ..core.snapshot import Snapshot, Source, hooked, hooked_everywhere
from . import notes

Run = Callable[..., Tensor]
"""Takes a `Folded`, its convolution, x, a residual or None, an activation and leaky_relu's slope."""


class Folded:
    """Weight (O, I / groups, kH, kW) and bias (O,) of a convolution with its batch norm in it.

    Both are computed in float64 and rounded once: the weight to the convolution's type, the bias to float32.
    """

    __slots__ = ("bias", "calls", "eps", "geometry", "reordered", "snapshot", "transformed", "weight")

    def __init__(self, conv: nn.Conv2d, bn: nn.Module) -> None:
        given = sources(conv, bn)
        assert given is not None
        self.snapshot = Snapshot(given)  # first: what changes meanwhile is seen later
        self.eps: float = bn.eps  # type: ignore[assignment]
        self.geometry = _geometry(conv)
        weight, bias, gamma, beta, mean, var, _ = (None if t is None else t.detach() for t in given)
        with torch.inference_mode(False), torch.no_grad():
            scale = (var.double() + self.eps).rsqrt()  # type: ignore[union-attr]
            scale = scale if gamma is None else scale * gamma
            shift = -mean.double() if bias is None else bias.double() - mean  # type: ignore[union-attr,operator]
            self.bias = (shift * scale if beta is None else shift * scale + beta).float()
            self.weight = (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)  # type: ignore[union-attr,operator]
        self.reordered: dict[tuple[int, ...], Tensor] = {}
        self.calls: dict[tuple[Any, ...] | None, Run] = {}
        self.transformed: Tensor | None = None

    def run(
        self, how: Run, conv: nn.Conv2d, x: Tensor, residual: Tensor | None, act: str, negative_slope: float
    ) -> Tensor:
        """The chosen way to run a call, remembered for calls like it."""
        call = _call(x, residual, act)
        if call is not None and forced() is None:
            if len(self.calls) >= tuning.FOLDED_CALLS:
                self.calls = {}
            self.calls[call] = how
        return how(self, conv, x, residual, act, negative_slope)

    def holds(self, conv: nn.Conv2d, bn: nn.Module) -> bool:
        """Nothing that went into it has changed."""
        if self.eps != bn.eps or self.geometry != _geometry(conv):
            return False
        given = sources(conv, bn)
        return given is not None and self.snapshot.holds(given)

    def reorder(self, conv: nn.Conv2d, padding: Any, shape: torch.Size) -> Tensor:
        """The weight in oneDNN's own order for inputs of a shape, the first time it is asked for."""
        found = self.reordered.get(shape)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = torch.ops.mkldnn._reorder_convolution_weight(
                    self.weight, padding, conv.stride, conv.dilation, conv.groups, list(shape)
                )
            if len(self.reordered) >= tuning.FOLDED_SHAPES:
                self.reordered = {}
            self.reordered[shape] = found
        return found

    def transform(self) -> Tensor:
        """The weight as Winograd's convolution takes it, the first time it is asked for."""
        if self.transformed is None:
            with torch.inference_mode(False), torch.no_grad():
                self.transformed = winograd.transform(self.weight, False)
        return self.transformed


_FOLDED: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, Folded]] = WeakKeyDictionary()


def folded(conv: nn.Conv2d, bn: nn.Module) -> Folded:
    """Weight and bias of `conv` with `bn` in it, made again if anything has changed."""
    of_conv = _FOLDED.get(conv)
    if of_conv is None:
        of_conv = _FOLDED.setdefault(conv, WeakKeyDictionary())
    found = of_conv.get(bn)
    if found is None or not found.holds(conv, bn):
        found = of_conv[bn] = Folded(conv, bn)
    return found


def forget(conv: nn.Module, bn: nn.Module) -> None:
    """Drop what is folded of a pair: it trains."""
    of_conv = _FOLDED.get(conv)
    if of_conv is not None:
        of_conv.pop(bn, None)


def sources(conv: nn.Module, bn: nn.Module) -> tuple[Source, ...] | None:
    """The tensors that go into a folded convolution; None if one is no parameter or buffer."""
    own, norm, running = conv._parameters, bn._parameters, bn._buffers
    try:  # costs nothing, where `in` would at every call
        return (
            own["weight"],
            own["bias"],
            norm["weight"],
            norm["bias"],
            running["running_mean"],
            running["running_var"],
            running["num_batches_tracked"],  # torch's batch norm moves no version counter of its statistics
        )
    except KeyError:  # a plain attribute: of a hypernetwork, MAML or nn.DataParallel
        return None


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    """What who serves a call, and the order of its weights, depend on too."""
    return conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode


# --- who can be folded --------------------------------------------------------------------------------------

_CONVS = (nn.Conv2d,)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def plain_conv(conv: nn.Module) -> bool:
    """Calling it does what nn.Conv2d does, and nothing else."""
    return not _unplain("conv", conv, _CONVS)


def plain_norm(bn: nn.Module) -> bool:
    """Calling it does what nn.BatchNorm2d or nn.SyncBatchNorm does, and nothing else."""
    return not _unplain("bn", bn, _NORMS)


def unplain(conv: nn.Module, bn: nn.Module) -> list[str]:
    """Why calling a convolution or a batch norm does something else, or more."""
    return [r for r in (_unplain("conv", conv, _CONVS), _unplain("bn", bn, _NORMS)) if r]


def _unplain(name: str, module: nn.Module, kinds: tuple[type, ...]) -> str:
    if type(module) not in kinds:
        return f"{name} is a {type(module).__name__}; it needs to be {' or '.join(k.__name__ for k in kinds)}"
    if hooked(module):
        return f"{name} has hooks, which a fused call would skip"
    if hooked_everywhere():
        return "there are hooks on every module, which a fused call would skip"
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return f"{name} has a forward of its own"
    return ""


def why_not(
    conv: nn.Module,
    bn: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    act: str = "identity",
    negative_slope: float = 0.01,
) -> list[str]:
    """Every reason why torch cannot run this call with the batch norm folded into the convolution."""
    reasons = folding_why_not(conv, bn, x, residual)
    return reasons or (_onednn_why_not if x.is_cpu else _cudnn_why_not)(x, residual, act)


def folding_why_not(conv: nn.Module, bn: nn.Module, x: Tensor, residual: Tensor | None = None) -> list[str]:
    """Every reason why the batch norm cannot be folded into the convolution for this call."""
    if reasons := unplain(conv, bn):
        return reasons
    assert isinstance(conv, nn.Conv2d)
    given = sources(conv, bn)
    if given is None:
        return ["a weight, bias or running statistic is no parameter or buffer"]
    weight, mean, var = given[0], given[4], given[5]
    if bn.training or mean is None or var is None:
        reasons.append("bn normalises with the statistics of the batch")
    if weight is None:
        return [*reasons, "conv has no weight"]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *given)):
        reasons.append("a gradient is asked for; folding is for inference")
    if any(t is not None and t.is_inference() for t in given):
        reasons.append("parameters are inference tensors, which have no version counter to see changes by")
    if any(t is not None and type(t) is not Tensor and type(t) is not nn.Parameter for t in given):
        reasons.append("parameters are not plain tensors")
    reasons += plain_why_not("x", x)
    if x.dim() != 4 or x.shape[1] != conv.in_channels or not x.numel():
        reasons.append(f"x has shape {list(x.shape)}; folding takes (N, {conv.in_channels}, H, W), not empty")
    if not (x.is_cpu or x.is_cuda):
        return [*reasons, f"x is on {x.device}; folding is for the CPU and CUDA"]
    if autocasts(x):
        reasons.append("under autocast, which picks the types of each step")
    if weight.dtype != x.dtype or (given[1] is not None and given[1].dtype != x.dtype):
        reasons.append(f"x has dtype {x.dtype}, conv {weight.dtype}")
    if any(t is not None and t.device != x.device for t in given):
        reasons.append("x and the parameters are on several devices")
    if reasons:
        return reasons
    if residual is not None:
        needed = output_shape(conv, x)
        if list(residual.shape) != needed or residual.dtype != x.dtype or residual.device != x.device:
            reasons.append(
                f"residual is {residual.dtype} {list(residual.shape)} on {residual.device}; "
                f"it needs to be {x.dtype} {needed} on {x.device}"
            )
        reasons += plain_why_not("residual", residual)
    return reasons


def output_shape(conv: nn.Conv2d, x: Tensor) -> list[int]:
    """Shape of conv(x)."""
    padding = conv._reversed_padding_repeated_twice
    size = []
    for i in range(2):
        whole = x.shape[2 + i] + padding[2 - 2 * i] + padding[3 - 2 * i]
        size.append((whole - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1)
    return [x.shape[0], conv.out_channels, *size]


def _onednn_why_not(x: Tensor, residual: Tensor | None, act: str) -> list[str]:
    if not (torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()):
        return ["torch's oneDNN is not there, or switched off"]
    if x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ["oneDNN adds no residual in bfloat16 with a bias in float32"] * (residual is not None)
    if x.dtype != torch.float32:
        return [f"x has dtype {x.dtype}; oneDNN has no fused convolution of it on this CPU"]
    return []


def _cudnn_why_not(x: Tensor, residual: Tensor | None, act: str) -> list[str]:
    reasons = []
    if not (torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled):
        reasons.append("cuDNN is not there, or switched off")
    if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        reasons.append("cuDNN's fused convolution does not promise to be deterministic")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"x has dtype {x.dtype}; cuDNN's fused convolution takes float32, float16, bfloat16")
    if act != "relu":
        reasons.append(f"act is {act!r}; cuDNN's fused convolution has relu alone")
    if residual is not None and _share_memory(x, residual):  # pytorch#62926
        reasons.append("residual shares memory with x, which cuDNN's fused convolution gets wrong")
    return reasons


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def not_worth(
    conv: nn.Module,
    bn: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    act: str = "identity",
    negative_slope: float = 0.01,
) -> list[str]:
    """Why another way is the better choice."""
    return ["not measured to be faster on a GPU"] * x.is_cuda


# --- the call -----------------------------------------------------------------------------------------------


def run_again(
    conv: nn.Module, bn: nn.Module, x: Tensor, residual: Tensor | None, act: str, negative_slope: float
) -> Tensor | None:
    """What a call like one before gives, on the CPU and without autograd, if nothing has changed that who
    serves depends on; None if it is not known."""
    if bn.training:
        return None
    of_conv = _FOLDED.get(conv)
    found = None if of_conv is None else of_conv.get(bn)
    if found is None:
        return None
    how = found.calls.get(_call(x, residual, act))
    if how is None or unplain(conv, bn) or not found.holds(conv, bn):  # type: ignore[arg-type]
        return None
    y = how(found, conv, x, residual, act, negative_slope)
    watched = notes.taken()
    if watched is not None:
        watched.append(notes.Folding(how, found, conv, bn, x, residual, act, negative_slope, y))
    return y


def call_like(x: Tensor) -> tuple[Any, ...] | None:
    """What who serves a call on x depends on, beside the modules; None where it is asked every time."""
    if not x.is_cpu or type(x) is not Tensor or x.layout is not torch.strided or torch.is_grad_enabled():
        return None
    state = (torch.is_autocast_enabled("cpu"), torch._C._get_mkldnn_enabled())
    return x.shape, x.stride(), x.dtype, state


def _call(x: Tensor, residual: Tensor | None, act: str) -> tuple[Any, ...] | None:
    """The same with a residual and an activation."""
    known = call_like(x)
    if known is None:
        return None
    if residual is None:
        return *known, act
    return *known, act, residual.shape, residual.dtype, residual.device, type(residual), residual.layout


def run(
    conv: nn.Module,
    bn: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    act: str = "identity",
    negative_slope: float = 0.01,
) -> Tensor:
    """act(bn(conv(x)) [+ residual]) where `why_not` knows no reason against it; laid out as torch does."""
    assert isinstance(conv, nn.Conv2d)
    how = _by_conv2d if _quick(conv, x) else _by_torch
    return folded(conv, bn).run(how, conv, x, residual, act, negative_slope)


def _quick(conv: nn.Conv2d, x: Tensor) -> bool:
    """On the CPU torch.conv2d is the better choice: it is small, and does without oneDNN."""
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    if not (plain and x.is_cpu and x.dtype is torch.float32):
        return False
    pointwise = conv.kernel_size == (1, 1) and x.is_contiguous()
    most = tuning.QUICK_POINTWISE if pointwise else tuning.QUICK_WEIGHTS
    if conv.weight.numel() > most or math.prod(output_shape(conv, x)) > tuning.QUICK_RESULT:
        return False
    options = (conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups)
    chosen = torch._C._select_conv_backend(x, conv.weight, None, *options)
    return chosen is not torch._C._ConvBackend.Mkldnn  # type: ignore[attr-defined]


def _by_conv2d(
    found: Folded, conv: nn.Conv2d, x: Tensor, residual: Tensor | None, act: str, negative_slope: float
) -> Tensor:
    padding: Any = conv.padding
    y = torch.conv2d(x, found.weight, found.bias, conv.stride, padding, conv.dilation, conv.groups)
    return _activate_(_one_format(y if residual is None else y.add_(residual)), act, negative_slope)


def _by_torch(
    found: Folded, conv: nn.Conv2d, x: Tensor, residual: Tensor | None, act: str, negative_slope: float
) -> Tensor:
    padding: Any = conv.padding
    if isinstance(padding, str) or conv.padding_mode != "zeros":
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode), (0, 0)
    if x.is_cuda:
        return _run_cudnn(found, conv, padding, x, residual)
    own = conv._parameters["weight"]
    assert own is not None
    innermost = channels_last(x) or channels_last(own)
    reordered = innermost or own.numel() >= x.numel()  # that takes and gives channels_last
    weight = found.reorder(conv, padding, x.shape) if reordered else found.weight
    y = _run_onednn(found.bias, weight, conv, padding, x, residual, act, negative_slope)
    if innermost:
        return _one_format(y)
    return y.contiguous() if y.stride(1) != 1 else y.flatten().view(y.shape)


def _one_format(y: Tensor) -> Tensor:
    """y with the strides of contiguous if that is one of its formats, as torch's batch norm gives it."""
    return y.flatten().view(y.shape) if y.stride(1) == 1 and y.is_contiguous() else y


def channels_last(x: Tensor) -> bool:
    """torch takes x for channels_last: of a shape with ones it may be both, or neither."""
    contiguous, last = x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)
    if contiguous != last:
        return last
    return torch._prims_common.suggest_memory_format(x) is torch.channels_last


def _run_onednn(
    bias: Tensor,
    weight: Tensor,
    conv: nn.Conv2d,
    padding: Any,
    x: Tensor,
    residual: Tensor | None,
    act: str,
    slope: float,
) -> Tensor:
    # oneDNN's relu makes 0 of NaN, so relu takes its own pass, in cache still; the fused add has no other
    options = (weight, bias, padding, conv.stride, conv.dilation, conv.groups)
    fused = torch.ops.mkldnn._convolution_pointwise
    if residual is not None:
        y = fused.binary(x, residual, *options, "add", 1.0, None, [], None)
    elif act == "leaky_relu":
        return fused.default(x, *options, act, [slope], "")  # type: ignore[no-any-return]
    else:
        y = fused.default(x, *options, "none", [], "")
    return _activate_(y, act, slope)


def _activate_(y: Tensor, act: str, slope: float) -> Tensor:
    """act(y), in place."""
    if act == "relu":
        return y.relu_()
    if act == "leaky_relu":
        return F.leaky_relu_(y, slope)
    if act in ("silu", "swish"):
        return silu(y, inplace=True)
    return mish(y, inplace=True) if act == "mish" else y


def _run_cudnn(found: Folded, conv: nn.Conv2d, padding: Any, x: Tensor, residual: Tensor | None) -> Tensor:
    options = (conv.stride, padding, conv.dilation, conv.groups)
    bias = found.bias.to(x.dtype)  # as cuDNN takes it
    if residual is None:
        return torch.cudnn_convolution_relu(x, found.weight, bias, *options)
    return torch.cudnn_convolution_add_relu(x, found.weight, residual, 1.0, bias, *options)
