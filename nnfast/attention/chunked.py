"""Attention from torch's own operations, a block of query rows at a time, so that memory is linear in length.

Keys that no query of a block sees, by causality or window, are left out. On the CPU torch's flash attention
does a block, given what is added to its scores, unless the formula is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.operator import attention_out, compute_dtype, without_autocast
from . import reference
from .reference import TENSORS, Place, Terms, wide

_BLOCK = 1 << 20
"""Scores of a block, at most."""

_LITTLE = 1 << 17
"""Scores below which a block is mostly overhead."""


def _rows(q: Tensor, keys: int, window: int) -> int:
    """How many query rows a block has; window: how many keys one sees, if that is limited on both sides.

    Of the keys that n rows with a window see together, window / (n + window) are seen by one.
    """
    heads = max(q.shape[0] * q.shape[1], 1)
    if not window:
        return max(_BLOCK // (heads * max(keys, 1)), 16)
    wanted = max(window, 64, math.isqrt(_LITTLE // heads))
    return max(min(_BLOCK // (heads * (wanted + window)), wanted), 16)


def _blocks(q: Tensor, k: Tensor, terms: Terms) -> Iterator[tuple[slice, slice, Terms, Place]]:
    """Some query rows, the keys that any of them may see, their terms, and where that block lies."""
    queries, keys = q.shape[2], k.shape[2]
    left, right = terms.left, 0 if terms.is_causal else terms.right
    step = _rows(q, keys, 0 if min(left, right) < 0 else left + right + 1)
    for begin in range(0, queries, step):
        end = min(begin + step, queries)
        first = 0 if left < 0 else min(max(begin - left, 0), keys)
        last = keys if right < 0 else min(end + right, keys)
        rows, columns = slice(begin, end), slice(first, max(first, last))
        some = terms._replace(
            mask=_part(terms.mask, rows, columns),
            key_padding=None if terms.key_padding is None else terms.key_padding[:, columns],
            bias=_part(terms.bias, rows, columns),
        )
        yield rows, columns, some, Place(begin, first, keys - queries)


def _part(x: Tensor | None, rows: slice, columns: slice) -> Tensor | None:
    """The block of a mask or bias that broadcasts to (N, H, Lq, Lk)."""
    if x is None:
        return None
    x = x if x.shape[2] == 1 else x[:, :, rows]
    return x if x.shape[3] == 1 else x[..., columns]


def _by_flash(q: Tensor, k: Tensor, terms: Terms) -> bool:
    """Whether torch's flash attention on the CPU does a block."""
    return q.is_cpu and not terms.softcap and not terms.dropout_p and k.shape[2] > 0


def _one_head_dim(*tensors: Tensor) -> list[Tensor]:
    """Tensors padded to the largest of their head dims, and contiguous along it, as flash attention needs."""
    largest = max(x.shape[3] for x in tensors)
    padded = (x if x.shape[3] == largest else F.pad(x, (0, largest - x.shape[3])) for x in tensors)
    return [x if x.stride(3) == 1 else x.contiguous() for x in padded]


def _flash(q: Tensor, k: Tensor, v: Tensor, terms: Terms, place: Place) -> tuple[Tensor, Tensor]:
    bias = reference.added(q, k, terms, place)
    out, lse = _flash_on_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=terms.scale)
    if bias is not None:  # where no key is seen, lse is 0
        lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
    return out, lse


def _flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    terms: Terms,
    place: Place,
) -> tuple[Tensor, Tensor, Tensor, None]:
    bias = reference.added(q, k, terms, place)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    saved = (q, k, v, out, lse)
    grads = _flash_on_cpu_backward(grad_out, *saved, 0.0, False, attn_mask=bias, scale=terms.scale)
    return *grads, None


_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_on_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """Out, in memory (N, Lq, H, Dv) or (Lq, N, H, Dv), and log-sum-exp; rest: `Terms`."""
    q, k, terms = reference.turned(q, k, Terms(*rest))  # type: ignore[arg-type]
    n, h, queries, _ = q.shape
    values = v.shape[3]
    out = attention_out(q, values)
    lse = q.new_empty(n, h, queries, dtype=compute_dtype(q))
    by_flash = _by_flash(q, k, terms)
    if by_flash:
        q, k, v = _one_head_dim(q, k, v)
    with without_autocast(q):
        for rows, columns, some, place in _blocks(q, k, terms):
            block = q[:, :, rows], k[:, :, columns], v[:, :, columns], some, place
            attend = _flash if by_flash and block[1].shape[2] else reference.attention
            some_out, lse[:, :, rows] = attend(*block)
            out[:, :, rows] = some_out[..., :values]
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, if that is asked for, bias; rest: the operator's arguments from mask on."""
    *tensors, out, lse = rest[: TENSORS + 2]
    *options, bias_grad = rest[TENSORS + 2 :]
    given = Terms(*tensors, *options)  # type: ignore[arg-type]
    q, k, terms = reference.turned(q, k, given)
    bias = terms.bias if bias_grad else None
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros_like(wide(x)) for x in (k, v))  # sums over blocks
    grad_bias = torch.zeros_like(wide(q.new_empty(0) if bias is None else bias))
    by_flash = _by_flash(q, k, terms) and bias is None and grad_lse is None
    head, values = q.shape[3], v.shape[3]
    if by_flash:
        q, k, v, grad_out, out = _one_head_dim(q, k, v, grad_out, out)  # type: ignore[arg-type]
    with without_autocast(q):
        for rows, columns, some, place in _blocks(q, k, terms):
            of_rows, of_keys, of_values = q[:, :, rows], k[:, :, columns], v[:, :, columns]
            some_bias: Tensor | None
            if by_flash and of_keys.shape[2]:
                saved = out[:, :, rows], lse[:, :, rows]  # type: ignore[index]
                some_q, some_k, some_v, some_bias = _flash_backward(
                    grad_out[:, :, rows], of_rows, of_keys, of_values, *saved, some, place
                )
            else:
                some = some if some.bias is None else some._replace(bias=wide(some.bias))
                some_q, some_k, some_v, some_bias = reference.attention_backward(
                    grad_out[:, :, rows],
                    None if grad_lse is None else grad_lse[:, :, rows],
                    of_rows,
                    wide(of_keys),
                    wide(of_values),
                    some,
                    place,
                )
            grad_q[:, :, rows] = some_q[..., :head]
            grad_k[:, :, columns] += some_k[..., :head]
            grad_v[:, :, columns] += some_v[..., :values]
            of_block = None if bias is None else _part(grad_bias, rows, columns)
            if of_block is not None and some_bias is not None:
                of_block += some_bias
    return (
        *reference.turned_back(grad_q, grad_k.to(k.dtype), given),
        grad_v.to(v.dtype),
        grad_bias.to(q.dtype if bias is None else bias.dtype),
    )
