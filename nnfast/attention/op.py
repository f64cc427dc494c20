"""Attention as an operation: schemas, fakes, autograd, and who can serve.

Two opaque operators, and the same again as overloads `triton` and `cpu`; arguments as in reference.py, mask
expanded:

    nnfast::attention(q, k, v, mask, key_padding, bias, alibi_slopes, seed, cos, sin, *options) -> (out, lse)
    nnfast::attention_backward(grad_out, grad_lse, q, k, v, mask, key_padding, bias, alibi_slopes, seed, cos,
        sin, out, lse, *options, bias_grad) -> (grad_q, grad_k, grad_v, grad_bias)

out is laid out as `core.operator.attention_out` says, gradients as `torch.empty_like` lays them out;
grad_bias is empty unless bias_grad. For inference on the CPU alone, one of (q + in_bias[0]) query_weight,
k + in_bias[1] and v + in_bias[2], with in_bias: (3, H, D) and query_weight: (D, D):

    nnfast::projected_attention(q, k, v, in_bias, query_weight, mask, key_padding, bias, is_causal, scale)
        -> out

`ATTENTION`, which chooses among the backends, is differentiable in q, k, v and bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..core import extension, tuning
from ..core.op import Backend, Explanation, Op, forced, forced_outside_compile
from ..core.operator import (
    DTYPES,
    LIBRARY,
    attention_out,
    autocasts,
    compute_dtype,
    define,
    implement,
    place_why_not,
    plain_why_not,
    requires_grad,
    size_not_worth,
    traced,
    transformed,
)
from . import chunked, reference, sdpa
from .reference import TENSORS, Terms
from .rotary import ROTARY

LARGEST_HEAD = 256

_TERMS = (
    "Tensor? mask, Tensor? key_padding, Tensor? bias, Tensor? alibi_slopes, Tensor? seed, Tensor? cos, "
    "Tensor? sin"
)
_OPTIONS = (
    "bool is_causal, float scale, float softcap, SymInt left, SymInt right, float dropout_p, bool interleaved"
)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return attention_out(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=compute_dtype(q))


def _fake_backward(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    q, k, v, bias, bias_grad = *args[:3], args[5], args[-1]
    of_bias = torch.empty_like(bias) if bias_grad else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), of_bias


class Kernels:
    """The two operators on one backend."""

    def __init__(self, library: torch.library.Library, overload: str = "") -> None:
        schema = f"attention(Tensor q, Tensor k, Tensor v, {_TERMS}, {_OPTIONS}) -> (Tensor, Tensor)"
        self.forward = define(library, schema, _fake, overload)
        schema = (
            "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
            f"{_TERMS}, Tensor out, Tensor lse, {_OPTIONS}, bool bias_grad) -> "
            "(Tensor, Tensor, Tensor, Tensor)"
        )
        self.backward = define(library, schema, _fake_backward, overload)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, _: bool) -> tuple[Tensor, Tensor]:
        """Out and lse, with whatever differentiation asks for."""
        result: tuple[Tensor, Tensor]
        terms = _expanded(terms, q, k)
        if requires_grad(q, k, v, terms.bias):
            apply = _Attention.apply if is_compiling() else _attention
            result = apply(self, q, k, v, *terms)  # type: ignore[no-untyped-call]
        else:
            result = self.forward(q, k, v, *terms)
        return result


def _expanded(terms: Terms, q: Tensor, k: Tensor) -> Terms:
    """With the mask as the operators take it."""
    if terms.mask is None:
        return terms
    return terms._replace(mask=terms.mask.expand(*q.shape[:3], k.shape[2]))


class _Attention(torch.autograd.Function):
    """Out and lse. Saves the arguments and both."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = kernels.forward(*args)
        tensors = 3 + TENSORS
        ctx.save_for_backward(*args[:tensors], out, lse)
        ctx.options, ctx.kernels = args[tensors:], kernels
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, *tensors, out, lse = ctx.saved_tensors
        bias = tensors[2]
        bias_grad = bias is not None and ctx.needs_input_grad[6]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if transformed() or requires_grad(grad_out, grad_lse, q, k, v, bias):
            terms = Terms(*tensors, *ctx.options)
            grads = reference.attention_backward(grad_out, grad_lse, q, k, v, terms)
        else:
            saved = (q, k, v, *tensors, out, lse)
            grads = ctx.kernels.backward(grad_out, grad_lse, *saved, *ctx.options, bias_grad)
        return None, *grads[:3], None, None, grads[3] if bias_grad else None, *[None] * 11


