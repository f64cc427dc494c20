"""Torch's own scaled dot-product attention, wherever it can express a call, with a double backward.

On the CPU that is its flash attention, called directly, since it takes a mask along with causality and tells
the log-sum-exp. On a GPU torch chooses among its kernels, less those that are known wrong for a call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.operator import requires_grad, transformed
from . import reference
from .reference import Terms

_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_on_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def expresses(q: Tensor, terms: Terms, return_lse: bool) -> bool:
    """Whether torch's own can give the result of a call and its first gradients."""
    if (
        terms.dropout_p
        or terms.alibi_slopes is not None
        or terms.softcap
        or terms.scale <= 0  # flash kernels hide keys before they scale: -inf would change its sign
        or max(terms.left, terms.right) >= 0
    ):
        return False
    of_bias = requires_grad(terms.bias)
    if q.is_cpu:
        return not of_bias
    return not return_lse and not (of_bias and is_compiling())


def run(
    q: Tensor, k: Tensor, v: Tensor, terms: Terms, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Out, and the log-sum-exp if asked for."""
    head, values = q.shape[3], v.shape[3]
    if head != values and (q.is_cpu or is_compiling()):  # torch's would hold all scores
        q, k, v = (F.pad(x, (0, max(head, values) - x.shape[3])) for x in (q, k, v))
    seen = None if return_lse or terms.is_causal else _seen(terms)
    added = _added(q, k, terms) if seen is None else seen
    lse = None
    both = terms.is_causal and added is not None
    if q.is_cpu and (return_lse or both):
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = _flash_on_cpu_with_lse(q, k, v, added, terms.is_causal, terms.scale, return_lse)
        if return_lse and added is not None:
            lse = lse.masked_fill(_blind(added, q, terms.is_causal), -torch.inf)
    else:
        if both:
            future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu_(1)
            added, terms = added.masked_fill(future, -torch.inf), terms._replace(is_causal=False)  # type: ignore[union-attr]
        if _avoids_cudnn(q, k, added):
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                out = plain(q, k, v, added, terms.is_causal, terms.scale)
        else:
            out = plain(q, k, v, added, terms.is_causal, terms.scale)
    return (out[..., :values] if head > values else out), lse


def plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Out by the kernel that torch chooses."""
    grouped = bool(q.shape[1] != k.shape[1])  # where torch.jit.trace follows, a tensor
    out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)
    return out if is_compiling() or out.grad_fn is None else _twice_differentiable(out)


def _twice_differentiable(out: Tensor) -> Tensor:
    """Out of torch's attention, whose own gradients have none."""
    node = out.grad_fn
    for _ in range(3):  # behind what takes padding off
        if node is not None and type(node).__name__.startswith("ScaledDotProduct"):
            node.register_hook(_differentiable_gradients)
            break
        node = node.next_functions[0][0] if node is not None and node.next_functions else None
    return out


def _differentiable_gradients(
    gradients: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...] | None:
    """Replaces the gradients of torch's kernel by the formula's where they are to be differentiated."""
    if not torch.is_grad_enabled():
        return None
    node: Any = torch._C._current_autograd_node()
    q, k, v = node._saved_query, node._saved_key, node._saved_value
    mask = (
        node._saved_attn_mask
        if hasattr(node, "_saved_attn_mask")
        else getattr(node, "_saved_attn_bias", None)
    )
    boolean = mask is not None and mask.dtype == torch.bool
    terms = Terms(mask if boolean else None, bias=None if boolean else mask, is_causal=node._saved_is_causal)
    scale = node._saved_scale
    terms = terms._replace(scale=q.shape[3] ** -0.5 if scale is None else scale)
    found = reference.attention_backward(grads[0], None, q, k, v, terms)
    return tuple(new if old is not None else None for old, new in zip(gradients, found, strict=False))


def _flash_on_cpu_with_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp, which is 0 where no key is seen."""
    if return_lse and requires_grad(q, k, v):
        apply = _FlashOnCPU.apply if is_compiling() else _flash
        out, lse = apply(q, k, v, bias, is_causal, scale)  # type: ignore[no-untyped-call]
        return out, lse
    out, lse = _flash_on_cpu(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)
    return out if is_compiling() or out.grad_fn is None else _twice_differentiable(out), lse


class _FlashOnCPU(torch.autograd.Function):
    """Torch's flash attention on the CPU, with gradients through its log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = _flash_on_cpu(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.options = is_causal, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        is_causal, scale = ctx.options
        terms = Terms(bias=bias, is_causal=is_causal, scale=scale)
        grads: tuple[Tensor | None, ...]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if transformed() or requires_grad(grad_out, grad_lse, q, k, v):
            grads = reference.attention_backward(grad_out, grad_lse, q, k, v, terms)
        elif grad_lse is not None:  # which torch's own takes none of
            rest = terms.for_backward(out, lse, bias_grad=False)
            grads = torch.ops.nnfast.attention_backward(grad_out, grad_lse, q, k, v, *rest)
        else:
            saved = (q, k, v, out, lse)
            grads = _flash_on_cpu_backward(grad_out, *saved, 0.0, is_causal, attn_mask=bias, scale=scale)
        return *grads[:3], None, None, None


_flash = super(torch.autograd.Function, _FlashOnCPU).apply
"""`_FlashOnCPU.apply` without its wrapper in Python, which only transforms need."""


def _avoids_cudnn(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether torch may not choose cuDNN for a call.

    Its gradient of q may be NaN where there is a mask and a length is 64 over a multiple of 128, or where
    there is one query (pytorch#196678, cudnn-frontend#1072), and it changes from run to run.
    """
    if not q.is_cuda or not torch.is_grad_enabled():
        return False
    lengths = (q.shape[2], k.shape[2])
    wrong = lengths[0] == 1 or (mask is not None and any(length % 128 == 64 for length in lengths))
    return wrong or torch.are_deterministic_algorithms_enabled()


def _seen(terms: Terms) -> Tensor | None:
    """The boolean mask that is all there is to add to the scores, or None."""
    if terms.bias is not None or (terms.mask is None) == (terms.key_padding is None):
        return None
    return ~terms.key_padding[:, None, None] if terms.mask is None else terms.mask  # type: ignore[index]


def _added(q: Tensor, k: Tensor, terms: Terms) -> Tensor | None:
    """Masks and bias as one mask that torch takes, no larger than they broadcast to."""
    added = reference.added(q, k, terms._replace(is_causal=False))
    exact = q.is_cpu and not is_compiling()  # flash attention on the CPU takes float32 along with half types
    return added if added is None or exact else added.to(q.dtype)


def _blind(added: Tensor, q: Tensor, is_causal: bool) -> Tensor:
    """Queries that see no key: broadcastable to (N, H, Lq)."""
    seen = added != -torch.inf
    if not is_causal:
        return ~seen.any(-1)
    first = seen.int().argmax(-1)  # the first key seen, or 0
    row = torch.arange(q.shape[2], device=q.device)
    return (first > row) | ~seen.any(-1)
