"""Attention in plain PyTorch: the truth of the tests, the `reference` backend, and double backward.

    s = scale * q k^T;  s = softcap * tanh(s / softcap);  s = s - slope * |i + Lk - Lq - j| + bias
    p = softmax over the keys j that query i sees;  out = dropout(p) v;  lse = log(sum_j exp(s_ij))

Vaswani et al. 2017 (arXiv:1706.03762); grouped heads: Ainslie et al. 2023 (arXiv:2305.13245); linear biases:
Press et al. 2021 (arXiv:2108.12409). A query that sees no key gives 0, and lse = -inf.

q: (N, H, Lq, D), k: (N, Hk, Lk, D), v: (N, Hk, Lk, Dv); query head h reads key head h // (H // Hk).
Half types are computed in float32.

Rotary embedding: a pair (a, b) of features becomes (a cos - b sin, b cos + a sin); Su et al. 2021
(arXiv:2104.09864).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.op import describe
from ..core.operator import compute_dtype

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


class Terms(NamedTuple):
    """What enters the probabilities beside q and k, in the order of the operators' arguments."""

    mask: Tensor | None = None
    """Bool, broadcastable to (N, H, Lq, Lk); True = seen."""
    key_padding: Tensor | None = None
    """Bool (N, Lk); True = unseen."""
    bias: Tensor | None = None
    """Floating, broadcastable to (N, H, Lq, Lk)."""
    alibi_slopes: Tensor | None = None
    """(N, H)."""
    seed: Tensor | None = None
    """Of dropout: int64 ()."""
    cos: Tensor | None = None
    """By which, and sin, q and k turn: (N, H, L, R), or 1 in place of the first three; L of the longer."""
    sin: Tensor | None = None
    is_causal: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    """0 = none."""
    left: int = -1
    """How many keys before its own a query sees; -1 = all."""
    right: int = -1
    """The same behind it."""
    dropout_p: float = 0.0
    interleaved: bool = False
    """Of what turns, pairs are neighbours."""

    @property
    def is_plain(self) -> bool:
        """Nothing but scale and causality enters the probabilities of q and k, turned or not."""
        return (
            self.mask is self.key_padding is self.bias is self.alibi_slopes is None
            and not (self.softcap or self.dropout_p)
            and self.left < 0
            and self.right < 0
        )

    def for_backward(self, out: Tensor, lse: Tensor, bias_grad: bool) -> tuple[object, ...]:
        """The backward operator's arguments from mask on."""
        return *self[:TENSORS], out, lse, *self[TENSORS:], bias_grad

    def __repr__(self) -> str:
        default = Terms()._asdict()
        given = {
            name: x for name, x in self._asdict().items() if x is not default[name] and x != default[name]
        }
        return describe((), given)[1:-1]


class Place(NamedTuple):
    """Where a block of the scores lies in the whole of them."""

    row: int = 0
    """Its first query."""
    column: int = 0
    """Its first key."""
    keys_more: int | None = None
    """Lk - Lq of the whole; None if the block is the whole."""


WHOLE = Place()
TENSORS = 7
"""How many of `Terms` come first and are tensors."""