_attention = super(torch.autograd.Function, _Attention).apply
"""`_Attention.apply` without its wrapper in Python, which only transforms need."""

CHUNKED = Kernels(LIBRARY)
TRITON = Kernels(LIBRARY, "triton")
CPU = Kernels(LIBRARY, "cpu")


def _in_triton(function: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        from . import kernels  # imports triton

        return getattr(kernels, function)(*args)

    return call


implement("attention", chunked.forward, _in_triton("forward"))
implement("attention_backward", chunked.backward, _in_triton("backward"))


PROJECTED = define(
    LIBRARY,
    "projected_attention(Tensor q, Tensor k, Tensor v, Tensor? in_bias, Tensor? query_weight, Tensor? mask, "
    "Tensor? key_padding, Tensor? bias, bool is_causal, float scale) -> Tensor",
    lambda q, k, v, *_: attention_out(q, v.shape[3]),
)


def _projected(
    q: Tensor, k: Tensor, v: Tensor, in_bias: Tensor | None, query_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if in_bias is not None:
        q, k, v = (x + b for x, b in zip((q, k, v), in_bias.unsqueeze(2), strict=True))
    return (q if query_weight is None else q @ query_weight), k, v


def _projected_fallback(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    in_bias: Tensor | None,
    query_weight: Tensor | None,
    mask: Tensor | None,
    key_padding: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    terms = Terms(mask, key_padding, bias, is_causal=is_causal, scale=scale)
    return chunked.forward(*_projected(q, k, v, in_bias, query_weight), *terms)[0]


LIBRARY.impl("projected_attention", _projected_fallback, "CompositeExplicitAutograd")


def _run_aten(
    q: Tensor, k: Tensor, v: Tensor, terms: Terms, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    empty = not q.numel() or not k.shape[2]
    if transformed() or traced() or empty or requires_grad(terms.alibi_slopes):
        return reference.attention(q, k, v, terms)
    if sdpa.expresses(q, terms, return_lse):
        return sdpa.run(q, k, v, terms, return_lse)
    return CHUNKED(q, k, v, terms, return_lse)


def _run_reference(q: Tensor, k: Tensor, v: Tensor, terms: Terms, _: bool) -> tuple[Tensor, Tensor]:
    return reference.attention(q, k, v, terms)


def _triton_why_not(q: Tensor, k: Tensor, v: Tensor, terms: Terms, _: bool) -> list[str]:
    return place_why_not("attention", "triton", "q", q) + _why_not(q, k, v, terms)


def _cpu_why_not(q: Tensor, k: Tensor, v: Tensor, terms: Terms, _: bool) -> list[str]:
    reasons = place_why_not("attention.cpu", "cpu", "q", q) + _why_not(q, k, v, terms)
    for name, x in (("bias", terms.bias), ("alibi_slopes", terms.alibi_slopes)):
        if x is not None and x.dtype not in (q.dtype, compute_dtype(q)):
            reasons.append(f"{name} has dtype {x.dtype}; our CPU kernels need q's, {q.dtype}")
    return reasons


_CPU_DTYPES = (torch.float32, torch.float64)


def _run_cpu(q: Tensor, k: Tensor, v: Tensor, terms: Terms, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Half types by way of float32."""
    if q.dtype in _CPU_DTYPES:
        return CPU(q, k, v, terms, return_lse)
    terms = terms if terms.bias is None else terms._replace(bias=reference.wide(terms.bias))
    a, b, c = (reference.wide(x) for x in (q, k, v))
    out, lse = CPU(a, b, c, terms, return_lse)
    return out.to(q.dtype), lse


def _why_not(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> list[str]:
    """What none of our kernels takes."""
    reasons = []
    for name, x in (("q", q), ("k", k), ("v", v), ("bias", terms.bias), ("alibi_slopes", terms.alibi_slopes)):
        if x is not None:
            reasons += plain_why_not(name, x)
    if terms.alibi_slopes is not None and terms.alibi_slopes.requires_grad:
        reasons.append("alibi_slopes requires grad; our kernels give none")
    if transformed():
        reasons.append("a torch.func transform or forward-mode differentiation is active")
    return reasons


def _triton_not_worth(q: Tensor, *_: Any) -> list[str]:
    return size_not_worth("attention", "triton", q)


def _cpu_not_worth(q: Tensor, k: Tensor, _: Tensor, terms: Terms, *__: Any) -> list[str]:
    n, h, queries, _head = q.shape
    if q.dtype not in _CPU_DTYPES:
        return [f"q has dtype {q.dtype}, which our CPU kernels convert and torch's own multiply directly"]
    if queries < tuning.ATTENTION_QUERIES:
        return [f"{queries} queries; measured to pay from {tuning.ATTENTION_QUERIES} on"]
    keys = k.shape[2]
    if terms.bias is not None and terms.bias.requires_grad and keys < tuning.ATTENTION_BIAS_KEYS:
        return [f"{keys} keys; of a bias torch's formula gives a more exact gradient for so few"]
    if terms.softcap and terms.dropout_p:
        return ["softcap with dropout, of which torch's formula gives more exact gradients"]
    scores = n * h * queries * keys
    if scores < tuning.ATTENTION_SCORES and terms.is_plain:
        return [f"{scores} scores; without masks measured to pay from {tuning.ATTENTION_SCORES} on"]
    return []


class Attention(Op):
    """Attention; called with arguments as `arguments` makes them."""

    def __init__(self) -> None:
        super().__init__(
            "attention",
            [
                Backend("triton", TRITON, _triton_why_not, _triton_not_worth),
                Backend("cpu", _run_cpu, _cpu_why_not, _cpu_not_worth),
                Backend("aten", _run_aten),
                Backend("reference", _run_reference),
            ],
        )
        self.least = tuning.smallest("attention")
        """Fewest elements for which any but torch's own serves on a GPU."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the chosen backend; under torch.compile torch's own, so that Inductor sees it."""
        if is_compiling():
            if forced() is None:
                return _run_aten(*args, **kwargs)
        elif forced_outside_compile() is None:
            q = args[0]
            if q.shape[2] < tuning.ATTENTION_QUERIES if q.is_cpu else q.numel() < self.least:
                return _run_aten(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def example(self, device: str) -> tuple[Any, ...]:
        """Sixteen heads of 64 over 1024 places."""
        q, k, v = (torch.empty(8, 16, 1024, 64, device=device) for _ in range(3))
        return arguments(q, k, v)


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: int | tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    """The operation's arguments from the function's, checked, and as autocast has them."""
    if isinstance(q, Tensor) and autocasts(q):
        q, k, v = _cast(q, k, v)
    check_heads(q, k, v)
    shape = (*q.shape[:3], k.shape[2])
    mask = _four("mask", mask, shape, q)
    bias = _four("bias", bias, shape, q)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"{_NAME}: mask has dtype {mask.dtype}; it needs torch.bool, True = attend")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"{_NAME}: bias has dtype {bias.dtype}; it needs a floating-point one")
    if key_padding_mask is not None:
        _check_tensor("key_padding_mask", key_padding_mask, q)
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(
                f"{_NAME}: key_padding_mask has dtype {key_padding_mask.dtype}; it needs "
                "torch.bool, True = padding"
            )
        if key_padding_mask.shape != (shape[0], shape[3]):
            raise ValueError(
                f"{_NAME}: key_padding_mask has shape {list(key_padding_mask.shape)}; k {list(k.shape)} "
                f"needs [{shape[0]}, {shape[3]}]"
            )
    if alibi_slopes is not None:
        _check_tensor("alibi_slopes", alibi_slopes, q)
        if alibi_slopes.shape not in (shape[1:2], shape[:2]):
            raise ValueError(
                f"{_NAME}: alibi_slopes has shape {list(alibi_slopes.shape)}; q {list(q.shape)} needs "
                f"[{shape[1]}] or [{shape[0]}, {shape[1]}]"
            )
        alibi_slopes = reference.wide(alibi_slopes).expand(shape[:2])
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{_NAME}: dropout_p is {dropout_p}; it needs to be within [0, 1)")
    if softcap is not None and not softcap >= 0:
        raise ValueError(f"{_NAME}: softcap is {softcap}; it needs to be positive, or None for none")
    left, right = _window(window)
    if isinstance(seed, Tensor):
        _check_tensor("seed", seed, q)
        if seed.dim() or seed.dtype != torch.int64:
            raise ValueError(
                f"{_NAME}: seed has shape {list(seed.shape)} and dtype {seed.dtype}; "
                "it needs [] and torch.int64"
            )
    elif seed is not None:
        if not isinstance(seed, int):
            raise TypeError(f"{_NAME}: seed is a {type(seed).__name__}; it needs an int or a torch.Tensor")
        seed = torch.full((), seed, dtype=torch.int64, device=q.device)  # a copy would wait for the GPU
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    options = (bool(is_causal), scale, float(softcap or 0.0), left, right, float(dropout_p))
    return q, k, v, Terms(mask, key_padding_mask, bias, alibi_slopes, seed, None, None, *options), return_lse


_NAME = "nnfast.attention"


def _check_tensor(name: str, x: object, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{_NAME}: {name} is a {type(x).__name__}; it needs a torch.Tensor")
    if x.device != q.device:
        raise ValueError(f"{_NAME}: {name} is on {x.device}; q is on {q.device}")


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Types, shapes, dtypes and devices of queries, keys and values."""
    if (
        type(q) is type(k) is type(v) is Tensor
        and q.dim() == 4
        and q.shape == k.shape == v.shape
        and 0 < q.shape[3] <= LARGEST_HEAD
        and q.dtype == k.dtype == v.dtype
        and q.dtype in DTYPES
        and q.device == k.device == v.device
        and q.shape[1]
    ):
        return  # most calls, at a third of the cost
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, q)
        if x.dim() != 4:
            raise ValueError(
                f"{_NAME}: {name} has shape {list(x.shape)}; it needs (N, heads, length, head dim)"
            )
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{_NAME}: {name} has dtype {x.dtype}; it needs one of {', '.join(map(str, DTYPES))}"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{_NAME}: {name} has dtype {x.dtype}; q has {q.dtype}")
        if not 0 < x.shape[3] <= LARGEST_HEAD:
            raise ValueError(
                f"{_NAME}: {name} has shape {list(x.shape)}; its head dim needs to be "
                f"within [1, {LARGEST_HEAD}]"
            )
    shapes = f"q has shape {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{_NAME}: {shapes}; k and v need the same N, heads and length")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{_NAME}: {shapes}; q and k need the same N and head dim")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{_NAME}: {shapes}; k's heads need to divide q's")


def _four(name: str, x: Tensor | None, shape: tuple[int, ...], q: Tensor) -> Tensor | None:
    """A mask or bias with four dimensions, of size 1 where it is broadcast."""
    if x is None:
        return None
    _check_tensor(name, x, q)
    sizes = (1,) * (4 - x.dim()) + x.shape
    if len(sizes) != 4 or any(size not in (1, whole) for size, whole in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"{_NAME}: {name} has shape {list(x.shape)}; it needs to broadcast to (N, heads, queries, "
            f"keys) = {list(shape)}"
        )
    x = x.view(sizes) if x.dim() < 4 else x
    for dim in range(4):
        if x.stride(dim) == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def _window(window: int | tuple[int | None, int | None] | None) -> tuple[int, int]:
    """How many keys left and right of its own a query sees; -1 for all."""
    sides = window if isinstance(window, (tuple, list)) else (window, window)
    if len(sides) != 2 or any(side is not None and (not isinstance(side, int) or side < 0) for side in sides):
        raise ValueError(
            f"{_NAME}: window is {window!r}; it needs to be a number of keys, or (left, "
            "right) with None for all"
        )
    left, right = (-1 if side is None else side for side in sides)
    return left, right


ATTENTION = Attention()


def explain_torchs(call: str, reasons: list[str]) -> Explanation:
    """What `nnfast.explain` says of a module's call, in words, that is torch's for these reasons."""
    backends = {b.name: [] if b.name == "aten" else reasons for b in ATTENTION.backends}
    return Explanation(ATTENTION.name, "aten", backends, forced(), call)


def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Any:
    """Check the arguments, options in the order of `arguments`, and let the chosen backend run.

    On the CPU calls without masks are decided at once; `ATTENTION.explain` gives the same answer with its
    reasons, as a test holds.
    """
    if _is_bare(*options) and _is_plain(q, k, v):
        is_causal, scale = options[3:5]
        if _is_plain_for_cpu(q, k, v):
            return CPU(q, k, v, _bare_terms(q, is_causal, scale), False)[0]
        return sdpa.plain(q, k, v, None, is_causal, scale)
    q, k, v, terms, return_lse = arguments(q, k, v, *options)
    out, lse = ATTENTION(q, k, v, _seeded(terms, q), return_lse)
    return (out, lse) if return_lse else out


def _seeded(terms: Terms, q: Tensor) -> Terms:
    """With a seed from torch's generator, if dropout needs one."""
    if terms.dropout_p and terms.seed is None:
        terms = terms._replace(seed=torch.randint(1 << 62, (), device=q.device))
    return terms


def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    of_q: tuple[Tensor, Tensor],
    of_k: tuple[Tensor, Tensor],
    interleaved: bool,
    *options: Any,
) -> Any:
    """`attention` of q and k turned by cosines and sines, those of the shorter the first of the longer's.

    Our kernels turn as they read, and gradients back as they write; for torch's they turn before.
    """
    ours = None if requires_grad(*of_q) else _ours(q, k, v, *options)
    if ours is None:
        return attention(ROTARY(q, *of_q, interleaved), ROTARY(k, *of_k, interleaved), v, *options)
    run, terms = ours
    longer = of_q if q.shape[2] > k.shape[2] else of_k
    cos, sin = (x[(None,) * (4 - x.dim())] for x in longer)
    terms = _seeded(terms, q)._replace(cos=cos, sin=sin, interleaved=interleaved)
    out, lse = run(q, k, v, terms, options[-1])
    return (out, lse) if options[-1] else out


