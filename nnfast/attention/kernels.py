"""Attention in Triton: online softmax over blocks of keys, and a deterministic backward without atomics.

Milakov and Gimelshein 2018 (arXiv:1805.02867); Dao 2023 (arXiv:2307.08691). A program of forward, of grad_q
and of a whole grad_bias has a block of queries and goes over the keys these see; one of grad_k and grad_v has
a block of keys and goes over the queries that see these. Blocks that all see whole, without a test of places,
are apart from those at an edge. Scores of half types carry log2(e), so that exp2 serves; others do not, since
rounding both a score and lse so would show in their difference.

Rotary embedding (Su et al. 2021, arXiv:2104.09864): forward turns queries as it reads them, and keys if few
queries read them; backward turns gradients back as it writes them. What each program of many would have to
turn again has a kernel of its own, the last one here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.operator import attention_out
from ..core.triton import TensorDescriptor, architecture, one_minus_exp, tl, triton, wide
from ..core.tuning import ROTARY_HEAD, ROTARY_QUERIES, AttentionConfig, attention_config, rotary_config

LOG2_E = math.log2(math.e)
PROGRAMS = 1024
"""Programs that fill a device: what is summed for a broadcast bias is split until there are so many."""


@triton.jit
def _scalar(value, dtype: tl.constexpr):
    """A scalar argument in a tile's type: a number in the interpreter, float64 elsewhere."""
    return tl.full([1], value, dtype)