def wide(x: Tensor) -> Tensor:
    """x in the dtype it is computed in."""
    return x if x.dtype == torch.float64 else x.float()


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four random 32-bit words, in int64.

    key: 64 bits in an int64 scalar. counter: its first three words, of shapes that broadcast; the last is 0.
    """
    low, high = key & _WORD, (key >> 32) & _WORD
    a, b, c = counter
    d = torch.zeros_like(c)
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c  # products wrap, which keeps their 64 bits
        a, c = (second >> 32 ^ b ^ low) & _WORD, (first >> 32 ^ d ^ high) & _WORD
        b, d = second, first  # of these the lower half counts
        low, high = low + _KEY_STEPS[0] & _WORD, high + _KEY_STEPS[1] & _WORD
    return a, b & _WORD, c, d & _WORD


def kept(seed: Tensor, dropout_p: float, shape: torch.Size, place: Place = WHOLE) -> Tensor:
    """Which of the probabilities (N, H, Lq, Lk) dropout keeps: those with a word of at least p * 2**32.

    Four keys side by side share a counter, (j // 4, i, n * H + h), and take a word each.
    """
    n, h, rows, columns = shape
    start = place.column // 4
    stop = (place.column + columns + 3) // 4
    counter = (
        torch.arange(start, stop, device=seed.device),
        torch.arange(place.row, place.row + rows, device=seed.device)[:, None],
        torch.arange(n * h, device=seed.device).view(n, h, 1, 1),
    )
    keep = torch.stack(torch.broadcast_tensors(*philox(seed, counter)), -1) >= int(dropout_p * 2**32)
    return keep.flatten(-2)[..., place.column - 4 * start :][..., :columns]


def unseen(q: Tensor, k: Tensor, terms: Terms, place: Place = WHOLE) -> Tensor | None:
    """Which keys a query does not see, broadcastable to (N, H, Lq, Lk); None if it sees all."""
    parts = [] if terms.mask is None else [~terms.mask]
    if terms.key_padding is not None:
        parts.append(terms.key_padding[:, None, None])
    if terms.is_causal or terms.left >= 0 or terms.right >= 0:
        behind = _behind(q, k, place)
        if terms.left >= 0:
            parts.append(behind > terms.left)
        if terms.is_causal or terms.right >= 0:
            parts.append(behind < (0 if terms.is_causal else -terms.right))
    result = None
    for part in parts:
        result = part if result is None else result | part
    return result


def added(q: Tensor, k: Tensor, terms: Terms, place: Place = WHOLE) -> Tensor | None:
    """What is added to the scores, -inf where a key is unseen: broadcastable to (N, H, Lq, Lk), or None."""
    dtype = compute_dtype(q)
    result = None if terms.bias is None else terms.bias.to(dtype)
    if terms.alibi_slopes is not None:
        keys_more = k.shape[2] - q.shape[2] if place.keys_more is None else place.keys_more
        away = (_behind(q, k, place) + keys_more).abs()
        of_place = terms.alibi_slopes.to(dtype)[:, :, None, None] * -away
        result = of_place if result is None else result + of_place
    hidden = unseen(q, k, terms, place)
    if hidden is None:
        return result
    if result is None:
        result = torch.zeros(hidden.shape, dtype=dtype, device=q.device)
    return result.masked_fill(hidden, -torch.inf)


def _behind(q: Tensor, k: Tensor, place: Place) -> Tensor:
    """i - j, by how much a key lies behind a query: (Lq, Lk)."""
    i = torch.arange(place.row, place.row + q.shape[2], device=q.device)
    j = torch.arange(place.column, place.column + k.shape[2], device=q.device)
    return i[:, None] - j


def _for_query_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values (N, Hk, Lk, D) as (N, H, Lk, D), in the compute dtype."""
    groups = q.shape[1] // x.shape[1]
    return wide(x) if groups == 1 else wide(x).repeat_interleave(groups, 1)


def _for_key_heads(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of keys or values x from that of `_for_query_heads`."""
    groups = grad.shape[1] // x.shape[1]
    return (grad if groups == 1 else grad.unflatten(1, (x.shape[1], groups)).sum(2)).to(x.dtype)


class _Softmax(NamedTuple):
    """What the scores come to: (N, H, Lq, Lk), but for log_sum_exp: (N, H, Lq)."""

    p: Tensor
    log_sum_exp: Tensor
    factor: Tensor | None
    """Dropout's: 0 or 1 / (1 - dropout_p)."""
    slope: Tensor | None
    """The derivative of the soft cap."""


def _softmax(q: Tensor, k: Tensor, terms: Terms, place: Place) -> _Softmax:
    s = (wide(q) * terms.scale) @ _for_query_heads(k, q).mT
    slope = factor = None
    if terms.softcap:
        t = torch.tanh(s / terms.softcap)
        s, slope = terms.softcap * t, 1 - t * t
    more = added(q, k, terms, place)
    if more is not None:
        s = s + more
    blind = (s == -torch.inf).all(-1, keepdim=True)  # softmax and its gradient would be NaN there
    s = s.masked_fill(blind, 0.0)
    p = torch.softmax(s, -1).masked_fill(blind, 0.0)
    log_sum_exp = torch.logsumexp(s, -1).masked_fill(blind.squeeze(-1), -torch.inf)
    if terms.dropout_p and terms.seed is not None:
        factor = kept(terms.seed, terms.dropout_p, s.shape, place).to(s.dtype) / (1 - terms.dropout_p)
    return _Softmax(p, log_sum_exp, factor, slope)


def attention(q: Tensor, k: Tensor, v: Tensor, terms: Terms, place: Place = WHOLE) -> tuple[Tensor, Tensor]:
    """Out: (N, H, Lq, Dv) in q's dtype, and log-sum-exp: (N, H, Lq) in the compute dtype."""
    q, k, terms = turned(q, k, terms)
    p, log_sum_exp, factor, _ = _softmax(q, k, terms, place)
    p = p if factor is None else p * factor
    return (p @ _for_query_heads(v, q)).to(q.dtype), log_sum_exp


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Terms,
    place: Place = WHOLE,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and bias, of their shapes and dtypes; differentiable."""
    given = terms
    q, k, terms = turned(q, k, terms)
    p, _, factor, slope = _softmax(q, k, terms, place)
    grad = wide(grad_out)
    grad_v = (p if factor is None else p * factor).mT @ grad
    grad_p = grad @ _for_query_heads(v, q).mT
    grad_p = grad_p if factor is None else grad_p * factor
    inner = (grad_p * p).sum(-1, keepdim=True)
    grad_s = p * (grad_p - (inner if grad_lse is None else inner - wide(grad_lse).unsqueeze(-1)))
    bias = terms.bias
    grad_bias = None if bias is None else grad_s.sum_to_size(bias.shape).to(bias.dtype)
    grad_s = grad_s if slope is None else grad_s * slope
    grad_q = (grad_s @ _for_query_heads(k, q) * terms.scale).to(q.dtype)
    grad_k = _for_key_heads(grad_s.mT @ (wide(q) * terms.scale), k)
    return *turned_back(grad_q, grad_k, given), _for_key_heads(grad_v, v), grad_bias


def turned(q: Tensor, k: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Terms]:
    """Queries and keys as they meet, and the terms of a call with these."""
    if terms.cos is None or terms.sin is None:
        return q, k, terms
    q, k = (
        rotary(x, terms.cos[:, :, : x.shape[2]], terms.sin[:, :, : x.shape[2]], terms.interleaved)
        for x in (q, k)
    )
    return q, k, terms._replace(cos=None, sin=None)


def turned_back(grad_q: Tensor, grad_k: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Gradients of q and k from those of what they turned into."""
    back = terms if terms.sin is None else terms._replace(sin=-terms.sin)
    return turned(grad_q, grad_k, back)[:2]


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: (..., L, D), its first 2 R features turned; cos, sin: broadcastable to (..., L, R).

    Pairs are features 2i and 2i + 1 if interleaved, else i and i + R.
    """
    width = 2 * cos.shape[-1]
    all_turn = width == x.shape[-1]
    turned = wide(x if all_turn else x[..., :width])
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((a, b), -1).reshape(*x.shape[:-1], width) if interleaved else torch.cat((a, b), -1)
    if not all_turn:
        turned = torch.cat((turned, wide(x[..., width:])), -1)  # autocast joins no float16 on the CPU
    return turned.to(x.dtype)
