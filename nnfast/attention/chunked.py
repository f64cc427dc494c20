"""Attention from torch's own operations, a block of query rows at a time, so that memory is linear in length.

Keys that no query of a block sees, by causality or window, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from .reference import Place, Terms, wide

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


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """Out, in memory (N, Lq, H, Dv), and log-sum-exp; rest: `Terms`."""
    terms = Terms(*rest)  # type: ignore[arg-type]
    n, h, queries, _ = q.shape
    out = q.new_empty(n, queries, h, v.shape[3]).transpose(1, 2)
    lse = wide(q.new_empty(0)).new_empty(n, h, queries)
    with torch.autocast(q.device.type, enabled=False):
        for rows, columns, some, place in _blocks(q, k, terms):
            block = reference.attention(q[:, :, rows], k[:, :, columns], v[:, :, columns], some, place)
            out[:, :, rows], lse[:, :, rows] = block
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, if that is asked for, bias; rest: the operator's arguments from mask on."""
    *tensors, _out, _lse = rest[:7]
    *options, bias_grad = rest[7:]
    terms = Terms(*tensors, *options)  # type: ignore[arg-type]
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros_like(wide(x)) for x in (k, v))  # sums over blocks
    bias = terms.bias if bias_grad else None
    grad_bias = torch.zeros_like(wide(q.new_empty(0) if bias is None else bias))
    with torch.autocast(q.device.type, enabled=False):
        for rows, columns, some, place in _blocks(q, k, terms):
            some = some if some.bias is None else some._replace(bias=wide(some.bias))
            grad_q[:, :, rows], some_k, some_v, some_bias = reference.attention_backward(
                grad_out[:, :, rows],
                None if grad_lse is None else grad_lse[:, :, rows],
                q[:, :, rows],
                wide(k[:, :, columns]),
                wide(v[:, :, columns]),
                some,
                place,
            )
            grad_k[:, :, columns] += some_k
            grad_v[:, :, columns] += some_v
            of_block = None if bias is None else _part(grad_bias, rows, columns)
            if of_block is not None and some_bias is not None:
                of_block += some_bias
    return (
        grad_q,
        grad_k.to(k.dtype),
        grad_v.to(v.dtype),
        grad_bias.to(q.dtype if bias is None else bias.dtype),
    )