def _ours(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Callable[..., Any], Terms] | None:
    """Which of our kernels a call is for, as it is and in q's dtype, and its terms; None if for none."""
    if is_compiling():
        return None
    if _is_bare(*options) and _is_plain(q, k, v):
        return (CPU, _bare_terms(q, *options[3:5])) if _is_plain_for_cpu(q, k, v) else None
    if q.is_cpu and forced_outside_compile() is None and not is_for_cpu(q, q.shape[2]):
        return None
    call = arguments(q, k, v, *options)
    backend = ATTENTION.choose(*call)
    serves = backend.name in ("cpu", "triton") and call[0].dtype == q.dtype  # autocast has it in another
    return (backend.run, call[3]) if serves else None


def _is_bare(
    mask: Any,
    key_padding_mask: Any,
    bias: Any,
    _is_causal: bool,
    scale: float | None,
    dropout_p: float,
    window: Any,
    alibi_slopes: Any,
    softcap: float | None,
    _seed: Any,
    return_lse: bool,
) -> bool:
    """Whether of all that `attention` takes there is only what every kernel, torch's too, serves."""
    return (
        mask is None
        and bias is None
        and key_padding_mask is None
        and window is None
        and alibi_slopes is None
        and (scale is None or scale > 0)
        and not (dropout_p or softcap or return_lse)
    )