@triton.jit
def _tile(
    x_ptr,
    n,
    h,
    x_n,
    x_h,
    x_row,
    start,
    length,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EDGE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """BLOCK rows of matrix (n, h) from row `start` on, zero outside; EDGE: some may be."""
    if DESCRIPTOR:
        tile = x_ptr.load([tl.cast(n, tl.int32), tl.cast(h, tl.int32), start, 0]).reshape([BLOCK, BLOCK_D])
    else:
        row = tl.arange(0, BLOCK)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        origin = x_ptr + n * x_n + h * x_h + tl.cast(start, tl.int64) * x_row
        pointers = origin + (row * x_row + d)
        if EDGE and D < BLOCK_D:
            tile = tl.load(pointers, mask=(start + row < length) & (d < D), other=0.0)
        elif EDGE:
            tile = tl.load(pointers, mask=start + row < length, other=0.0)
        elif D < BLOCK_D:
            tile = tl.load(pointers, mask=d < D, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def _store(
    x_ptr,
    x,
    n,
    h,
    x_n,
    x_h,
    x_row,
    start,
    length,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a tile where it lies inside."""
    row = start + tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    pointers = x_ptr + n * x_n + h * x_h + (row.to(tl.int64) * x_row + d)
    tl.store(pointers, x.to(x_ptr.dtype.element_ty), mask=(row < length) & (d < D))


@triton.jit
def _turned(
    x,
    n,
    h,
    start,
    length,
    cos_ptr,
    sin_ptr,
    turn_n,
    turn_h,
    turn_row,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile whose first HALF pairs turn, or BACK; HALF is a power of 2, or pairs are INTERLEAVED."""
    row = tl.arange(0, BLOCK)[:, None]
    pair = tl.arange(0, BLOCK_D // 2)[None, :]
    turns = pair < HALF
    there = (start + row < length) & turns
    origin = n * turn_n + h * turn_h + tl.cast(start, tl.int64) * turn_row
    cos = tl.load(cos_ptr + origin + (row * turn_row + pair), mask=there, other=1.0)
    sin = tl.load(sin_ptr + origin + (row * turn_row + pair), mask=there, other=0.0)
    sin = -sin if BACK else sin
    pairs = wide(x)
    if not INTERLEAVED:
        pairs = tl.permute(pairs.reshape([BLOCK, BLOCK_D // (2 * HALF), 2, HALF]), (0, 1, 3, 2))
    a, b = tl.split(pairs.reshape([BLOCK, BLOCK_D // 2, 2]))
    first = a * cos - b * sin
    second = b * cos + a * sin
    if 2 * HALF < BLOCK_D:
        first, second = tl.where(turns, first, a), tl.where(turns, second, b)
    pairs = tl.join(first, second)
    if not INTERLEAVED:
        pairs = tl.permute(pairs.reshape([BLOCK, BLOCK_D // (2 * HALF), HALF, 2]), (0, 1, 3, 2))
    return pairs.reshape([BLOCK, BLOCK_D]).to(x.dtype)


@triton.jit
def _split(low, high, whole_from, whole_to, BLOCK: tl.constexpr):
    """Starts of the blocks over [low, high): of the first, of the first and past the last seen whole."""
    first = low // BLOCK * BLOCK
    whole_first = tl.maximum(tl.cdiv(tl.maximum(whole_from, 0), BLOCK) * BLOCK, first)
    whole_last = tl.maximum(tl.maximum(tl.minimum(high, whole_to), 0) // BLOCK * BLOCK, whole_first)
    return first, whole_first, whole_last


@triton.jit
def _keys_of(
    row,
    n,
    bounds_ptr,
    queries,
    keys,
    left,
    right,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of the keys that a block of queries sees: `_split`, and the end."""
    low = keys * 0
    high = keys
    if bounds_ptr is not None:
        low = tl.load(bounds_ptr + 2 * n)
        high = tl.load(bounds_ptr + 2 * n + 1)
    last = tl.minimum(row + BLOCK_M, queries) - 1
    whole_from = low
    whole_to = high
    if LEFT:
        low = tl.maximum(low, row - left)
        whole_from = last - left
    if RIGHT:
        high = tl.minimum(high, last + right + 1)
        whole_to = row + right + 1
    first, whole_first, whole_last = _split(low, high, whole_from, whole_to, BLOCK_N)
    return first, whole_first, whole_last, high


@triton.jit
def _in_unit(s, PRECISE: tl.constexpr):
    """Scores in the unit they are kept in."""
    return s if PRECISE else s * 1.4426950408889634


@triton.jit
def _exp(s, PRECISE: tl.constexpr):
    """e to the power of scores in their unit."""
    return tl.exp(s) if PRECISE else tl.exp2(s)


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    if PRECISE:
        e = one_minus_exp(2.0 * tl.abs(x))
        t = e / (2.0 - e)
        t = tl.where(x < 0.0, -t, t)
    else:
        t = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
    return t


@triton.jit
def _scores(
    s,
    i,
    j,
    n,
    h,
    mask_ptr,
    mask_n,
    mask_h,
    mask_m,
    mask_k,
    padding_ptr,
    padding_n,
    padding_k,
    bias_ptr,
    bias_n,
    bias_h,
    bias_m,
    bias_k,
    slopes_ptr,
    slopes_n,
    slopes_h,
    scale: tl.float64,
    cap: tl.float64,
    queries,
    keys,
    left,
    right,
    CAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    EDGE: tl.constexpr,
    RAW: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Scores in their unit from products q k^T, -inf where unseen, and the derivative of the soft cap.

    i, j: places of queries and keys, laid beside the tile. scale holds the unit, or 1 / softcap where there
    is CAP, and cap the unit then. RAW: leave the scale out.
    """
    slope = s
    if CAP:
        t = _tanh(s * _scalar(scale, s.dtype), PRECISE)
        slope = 1.0 - t * t
        s = t * _scalar(cap, s.dtype)
    elif not RAW:
        s = s * _scalar(scale, s.dtype)
    if slopes_ptr is not None:
        alibi = tl.load(slopes_ptr + n * slopes_n + h * slopes_h).to(s.dtype)
        distance = tl.abs(i + (keys - queries) - j).to(s.dtype)
        s = s - _in_unit(alibi, PRECISE) * distance
    if bias_ptr is not None:
        pointers = bias_ptr + n * bias_n + h * bias_h + (i.to(tl.int64) * bias_m + j.to(tl.int64) * bias_k)
        bias = tl.load(pointers, mask=(i < queries) & (j < keys), other=0.0)
        s = s + _in_unit(bias.to(s.dtype), PRECISE)
    if mask_ptr is not None:
        pointers = mask_ptr + n * mask_n + h * mask_h + (i.to(tl.int64) * mask_m + j.to(tl.int64) * mask_k)
        s = tl.where(tl.load(pointers, mask=(i < queries) & (j < keys), other=0) != 0, s, float("-inf"))
    if padding_ptr is not None:
        pointers = padding_ptr + n * padding_n + j.to(tl.int64) * padding_k
        s = tl.where(tl.load(pointers, mask=j < keys, other=1) == 0, s, float("-inf"))
    if EDGE:
        seen = j < keys
        if LEFT:
            seen = seen & (j >= i - left)
        if RIGHT:
            seen = seen & (j <= i + right)
        s = tl.where(seen, s, float("-inf"))
    return s, slope


@triton.jit
def _kept(seed_ptr, head, row, column, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements of a tile dropout keeps: a counter's four words serve four keys side by side."""
    group = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    i = group + (row + tl.arange(0, BLOCK_M))[:, None]
    j = group + (column // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    a, b, c, d = tl.philox(tl.load(seed_ptr), j, i, group + head.to(tl.int32), group)
    least = _scalar(threshold, tl.uint32)
    pairs = tl.join(tl.join(a >= least, c >= least), tl.join(b >= least, d >= least))
    return pairs.reshape([BLOCK_M, BLOCK_N])


@triton.jit
def _forward_blocks(
    acc,
    total,
    top,
    q,
    row,
    n,
    h,
    hk,
    head,
    begin,
    end,
    gap_at,
    gap,
    k_ptr,
    k_n,
    k_h,
    k_m,
    v_ptr,
    v_n,
    v_h,
    v_m,
    mask_ptr,
    mask_n,
    mask_h,
    mask_m,
    mask_k,
    padding_ptr,
    padding_n,
    padding_k,
    bias_ptr,
    bias_n,
    bias_h,
    bias_m,
    bias_k,
    slopes_ptr,
    slopes_n,
    slopes_h,
    seed_ptr,
    threshold: tl.int64,
    scale: tl.float64,
    cap: tl.float64,
    queries,
    keys,
    left,
    right,
    cos_ptr,
    sin_ptr,
    turn_n,
    turn_h,
    turn_row,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    EDGE: tl.constexpr,
    RAW: tl.constexpr,
    TURN_K: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Take in the blocks of keys from `begin` to `end`, of which those from gap_at on lie `gap` further."""
    PRECISE: tl.constexpr = q.dtype == tl.float32 or q.dtype == tl.float64
    i = row + tl.arange(0, BLOCK_M)[:, None]
    for place in range(begin, end, BLOCK_N):
        start = place
        if EDGE:
            start = place + tl.where(place >= gap_at, gap, 0)
        k = _tile(k_ptr, n, hk, k_n, k_h, k_m, start, keys, D, BLOCK_N, BLOCK_D, EDGE, DESCRIPTOR)
        if TURN_K:
            k = _turned(
                k, n, hk, start, keys, cos_ptr, sin_ptr, turn_n, turn_h, turn_row,
                HALF, INTERLEAVED, False, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        j = start + tl.arange(0, BLOCK_N)[None, :]
        s, _ = _scores(
            s, i, j, n, h, mask_ptr, mask_n, mask_h, mask_m, mask_k, padding_ptr, padding_n, padding_k,
            bias_ptr, bias_n, bias_h, bias_m, bias_k, slopes_ptr, slopes_n, slopes_h, scale, cap,
            queries, keys, left, right, CAP, LEFT, RIGHT, EDGE, RAW, PRECISE,
        )  # fmt: skip
        highest = tl.max(s, 1)
        if RAW:
            highest = highest * _scalar(scale, s.dtype)
            s = s * _scalar(scale, s.dtype)
        before = top
        top = tl.maximum(before, highest)
        anchor = tl.where(top == float("-inf"), 0.0, top)  # of rows that have seen nothing yet
        p = _exp(s - anchor[:, None], PRECISE)
        shrink = _exp(before - anchor, PRECISE)
        total = total * shrink + tl.sum(p, 1)
        if seed_ptr is not None:
            p = tl.where(_kept(seed_ptr, head, row, start, threshold, BLOCK_M, BLOCK_N), p, 0.0)
        v = _tile(v_ptr, n, hk, v_n, v_h, v_m, start, keys, DV, BLOCK_N, BLOCK_DV, EDGE, DESCRIPTOR)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
    return acc, total, top


@triton.jit
def forward_kernel(
    q_ptr,
    q_n,
    q_h,
    q_m,
    k_ptr,
    k_n,
    k_h,
    k_m,
    v_ptr,
    v_n,
    v_h,
    v_m,
    mask_ptr,
    mask_n,
    mask_h,
    mask_m,
    mask_k,
    padding_ptr,
    padding_n,
    padding_k,
    bounds_ptr,
    bias_ptr,
    bias_n,
    bias_h,
    bias_m,
    bias_k,
    slopes_ptr,
    slopes_n,
    slopes_h,
    seed_ptr,
    threshold: tl.int64,
    enlarge: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    heads,
    group,
    queries,
    keys,
    left,
    right,
    out_ptr,
    out_n,
    out_h,
    out_m,
    lse_ptr,
    cos_ptr,
    sin_ptr,
    turn_n,
    turn_h,
    turn_row,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    RAW: tl.constexpr,
    TURN_K: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """out and lse of BLOCK_M queries of a head; those that see most keys first."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    head = pid // blocks
    row = ((blocks - 1 - pid % blocks) * BLOCK_M).to(tl.int32)
    n = head // heads
    h = head % heads
    hk = h // group
    q = _tile(q_ptr, n, h, q_n, q_h, q_m, row, queries, D, BLOCK_M, BLOCK_D, True, False)
    if cos_ptr is not None:
        q = _turned(
            q, n, h, row, queries, cos_ptr, sin_ptr, turn_n, turn_h, turn_row,
            HALF, INTERLEAVED, False, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    first, whole_first, whole_last, end = _keys_of(
        row, n, bounds_ptr, queries, keys, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N
    )
    accumulator: tl.constexpr = lse_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_DV], accumulator)
    total = tl.zeros([BLOCK_M], accumulator)
    top = tl.full([BLOCK_M], float("-inf"), accumulator)
    for EDGE in tl.static_range(2):
        begin = first if EDGE else whole_first
        gap = whole_last - whole_first
        stop = end - gap if EDGE else whole_last
        acc, total, top = _forward_blocks(
            acc, total, top, q, row, n, h, hk, head, begin, stop, whole_first, gap,
            k_ptr, k_n, k_h, k_m, v_ptr, v_n, v_h, v_m, mask_ptr, mask_n, mask_h, mask_m, mask_k,
            padding_ptr, padding_n, padding_k, bias_ptr, bias_n, bias_h, bias_m, bias_k,
            slopes_ptr, slopes_n, slopes_h, seed_ptr, threshold, scale, cap, queries, keys, left, right,
            cos_ptr, sin_ptr, turn_n, turn_h, turn_row,
            D, DV, CAP, LEFT, RIGHT, EDGE == 1, RAW, TURN_K, HALF, INTERLEAVED, DESCRIPTOR, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    inverse = tl.where(blind, 0.0, _scalar(enlarge, accumulator) / total)
    _store(out_ptr, acc * inverse[:, None], n, h, out_n, out_h, out_m, row, queries, DV, BLOCK_M, BLOCK_DV)
    i = row + tl.arange(0, BLOCK_M)
    PRECISE: tl.constexpr = q.dtype == tl.float32 or q.dtype == tl.float64
    lse = (top if PRECISE else top * 0.6931471805599453) + tl.log(total)
    tl.store(lse_ptr + (head * queries + i), lse, mask=i < queries)


@triton.jit
def rows_kernel(
    out_ptr,
    out_n,
    out_h,
    out_m,
    grad_ptr,
    grad_n,
    grad_h,
    grad_m,
    grad_lse_ptr,
    grad_lse_n,
    grad_lse_h,
    grad_lse_m,
    lse_ptr,
    delta_ptr,
    level_ptr,
    heads,
    queries,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta = sum(out * grad) - grad_lse, and lse in its unit, of queries; 0 and inf where one sees none."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    head = pid // blocks
    n = head // heads
    h = head % heads
    row = (pid % blocks) * BLOCK_M
    out = _tile(out_ptr, n, h, out_n, out_h, out_m, row, queries, DV, BLOCK_M, BLOCK_DV, True, False)
    grad = _tile(grad_ptr, n, h, grad_n, grad_h, grad_m, row, queries, DV, BLOCK_M, BLOCK_DV, True, False)
    delta = tl.sum(wide(out) * wide(grad), 1)
    i = row + tl.arange(0, BLOCK_M)
    inside = i < queries
    if grad_lse_ptr is not None:
        pointers = grad_lse_ptr + (n * grad_lse_n + h * grad_lse_h + i * grad_lse_m)
        delta -= tl.load(pointers, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + (head * queries + i), mask=inside, other=0.0)
    blind = lse == float("-inf")
    tl.store(delta_ptr + (head * queries + i), tl.where(blind, 0.0, delta), mask=inside)
    PRECISE: tl.constexpr = grad.dtype == tl.float32 or grad.dtype == tl.float64
    level = tl.where(blind, float("inf"), _in_unit(lse, PRECISE))
    tl.store(level_ptr + (head * queries + i), level, mask=inside)


@triton.jit
def _rows(delta_ptr, level_ptr, head, start, queries, BLOCK_M: tl.constexpr):
    """What rows_kernel found; of rows outside what makes their p zero."""
    i = start + tl.arange(0, BLOCK_M)
    delta = tl.load(delta_ptr + (head * queries + i), mask=i < queries, other=0.0)
    level = tl.load(level_ptr + (head * queries + i), mask=i < queries, other=float("inf"))
    return delta, level


@triton.jit
def _grad_scores(
    q,
    k,
    v,
    grad,
    delta,
    level,
    row,
    start,
    n,
    h,
    head,
    mask_ptr,
    mask_n,
    mask_h,
    mask_m,
    mask_k,
    padding_ptr,
    padding_n,
    padding_k,
    bias_ptr,
    bias_n,
    bias_h,
    bias_m,
    bias_k,
    slopes_ptr,
    slopes_n,
    slopes_h,
    seed_ptr,
    threshold: tl.int64,
    enlarge: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    queries,
    keys,
    left,
    right,
    CAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """Dropped-out probabilities, gradients of scores and of products; BY_KEY: (keys, queries)."""
    PRECISE: tl.constexpr = q.dtype == tl.float32 or q.dtype == tl.float64
    i = row + tl.arange(0, BLOCK_M)
    j = start + tl.arange(0, BLOCK_N)
    if BY_KEY:
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        i, j, delta, level = i[None, :], j[:, None], delta[None, :], level[None, :]
    else:
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        i, j, delta, level = i[:, None], j[None, :], delta[:, None], level[:, None]
    s, slope = _scores(
        s, i, j, n, h, mask_ptr, mask_n, mask_h, mask_m, mask_k, padding_ptr, padding_n, padding_k,
        bias_ptr, bias_n, bias_h, bias_m, bias_k, slopes_ptr, slopes_n, slopes_h, scale, cap,
        queries, keys, left, right, CAP, LEFT, RIGHT, EDGE, False, PRECISE,
    )  # fmt: skip
    p = _exp(s - level, PRECISE)
    if BY_KEY:
        grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    else:
        grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    dropped = p
    if seed_ptr is not None:
        keep = _kept(seed_ptr, head, row, start, threshold, BLOCK_M, BLOCK_N)
        keep = tl.trans(keep) if BY_KEY else keep
        dropped = tl.where(keep, p * _scalar(enlarge, p.dtype), 0.0)
        grad_p = tl.where(keep, grad_p * _scalar(enlarge, p.dtype), 0.0)
    grad_s = p * (grad_p - delta)
    grad_product = grad_s * slope if CAP else grad_s
    return dropped, grad_s, grad_product


@triton.jit
def grad_q_kernel(
    q_ptr,
    q_n,
    q_h,
    q_m,
    k_ptr,
    k_n,
    k_h,
    k_m,
    v_ptr,
    v_n,
    v_h,
    v_m,
    mask_ptr,
    mask_n,
    mask_h,
    mask_m,
    mask_k,
    padding_ptr,
    padding_n,
    padding_k,
    bounds_ptr,
    bias_ptr,
    bias_n,
    bias_h,
    bias_m,
    bias_k,
    slopes_ptr,
    slopes_n,
    slopes_h,
    seed_ptr,
    threshold: tl.int64,
    enlarge: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    heads,
    group,
    queries,
    keys,
    left,
    right,
    grad_ptr,
    grad_n,
    grad_h,
    grad_m,
    delta_ptr,
    level_ptr,
    product_scale: tl.float64,
    grad_q_ptr,
    grad_q_n,
    grad_q_h,
    grad_q_m,
    grad_bias_ptr,
    grad_bias_n,
    grad_bias_h,
    grad_bias_m,
    grad_bias_k,
    cos_ptr,
    sin_ptr,
    turn_n,
    turn_h,
    turn_row,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """grad_q of BLOCK_M queries of a head, and grad_bias, where it is not broadcast, of what they see."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    head = pid // blocks
    row = ((blocks - 1 - pid % blocks) * BLOCK_M).to(tl.int32)
    n = head // heads
    h = head % heads
    hk = h // group
    q = _tile(q_ptr, n, h, q_n, q_h, q_m, row, queries, D, BLOCK_M, BLOCK_D, True, False)
    grad = _tile(grad_ptr, n, h, grad_n, grad_h, grad_m, row, queries, DV, BLOCK_M, BLOCK_DV, True, False)
    delta, level = _rows(delta_ptr, level_ptr, head, row, queries, BLOCK_M)
    first, whole_first, whole_last, end = _keys_of(
        row, n, bounds_ptr, queries, keys, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N
    )
    gap = whole_last - whole_first
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], delta_ptr.dtype.element_ty)
    for EDGE in tl.static_range(2):
        begin = first if EDGE else whole_first
        stop = end - gap if EDGE else whole_last
        for place in range(begin, stop, BLOCK_N):
            start = place
            if EDGE:
                start = place + tl.where(place >= whole_first, gap, 0)
            k = _tile(k_ptr, n, hk, k_n, k_h, k_m, start, keys, D, BLOCK_N, BLOCK_D, EDGE == 1, DESCRIPTOR)
            v = _tile(v_ptr, n, hk, v_n, v_h, v_m, start, keys, DV, BLOCK_N, BLOCK_DV, EDGE == 1, DESCRIPTOR)
            _, grad_s, grad_product = _grad_scores(
                q, k, v, grad, delta, level, row, start, n, h, head, mask_ptr, mask_n, mask_h, mask_m, mask_k,
                padding_ptr, padding_n, padding_k, bias_ptr, bias_n, bias_h, bias_m, bias_k,
                slopes_ptr, slopes_n, slopes_h, seed_ptr, threshold, enlarge, scale, cap,
                queries, keys, left, right, CAP, LEFT, RIGHT, EDGE == 1, PRECISION, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            if grad_bias_ptr is not None:
                i = row + tl.arange(0, BLOCK_M)[:, None]
                j = start + tl.arange(0, BLOCK_N)[None, :]
                offsets = i.to(tl.int64) * grad_bias_m + j.to(tl.int64) * grad_bias_k
                pointers = grad_bias_ptr + n * grad_bias_n + h * grad_bias_h + offsets
                element: tl.constexpr = grad_bias_ptr.dtype.element_ty
                tl.store(pointers, grad_s.to(element), mask=(i < queries) & (j < keys))
            grad_q = tl.dot(
                grad_product.to(k.dtype), k, grad_q, input_precision=PRECISION, out_dtype=grad_q.dtype
            )
    grad_q = grad_q * _scalar(product_scale, grad_q.dtype)
    if cos_ptr is not None:
        grad_q = _turned(
            grad_q, n, h, row, queries, cos_ptr, sin_ptr, turn_n, turn_h, turn_row,
            HALF, INTERLEAVED, True, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    _store(grad_q_ptr, grad_q, n, h, grad_q_n, grad_q_h, grad_q_m, row, queries, D, BLOCK_M, BLOCK_D)


@triton.jit
def grad_kv_kernel(
    q_ptr,
    q_n,
    q_h,
    q_m,
    k_ptr,
    k_n,
    k_h,
    k_m,
    v_ptr,
    v_n,
    v_h,
    v_m,
    mask_ptr,
    mask_n,
    mask_h,
    mask_m,
    mask_k,
    padding_ptr,
    padding_n,
    padding_k,
    bounds_ptr,
    bias_ptr,
    bias_n,
    bias_h,
    bias_m,
    bias_k,
    slopes_ptr,
    slopes_n,
    slopes_h,
    seed_ptr,
    threshold: tl.int64,
    enlarge: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    heads,
    group,
    queries,
    keys,
    left,
    right,
    grad_ptr,
    grad_n,
    grad_h,
    grad_m,
    delta_ptr,
    level_ptr,
    product_scale: tl.float64,
    grad_k_ptr,
    grad_k_n,
    grad_k_h,
    grad_k_m,
    grad_v_ptr,
    grad_v_n,
    grad_v_h,
    grad_v_m,
    cos_ptr,
    sin_ptr,
    turn_n,
    turn_h,
    turn_row,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """grad_k and grad_v of BLOCK_N keys of a key head, from all query heads that read it.

    Rows of keys outside or padded come to nonsense that nobody stores, so nothing in the loop tests for them.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(keys, BLOCK_N)
    start = ((pid % blocks) * BLOCK_N).to(tl.int32)
    n = pid // blocks // (heads // group)
    hk = pid // blocks % (heads // group)
    k = _tile(k_ptr, n, hk, k_n, k_h, k_m, start, keys, D, BLOCK_N, BLOCK_D, True, False)
    v = _tile(v_ptr, n, hk, v_n, v_h, v_m, start, keys, DV, BLOCK_N, BLOCK_DV, True, False)
    low = queries * 0
    high = queries
    whole_from = low
    whole_to = high
    last = start + BLOCK_N - 1
    if RIGHT:
        low = tl.maximum(start - right, 0)
        whole_from = last - right
    if LEFT:
        high = tl.minimum(high, last + left + 1)
        whole_to = start + left + 1
    if bounds_ptr is not None:
        seen = (last >= tl.load(bounds_ptr + 2 * n)) & (start < tl.load(bounds_ptr + 2 * n + 1))
        high = tl.where(seen, high, 0)
    first, whole_first, whole_last = _split(low, high, whole_from, whole_to, BLOCK_M)
    gap = whole_last - whole_first
    accumulator: tl.constexpr = delta_ptr.dtype.element_ty
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], accumulator)
    grad_v = tl.zeros([BLOCK_N, BLOCK_DV], accumulator)
    for h in range(hk * group, hk * group + group):
        head = n * heads + h
        for EDGE in tl.static_range(2):
            begin = first if EDGE else whole_first
            stop = high - gap if EDGE else whole_last
            for place in range(begin, stop, BLOCK_M):
                row = place
                if EDGE:
                    row = place + tl.where(place >= whole_first, gap, 0)
                q = _tile(
                    q_ptr, n, h, q_n, q_h, q_m, row, queries, D, BLOCK_M, BLOCK_D, EDGE == 1, DESCRIPTOR
                )
                grad = _tile(
                    grad_ptr, n, h, grad_n, grad_h, grad_m, row, queries, DV, BLOCK_M, BLOCK_DV,
                    EDGE == 1, DESCRIPTOR,
                )  # fmt: skip
                delta, level = _rows(delta_ptr, level_ptr, head, row, queries, BLOCK_M)
                dropped, _, grad_product = _grad_scores(
                    q, k, v, grad, delta, level, row, start, n, h, head,
                    mask_ptr, mask_n, mask_h, mask_m, mask_k, None, padding_n, padding_k,
                    bias_ptr, bias_n, bias_h, bias_m, bias_k, slopes_ptr, slopes_n, slopes_h,
                    seed_ptr, threshold, enlarge, scale, cap, queries, keys, left, right,
                    CAP, LEFT, RIGHT, EDGE == 1, PRECISION, BLOCK_M, BLOCK_N, True,
                )  # fmt: skip
                grad_v = tl.dot(
                    dropped.to(grad.dtype), grad, grad_v, input_precision=PRECISION, out_dtype=grad_v.dtype
                )
                grad_k = tl.dot(
                    grad_product.to(q.dtype), q, grad_k, input_precision=PRECISION, out_dtype=grad_k.dtype
                )
    grad_k = grad_k * _scalar(product_scale, accumulator)
    if padding_ptr is not None:
        j = start + tl.arange(0, BLOCK_N)
        pointers = padding_ptr + n * padding_n + j.to(tl.int64) * padding_k
        seen = (tl.load(pointers, mask=j < keys, other=1) == 0)[:, None]
        grad_k = tl.where(seen, grad_k, 0.0)
        grad_v = tl.where(seen, grad_v, 0.0)
    _store(grad_v_ptr, grad_v, n, hk, grad_v_n, grad_v_h, grad_v_m, start, keys, DV, BLOCK_N, BLOCK_DV)
    if cos_ptr is not None:
        grad_k = _turned(
            grad_k, n, hk, start, keys, cos_ptr, sin_ptr, turn_n, turn_h, turn_row,
            HALF, INTERLEAVED, True, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    _store(grad_k_ptr, grad_k, n, hk, grad_k_n, grad_k_h, grad_k_m, start, keys, D, BLOCK_N, BLOCK_D)


@triton.jit
def grad_bias_kernel(
    q_ptr,
    q_n,
    q_h,
    q_m,
    k_ptr,
    k_n,
    k_h,
    k_m,
    v_ptr,
    v_n,
    v_h,
    v_m,
    mask_ptr,
    mask_n,
    mask_h,
    mask_m,
    mask_k,
    padding_ptr,
    padding_n,
    padding_k,
    bounds_ptr,
    bias_ptr,
    bias_n,
    bias_h,
    bias_m,
    bias_k,
    slopes_ptr,
    slopes_n,
    slopes_h,
    seed_ptr,
    threshold: tl.int64,
    enlarge: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    heads,
    group,
    queries,
    keys,
    left,
    right,
    grad_ptr,
    grad_n,
    grad_h,
    grad_m,
    delta_ptr,
    level_ptr,
    partial_ptr,
    of_n,
    of_h,
    of_m,
    of_k,
    over_n,
    over_h,
    over_m,
    over_k,
    repeats,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """A tile of a broadcast bias's gradient, summed over `repeats` of the over_n * ... tiles that read it.

    of_n, of_h, of_m, of_k: the bias's shape; over_n, ...: images, heads, blocks of queries and of keys that
    share an element, 1 where it has its own. partial: (splits, *shape of the bias).
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks_k = 1 if over_k > 1 else tl.cdiv(of_k, BLOCK_N)
    blocks_m = 1 if over_m > 1 else tl.cdiv(of_m, BLOCK_M)
    tile_k = pid % blocks_k
    tile_m = pid // blocks_k % blocks_m
    tile_h = pid // blocks_k // blocks_m % of_h
    tile_n = pid // blocks_k // blocks_m // of_h % of_n
    part = pid // blocks_k // blocks_m // of_h // of_n
    total = tl.zeros([BLOCK_M, BLOCK_N], delta_ptr.dtype.element_ty)
    everything = over_n * over_h * over_m * over_k
    for turn in range(part * repeats, tl.minimum((part + 1) * repeats, everything)):
        start = ((tile_k + turn % over_k) * BLOCK_N).to(tl.int32)
        row = ((tile_m + turn // over_k % over_m) * BLOCK_M).to(tl.int32)
        h = tile_h + turn // over_k // over_m % over_h
        n = tile_n + turn // over_k // over_m // over_h
        head = n * heads + h
        q = _tile(q_ptr, n, h, q_n, q_h, q_m, row, queries, D, BLOCK_M, BLOCK_D, True, False)
        k = _tile(k_ptr, n, h // group, k_n, k_h, k_m, start, keys, D, BLOCK_N, BLOCK_D, True, False)
        v = _tile(v_ptr, n, h // group, v_n, v_h, v_m, start, keys, DV, BLOCK_N, BLOCK_DV, True, False)
        grad = _tile(grad_ptr, n, h, grad_n, grad_h, grad_m, row, queries, DV, BLOCK_M, BLOCK_DV, True, False)
        delta, level = _rows(delta_ptr, level_ptr, head, row, queries, BLOCK_M)
        _, grad_s, _ = _grad_scores(
            q, k, v, grad, delta, level, row, start, n, h, head, mask_ptr, mask_n, mask_h, mask_m, mask_k,
            padding_ptr, padding_n, padding_k, bias_ptr, bias_n, bias_h, bias_m, bias_k,
            slopes_ptr, slopes_n, slopes_h, seed_ptr, threshold, enlarge, scale, cap,
            queries, keys, left, right, CAP, LEFT, RIGHT, True, PRECISION, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
        total += grad_s
    i = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    j = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if of_m == 1:
        total = tl.where(i == 0, tl.sum(total, 0)[None, :], 0.0)
    if of_k == 1:
        total = tl.where(j == 0, tl.sum(total, 1)[:, None], 0.0)
    matrix = (part * of_n + tile_n) * of_h + tile_h
    tl.store(partial_ptr + ((matrix * of_m + i) * of_k + j), total, mask=(i < of_m) & (j < of_k))


FAR = 1 << 23
"""Elements between rows from which those of a tile could be further apart than 32 bits tell."""


def _innermost(x: Tensor) -> Tensor:
    """x, or a copy, with elements of a row side by side, and rows not FAR apart."""
    return x if x.stride(-1) == 1 and x.stride(-2) < FAR else x.contiguous()


def _bytes(x: Tensor, q: Tensor) -> Tensor:
    """A bool as bytes, or for float64 as int64: Triton's matrix product there fails beside narrower loads."""
    if q.dtype != torch.float64:
        return x.view(torch.uint8)
    shape = x.shape
    for dim, stride in enumerate(x.stride()):
        x = x if stride or not shape[dim] else x.narrow(dim, 0, 1)
    return x.long().expand(shape)


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if x is None else x.stride()[:dims]


def _bounds(padding: Tensor) -> Tensor:
    """First key of each image that is not padding, and the one past the last: (N, 2); 0, 0 without one."""
    keys = padding.shape[1]
    place = torch.arange(keys, device=padding.device, dtype=torch.int32)
    end = torch.where(padding != 0, 0, place + 1).amax(1)
    first = torch.where(padding != 0, keys, place).amin(1)
    return torch.stack([torch.minimum(first, end), end], 1)


class _Turn:
    """By what q and k of a call turn, if they do."""

    def __init__(self, cos: Tensor | None, sin: Tensor | None, interleaved: bool, head: int) -> None:
        half = 0 if cos is None else cos.shape[3]
        self.angles = (cos, sin)
        self.interleaved = interleaved
        by_powers = interleaved or half == triton.next_power_of_2(half)
        self.in_tiles = half > 0 and by_powers and head <= ROTARY_HEAD
        """Whether the kernels do it."""
        self.arguments: tuple[Any, ...] = (None, None, 0, 0, 0)
        self.options: dict[str, Any] = {"HALF": 0, "INTERLEAVED": False}
        if cos is not None and sin is not None and self.in_tiles:
            if cos.stride() != sin.stride() or _innermost(cos) is not cos:
                cos, sin = cos.contiguous(), sin.contiguous()
            self.arguments = (cos, sin, *(cos.stride(i) if cos.shape[i] > 1 else 0 for i in range(3)))
            self.options = {"HALF": half, "INTERLEAVED": interleaved}

    def __call__(self, x: Tensor, back: bool = False) -> Tensor:
        """Queries or keys, or gradients of them turned back."""
        cos, sin = self.angles
        if cos is None or sin is None:
            return x
        cos, sin = cos[:, :, : x.shape[2]], sin[:, :, : x.shape[2]]
        return rotary(x, cos, -sin if back else sin, self.interleaved)


class _Call:
    """What the kernels of one call share: their first arguments, and what they are compiled for."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        key_padding: Tensor | None,
        bias: Tensor | None,
        alibi_slopes: Tensor | None,
        seed: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        is_causal: bool,
        scale: float,
        softcap: float,
        left: int,
        right: int,
        dropout_p: float,
        interleaved: bool,
    ) -> None:
        self.turn = _Turn(cos, sin, interleaved, max(q.shape[3], v.shape[3]))
        self.turns_keys = False
        """Whether forward turns keys as it reads them."""
        self.q, self.k, self.v = q, k, v = _innermost(q), _innermost(k), _innermost(v)
        self.n, self.heads, self.queries, d = q.shape
        self.keys, dv = v.shape[2:]
        mask = None if mask is None else _bytes(mask, q)
        padding = None if key_padding is None or not self.keys else _bytes(key_padding, q)
        bounds = None if padding is None else _bounds(padding)
        bias = bias.double() if bias is not None and q.dtype == torch.float64 else bias
        bias = None if bias is None else bias.expand(self.n, self.heads, self.queries, self.keys)
        unit = LOG2_E if q.element_size() == 2 else 1.0
        right = 0 if is_causal else right
        limited_left, limited_right = 0 <= left < self.queries - 1, 0 <= right < self.keys - 1
        self.shared = (
            padding, *_strides(padding, 2), bounds, bias, *_strides(bias, 4),
            alibi_slopes, *_strides(alibi_slopes, 2), seed if dropout_p else None, int(dropout_p * 2**32),
            1 / (1 - dropout_p), scale / softcap if softcap else scale * unit, softcap * unit,
            self.heads, self.heads // k.shape[1], self.queries, self.keys,
            left if limited_left else 0, right if limited_right else 0,
        )  # fmt: skip
        self.mask = (mask, *_strides(mask, 4))
        self.options = {
            "D": d,
            "DV": dv,
            "CAP": softcap != 0,
            "LEFT": limited_left,
            "RIGHT": limited_right,
            "PRECISION": "tf32" if q.dtype == torch.float32 and _tf32(q) else "ieee",
            "BLOCK_D": max(triton.next_power_of_2(d), 16),
            "BLOCK_DV": max(triton.next_power_of_2(dv), 16),
        }
        plain_scores = not softcap and bias is None and alibi_slopes is None
        self.raw = plain_scores and scale > 0
        self.plain = plain_scores and mask is None and not dropout_p

    def described(self, x: Tensor) -> bool:
        """Whether Hopper's and Blackwell's copy engine takes x: (N, H, L, D)."""
        if x.element_size() != 2 or x.data_ptr() % 16 or not x.numel():
            return False
        return all(stride and stride * 2 % 16 == 0 for stride in x.stride()[:3])

    def launch(self, kernel: Any, *arguments: Any, by_key: bool = False, **options: Any) -> None:
        """Run a kernel on q, k, v, what is shared, and its own arguments; by_key: the loop is over queries.

        What its loop reads goes through descriptors if both can.
        """
        q, k, v = self.q, self.k, self.v
        looped = (q, arguments[0]) if by_key else (k, v)
        arch = architecture(q.device)
        descriptors = arch in ("sm_90", "sm_100") and all(map(self.described, looped))
        if arch != "gfx942" and not descriptors:
            arch = "sm_80"
        config = self.config(kernel, arch)
        if by_key:
            programs = self.n * k.shape[1] * triton.cdiv(self.keys, config.block_n)
        else:
            programs = self.n * self.heads * triton.cdiv(self.queries, config.block_m)
        if not programs:
            return
        if descriptors:
            rows = config.block_m if by_key else config.block_n
            first, second = (
                TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, self.options[d]])
                for x, d in zip(looped, ("BLOCK_D", "BLOCK_DV"), strict=True)
            )
            if by_key:
                q, arguments = first, (second, *arguments[1:])
            else:
                k, v = first, second
        self.run(kernel, programs, config, q, k, v, *arguments, DESCRIPTOR=descriptors, **options)

    def config(self, kernel: Any, arch: str) -> AttentionConfig:
        """How a kernel is launched here."""
        head = max(self.options["BLOCK_D"], self.options["BLOCK_DV"])
        name = "turning_forward" if self.turns_keys else kernel.__name__.removesuffix("_kernel")
        return attention_config(name, arch, self.q.element_size(), head, self.plain)

    def run(
        self,
        kernel: Any,
        programs: int,
        config: AttentionConfig,
        q: Any,
        k: Any,
        v: Any,
        *arguments: Any,
        **options: Any,
    ) -> None:
        """Launch as many programs."""
        kernel[(programs,)](
            q, *self.q.stride()[:3], k, *self.k.stride()[:3], v, *self.v.stride()[:3],
            *self.mask,
            *self.shared,
            *arguments,
            **self.options,
            **options,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip


def _tf32(q: Tensor) -> bool:
    allowed: Any = torch.backends.cuda.matmul  # its allow_tf32 raises once a program has set the precision
    return q.is_cuda and bool(allowed.fp32_precision == "tf32")


def forward(q: Tensor, k: Tensor, v: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    """out: (N, H, Lq, Dv), and lse: (N, H, Lq); terms as in reference.Terms."""
    call = _Call(q, k, v, *terms)
    turn = call.turn
    call.turns_keys = turn.in_tiles and call.queries * (call.heads // k.shape[1]) <= ROTARY_QUERIES
    if not turn.in_tiles:
        call.q = turn(call.q)
    if not call.turns_keys:
        call.k = turn(call.k)
    out = attention_out(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    with torch.accelerator.device_index(q.device.index):
        of_out = (out, *out.stride()[:3], lse, *turn.arguments)
        call.launch(forward_kernel, *of_out, RAW=call.raw, TURN_K=call.turns_keys, **turn.options)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_padding: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and bias (empty unless bias_grad); rest: options, bias_grad."""
    *options, bias_grad = rest
    call = _Call(q, k, v, mask, key_padding, bias, alibi_slopes, seed, cos, sin, *options)
    turn = call.turn
    call.q, call.k = turn(call.q), turn(call.k)
    grad_out = _innermost(grad_out)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    to = [
        x if _innermost(x) is x else torch.empty_like(x, memory_format=torch.contiguous_format) for x in grads
    ]
    delta, level = torch.empty_like(lse), torch.empty_like(lse)
    rows = (grad_out, *grad_out.stride()[:3], delta, level)
    product_scale = options[1]
    grad_bias, whole = q.new_empty(0), False
    if bias_grad and bias is not None:
        whole = bias.shape == (*q.shape[:3], call.keys)
        grad_bias = torch.zeros_like(bias) if whole else torch.empty_like(bias)
    with torch.accelerator.device_index(q.device.index):
        if lse.numel():
            block = max(8192 // call.options["BLOCK_DV"], 16)
            rows_kernel[(call.n * call.heads * triton.cdiv(call.queries, block),)](
                out, *out.stride()[:3], grad_out, *grad_out.stride()[:3], grad_lse, *_strides(grad_lse, 3),
                lse, delta, level, call.heads, call.queries,
                DV=v.shape[3], BLOCK_M=block, BLOCK_DV=call.options["BLOCK_DV"], num_warps=4,
            )  # fmt: skip
        to_kv = (*to[1:2], *to[1].stride()[:3], to[2], *to[2].stride()[:3])
        call.launch(
            grad_kv_kernel, *rows, product_scale, *to_kv, *turn.arguments, by_key=True, **turn.options
        )
        of_bias = (grad_bias, *grad_bias.stride()) if whole else (None, 0, 0, 0, 0)
        to_q = (to[0], *to[0].stride()[:3], *of_bias)
        call.launch(grad_q_kernel, *rows, product_scale, *to_q, *turn.arguments, **turn.options)
        if bias_grad and bias is not None and not whole:
            _broadcast_bias(call, bias, grad_bias, rows)
    for grad, x in zip(grads, to, strict=True):
        if x is not grad:
            grad.copy_(x)
    of_q, of_k = grads[:2] if turn.in_tiles else (turn(x, back=True) for x in grads[:2])
    return of_q, of_k, grads[2], grad_bias


def _broadcast_bias(call: _Call, bias: Tensor, grad_bias: Tensor, rows: tuple[Any, ...]) -> None:
    """Fill the gradient of a bias that several tiles share, in parts that are then added up."""
    config = call.config(grad_bias_kernel, architecture(bias.device))
    n, h, m, k = bias.shape
    blocks_m, blocks_k = triton.cdiv(call.queries, config.block_m), triton.cdiv(call.keys, config.block_n)
    shared = [
        whole if of == 1 else 1 for of, whole in ((n, call.n), (h, call.heads), (m, blocks_m), (k, blocks_k))
    ]
    tiles = n * h * (1 if m == 1 else blocks_m) * (1 if k == 1 else blocks_k)
    everything = math.prod(shared)
    if not tiles or not everything:
        grad_bias.zero_()
        return
    repeats = triton.cdiv(everything, min(everything, triton.cdiv(PROGRAMS, tiles)))
    parts = triton.cdiv(everything, repeats)
    partial = torch.empty((parts, n, h, m, k), dtype=rows[-1].dtype, device=bias.device)
    arguments = (call.q, call.k, call.v, *rows, partial, n, h, m, k, *shared, repeats)
    call.run(grad_bias_kernel, parts * tiles, config, *arguments)
    grad_bias.copy_(partial.sum(0))


# --- rotary embedding ---------------------------------------------------------------------------------------


@triton.jit
def rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    rows,
    second,
    third,
    x_first,
    x_second,
    x_third,
    y_first,
    y_second,
    y_third,
    cos_first,
    cos_second,
    cos_third,
    sin_first,
    sin_second,
    sin_third,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """y = x turned by pairs, of which a row has HALF, and its last REST features as they are.

    x, y: (rows / second / third, second, third, 2 HALF + REST); cos, sin: likewise with HALF, or stride 0.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i, j, k = row // third // second, row // third % second, row % third
    there = row < rows
    angle = tl.arange(0, BLOCK)[None, :]
    some = there & (angle < HALF) if HALF < BLOCK else there
    cos = tl.load(cos_ptr + (i * cos_first + j * cos_second + k * cos_third + angle), mask=some)
    sin = tl.load(sin_ptr + (i * sin_first + j * sin_second + k * sin_third + angle), mask=some)
    from_x = i * x_first + j * x_second + k * x_third
    to_y = i * y_first + j * y_second + k * y_third
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK)[None, :]
        both = there & (d < 2 * HALF) if HALF < BLOCK else there
        x = wide(tl.load(x_ptr + (from_x + d), mask=both))
        a, b = tl.split(x.reshape([ROWS, BLOCK, 2]))
        y = tl.join(a * cos - b * sin, b * cos + a * sin).reshape([ROWS, 2 * BLOCK])
        tl.store(y_ptr + (to_y + d), y.to(y_ptr.dtype.element_ty), mask=both)
    else:
        a = wide(tl.load(x_ptr + (from_x + angle), mask=some))
        b = wide(tl.load(x_ptr + (from_x + (angle + HALF)), mask=some))
        tl.store(y_ptr + (to_y + angle), (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=some)
        tl.store(y_ptr + (to_y + (angle + HALF)), (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=some)
    if REST:
        d = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        kept = there & (d < 2 * HALF + REST)
        tl.store(y_ptr + (to_y + d), tl.load(x_ptr + (from_x + d), mask=kept), mask=kept)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: (N, H, L, D), its first 2 R features turned; cos, sin: (N, H, L, R), or 1 for N, H, L."""
    y = torch.empty_like(x)
    if y.stride(3) != 1:
        return y.copy_(rotary(x.contiguous(), cos, sin, interleaved))
    x, cos, sin = (_innermost(t) for t in (x, cos, sin))
    rows = y.shape[:3].numel()
    if not y.numel():
        return y
    half = cos.shape[3]
    rest = x.shape[3] - 2 * half
    order = sorted(range(3), key=lambda i: -y.stride()[i])  # as rows lie in memory
    strides = [t.stride(i) if t.shape[i] > 1 else 0 for t in (x, y, cos, sin) for i in order]
    config = rotary_config(half, x.element_size())
    with torch.accelerator.device_index(x.device.index):
        rotary_kernel[(triton.cdiv(rows, config.rows),)](
            x, cos, sin, y, rows, y.shape[order[1]], y.shape[order[2]], *strides,
            HALF=half, REST=rest, INTERLEAVED=interleaved, ROWS=config.rows, BLOCK=config.block,
            BLOCK_REST=triton.next_power_of_2(max(rest, 1)), num_warps=config.num_warps,
        )  # fmt: skip
    return y
