"""Attention as a function."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import op
from .positional import RotaryEmbedding


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
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
    rotary: RotaryEmbedding | None = None,
    positions: Tensor | None = None,
) -> Any:
    """Scaled dot-product attention: softmax(scale * q k^T + ...) v, with memory linear in the lengths.

    Query i and key j count from 0 in all of these, whatever the lengths, as in
    `F.scaled_dot_product_attention`. A query that sees no key gives 0, lse -inf, and gradients 0.

    Args:
        q: (N, H, Lq, D), in float32, float64, float16 or bfloat16; any strides; D at most 256.
        k: (N, Hk, Lk, D); Hk divides H, and query head h reads key head h // (H // Hk).
        v: (N, Hk, Lk, Dv), Dv at most 256.
        mask: bool, broadcastable to (N, H, Lq, Lk); True = attend.
        key_padding_mask: bool (N, Lk); True = padding, which no query sees, as in `nn.MultiheadAttention`.
        bias: floating-point, broadcastable to (N, H, Lq, Lk): added to the scores, after scale and softcap.
        is_causal: query i sees keys j <= i.
        scale: factor of the scores; D**-0.5 if None.
        dropout_p: in [0, 1): probability with which a softmax probability becomes 0; the others are divided
            by 1 - dropout_p.
        window: (left, right), or one number for both: query i sees keys i - left <= j <= i + right; None is
            all.
        alibi_slopes: (H,) or (N, H): slope * |i + Lk - Lq - j| is taken from the scores, which aligns the
            ends (Press et al. 2021).
        softcap: scores s become softcap * tanh(s / softcap); None or 0 = no.
        seed: of the dropout, int64: the same drops the same, on every backend. Taken from torch's generator
            of q's device if None.
        return_lse: also return the log-sum-exp of the scores.
        rotary: turns q and k first, as `rotary(q, k, positions)` does. Our CPU kernels turn them as they
            read, and gradients back as they write; so do Triton's, but keys, which many programs read, and
            what a backward pass reads, are mostly turned before.
        positions: for `rotary`, broadcastable to both (N, H, Lq) and (N, Hk, Lk); counted from 0 if None.

    Returns:
        out: (N, H, Lq, Dv) in q's dtype. With return_lse (out, lse), lse: (N, H, Lq) in float32, or float64
        for float64. Both are differentiable in q, k, v and bias.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape, device, dropout_p, window or softcap, or positions without rotary.
        BackendError: if a forced backend cannot serve.

    Source: Vaswani et al. 2017, arXiv:1706.03762; Dao 2023, arXiv:2307.08691.
    """
    options = (
        mask,
        key_padding_mask,
        bias,
        is_causal,
        scale,
        dropout_p,
        window,
        alibi_slopes,
        softcap,
        seed,
        return_lse,
    )
    if rotary is None and positions is None:
        return op.attention(q, k, v, *options)
    turn = _turn(q, k, v, rotary, positions)
    return op.rotary_attention(q, k, v, *turn.angles(q, k, positions), turn.interleaved, *options)


def _turn(q: Tensor, k: Tensor, v: Tensor, rotary: object, positions: Tensor | None) -> RotaryEmbedding:
    """The rotary embedding, checked."""
    op.check_heads(q, k, v)
    if rotary is None:
        raise ValueError("nnfast.attention: positions are given; they need rotary")
    if not isinstance(rotary, RotaryEmbedding):
        raise TypeError(
            f"nnfast.attention: rotary is a {type(rotary).__name__}; it needs an nnfast.RotaryEmbedding"
        )
    return rotary


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, *, rotary: object = None, positions: Tensor | None = None, **options: Any
) -> tuple[Any, ...]:
    """The operation's arguments from the function's, for `nnfast.explain`: turning changes none of it."""
    if rotary is not None or positions is not None:
        _turn(q, k, v, rotary, positions).angles(q, k, positions)
    return op.arguments(q, k, v, **options)


op.ATTENTION.arguments = _arguments
attention.nnfast_op = "attention"  # type: ignore[attr-defined]  # what `nnfast.explain` looks up