def _bare_terms(q: Tensor, is_causal: bool, scale: float | None) -> Terms:
    return Terms(is_causal=bool(is_causal), scale=float(q.shape[3] ** -0.5 if scale is None else scale))


def projected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    in_bias: Tensor | None = None,
    query_weight: Tensor | None = None,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of (q + in_bias[0]) query_weight, k + in_bias[1] and v + in_bias[2], for inference.

    q, k, v: (N, H, L, D); in_bias: (3, H, D); query_weight: (D, D). Our CPU kernels do both as they read,
    which spares passes over memory.
    """
    projections = [x if x is None else x.contiguous() for x in (in_bias, query_weight)]
    options = (mask, key_padding_mask, bias, is_causal, scale, 0.0, None, None, None, None, False)
    wanted = q.dtype in _CPU_DTYPES and not requires_grad(q, k, v, bias, *projections)
    ours = _ours(q, k, v, *options) if wanted and q.is_cpu else None
    out: Tensor
    if ours is None or ours[0] is TRITON:
        out = attention(*_projected(q, k, v, *projections), *options)
    else:
        terms = _expanded(ours[1], q, k)
        out = PROJECTED(q, k, v, *projections, *terms[:3], terms.is_causal, terms.scale)
    return out


def _is_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a CPU's own kernels serve, at the cost of a microsecond: of one shape, nothing forced."""
    if not (type(q) is type(k) is type(v) is Tensor or is_compiling()):
        return False
    shape = q.shape
    return (
        shape == k.shape == v.shape
        and len(shape) == 4
        and q.dtype in DTYPES
        and q.is_cpu
        and 0 < shape[3] <= LARGEST_HEAD
        and (forced() if is_compiling() else forced_outside_compile()) is None
        and q.numel() > 0
        and not transformed()
    )


def is_for_cpu(q: Tensor, queries: int) -> bool:
    """Whether so many queries are for our CPU kernels, if they are not few scores without masks."""
    return (
        q.is_cpu
        and not is_compiling()
        and queries >= tuning.ATTENTION_QUERIES
        and _IN_CPU
        and q.dtype in _CPU_DTYPES
        and (q.dtype == torch.float64 or not torch.is_autocast_enabled("cpu"))
        and not traced()
    )


def _is_plain_for_cpu(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a plain call is for our CPU kernels."""
    n, h, queries, _ = q.shape
    return (
        n * h * queries * queries >= tuning.ATTENTION_SCORES
        and is_for_cpu(q, queries)
        and q.dtype == k.dtype == v.dtype
        and k.is_cpu
        and v.is_cpu
        and q.layout is k.layout is v.layout is torch.strided
    )


_IN_CPU = not extension.why_not("attention.cpu", "CPU")


def _cast(q: Tensor, *others: Tensor) -> list[Tensor]:
    """Tensors as autocast has them for `F.scaled_dot_product_attention`."""
    dtype = torch.get_autocast_dtype(q.device.type)
    return [x.to(dtype) if x.dtype in DTYPES and x.dtype != torch.float64 else x for x in (q, *others)]
