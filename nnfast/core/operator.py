"""What the operators of every family share: the library they live in, and what none of our kernels takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import extension, tuning
from .op import triton_why_not

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What our kernels take."""

LIBRARY = torch.library.Library("nnfast", "DEF")

_ELSEWHERE = {
    "cpu": "{} is not on the cpu",
    "cuda": "{} is not on a CUDA device",
}  # formatting a device is slow


def define(library: torch.library.Library, schema: str, fake: Callable[..., Any], overload: str = "") -> Any:
    """Give a library an operator, `name(arguments) -> result`, and its fake; returns what calls it."""
    name, _, signature = schema.partition("(")
    full_name = f"{name}.{overload}" if overload else name
    library.define(f"{full_name}({signature}")
    torch.library.register_fake(f"{library.ns}::{full_name}", fake, lib=library)
    return getattr(getattr(getattr(torch.ops, library.ns), name), overload or "default")


def implement(name: str, fallback: Callable[..., Any], in_triton: Callable[..., Any]) -> None:
    """An operator's fallback on every device, and its overload `triton`; what is compiled adds itself."""

    def checked(*args: Any) -> Any:
        if missing := triton_why_not(args[0].device.type):
            raise RuntimeError(f"nnfast::{name}.triton: {missing}")
        return in_triton(*args)

    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    for device in ("CUDA", "CPU"):
        LIBRARY.impl(f"{name}.triton", checked, device)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What x is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def convolved_size(size: Sequence[Any], weight: Sequence[Any], stride: Any, padding: Any) -> list[Any]:
    """(N, O, OH, OW) of a convolution of an image (N, C, H, W) by a weight (O, C, kH, kW)."""
    pixels = ((size[i] + 2 * padding[i - 2] - weight[i]) // stride[i - 2] + 1 for i in (2, 3))
    return [size[0], weight[0], *pixels]


def attention_out(q: Tensor, values: int) -> Tensor:
    """Room for attention's result (N, H, Lq, Dv), in the order (N, Lq, H, Dv), or (Lq, N, H, Dv) if q's is.

    What projects it then reads rows without a copy, whichever of the two its own rows are.
    """
    n, h, queries, _ = q.shape
    if q.stride(0) < q.stride(2):
        return q.new_empty(queries, n, h, values).permute(1, 2, 0, 3)
    return q.new_empty(n, queries, h, values).transpose(1, 2)


def channels_innermost(x: Tensor) -> bool:
    """Of dense x: (N, C, *spatial): memory rows are (N * S, C), not (N * C, S)."""
    return x.shape[2:].numel() == 1 or not x.is_contiguous()


def dense(x: Tensor) -> Tensor:
    """x: (N, C, *spatial) itself where it is contiguous or has channels innermost, else a contiguous copy."""
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return x
    return x.contiguous()


def transformed() -> bool:
    """A torch.func transform or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def traced() -> bool:
    """torch.jit.trace is recording: in its graphs our operators would have no gradients, and need nnfast."""
    return not is_compiling() and torch._C._get_tracing_state() is not None


def autocasts(x: Tensor) -> bool:
    """Autocast is on where x is; of the meta device torch does not say."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Where x is, operations take the dtypes that they are given."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def requires_grad(*tensors: Tensor | None) -> bool:
    """A gradient of any is asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def by_formula(grad: Tensor, *others: Tensor | None) -> bool:
    """A backward pass with these is itself differentiated, or batched, as our kernels are not."""
    if not is_compiling() and (transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)):
        return True
    return requires_grad(grad, *others)


def plain_why_not(name: str, x: Tensor) -> list[str]:
    """What none of our kernels takes as its argument `name`."""
    reasons = []
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        reasons.append(f"{name} is a {type(x).__name__}; our kernels take plain tensors")
    if x.is_nested:
        reasons.append(f"{name} is nested; our kernels take tensors of one shape")
    if x.layout is not torch.strided:
        reasons.append(f"{name} has layout {x.layout}; our kernels take torch.strided")
    if x.dtype not in DTYPES:
        reasons.append(f"{name} has dtype {x.dtype}; our kernels take {', '.join(map(str, DTYPES))}")
    return reasons


def place_why_not(operator: str, backend: str, name: str, x: Tensor) -> list[str]:
    """Why `backend` has no kernel of `operator` where its argument `name` is, or none to be recorded."""
    reasons = []
    if traced():
        reasons.append("torch.jit.trace is recording; in its graph our operators would have no gradients")
    if backend == "triton":
        if missing := triton_why_not("cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type):
            reasons.append(missing)
        return reasons
    if not (x.is_cpu if backend == "cpu" else x.is_cuda):
        reasons.append(_ELSEWHERE[backend].format(name))
    if missing := extension.why_not(operator, backend.upper()):
        reasons.append(missing)
    return reasons


def size_not_worth(
    operator: str, backend: str, x: Tensor, numel: int | None = None, requires_grad: bool | None = None
) -> list[str]:
    """Why x, or as many elements, is too small for a backend to pay."""
    if backend == "triton" and x.is_cpu:
        return ["interpreted: for tests, not for speed"]
    numel = x.numel() if numel is None else numel
    grad = torch.is_grad_enabled() and (x.requires_grad if requires_grad is None else requires_grad)
    least = tuning.threshold(operator, backend, grad)
    if least == tuning.NEVER:
        return ["not measured to be faster than torch's own kernel"]
    if numel < least:
        mode = "with" if grad else "without"
        return [f"{numel} elements; measured to pay from {least} on {mode} autograd"]
    return []
