"""Calls of attention that its tests go through, and what torch makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import nnfast
from nnfast.attention import op, reference


class Shape(NamedTuple):
    """Sizes of a call."""

    n: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head: int
    values: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SMALL = Shape(2, 4, 2, 13, 19, 8, 8)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """The same float64 numbers at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(s: Shape, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    """q, k, v."""
    sizes = (
        (s.n, s.heads, s.queries, s.head),
        (s.n, s.key_heads, s.keys, s.head),
        (s.n, s.key_heads, s.keys, s.values),
    )
    return [randn(*size, seed=i).to(device, dtype) for i, size in enumerate(sizes)]


def _padding(s: Shape) -> Tensor:
    """The last keys of the first, the first of the last; a single key is left."""
    padding = torch.zeros(s.n, s.keys, dtype=torch.bool)
    padding[0, s.keys // 2 + 1 :] = True
    padding[-1, : (s.keys - 1) // 3] = True
    return padding


def _mask(s: Shape, blind: bool = False) -> Tensor:
    """A third is seen; blind: some queries see nothing."""
    mask = randn(s.n, 1, s.queries, s.keys, seed=5) > 0.4
    mask[..., -1] = True
    if blind:
        mask[0, :, ::3] = False
    return mask


CALLS: dict[str, Callable[[Shape], dict]] = {
    "plain": lambda s: {},
    "causal": lambda s: {"is_causal": True},
    "scale": lambda s: {"scale": 0.5},
    "mask": lambda s: {"mask": _mask(s)},
    "blind": lambda s: {"mask": _mask(s, blind=True)},
    "blind causal": lambda s: {"mask": _mask(s, blind=True), "is_causal": True},
    "padding": lambda s: {"key_padding_mask": _padding(s)},
    "padding causal": lambda s: {"key_padding_mask": _padding(s), "is_causal": True},
    "padding mask": lambda s: {"key_padding_mask": _padding(s), "mask": _mask(s)},
    "bias": lambda s: {"bias": randn(1, s.heads, s.queries, s.keys, seed=6)},
    "bias of keys": lambda s: {"bias": randn(s.n, 1, 1, s.keys, seed=6), "is_causal": True},
    "bias padding": lambda s: {"bias": randn(s.queries, s.keys, seed=6), "key_padding_mask": _padding(s)},
    "window": lambda s: {"window": 5},
    "window causal": lambda s: {"window": (70, None), "is_causal": True},
    "window right": lambda s: {"window": (None, 3)},
    "alibi": lambda s: {"alibi_slopes": 2.0 ** -torch.arange(1, s.heads + 1), "is_causal": True},
    "alibi of each": lambda s: {"alibi_slopes": randn(s.n, s.heads, seed=7).abs()},
    "softcap": lambda s: {"softcap": 1.5, "bias": randn(s.heads, 1, s.keys, seed=6)},
    "dropout": lambda s: {"dropout_p": 0.3, "seed": 1234567890123},
    "all": lambda s: {
        "key_padding_mask": _padding(s),
        "mask": _mask(s, blind=True),
        "bias": randn(s.heads, s.queries, s.keys, seed=6),
        "is_causal": True,
        "scale": 0.7,
        "dropout_p": 0.5,
        "seed": 7,
        "window": (40, 3),
        "alibi_slopes": randn(s.n, s.heads, seed=7).abs() / 8,
        "softcap": 3.0,
    },
}


def call(name: str, s: Shape, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict:
    """Keyword arguments, floating ones in dtype."""
    options = CALLS[name](s)
    for key, value in options.items():
        if isinstance(value, Tensor):
            options[key] = value.to(device, dtype if value.is_floating_point() else value.dtype)
    return options


def truth(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp in float64."""
    wide = {
        key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in options.items()
    }
    q, k, v, terms, _ = op.arguments(q.double(), k.double(), v.double(), **wide)
    return reference.attention(q, k, v, terms)


def torchs(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """What torch's operations give in q's dtype: its attention, from one mask that holds everything."""
    q, k, v, terms, _ = op.arguments(q, k, v, **options)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    n, h, queries, keys = *q.shape[:3], k.shape[2]
    added = q.new_zeros(n, h, queries, keys)
    if terms.alibi_slopes is not None:
        i = torch.arange(queries, device=q.device)[:, None]
        away = (i + keys - queries - torch.arange(keys, device=q.device)).abs()
        added = added - terms.alibi_slopes.to(q.dtype)[:, :, None, None] * away
    if terms.bias is not None:
        added = added + terms.bias
    hidden = reference.unseen(q, k, terms)
    if hidden is not None:
        added = added.masked_fill(hidden, -torch.inf)
    if not terms.softcap and not terms.dropout_p:
        values = v.shape[3]  # its fused kernels take one head dim, and round otherwise than its formula
        q, k, v = (F.pad(x, (0, max(q.shape[3], values) - x.shape[3])) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, added, scale=terms.scale)[..., :values]
    s = (q * terms.scale) @ k.mT
    s = terms.softcap * torch.tanh(s / terms.softcap) if terms.softcap else s
    p = torch.softmax((s + added).nan_to_num(neginf=torch.finfo(q.dtype).min), -1)
    p = p.masked_fill((added == -torch.inf).all(-1, keepdim=True), 0)
    if terms.dropout_p:
        p = p * reference.kept(terms.seed, terms.dropout_p, p.shape) / (1 - terms.dropout_p)
    return p @ v


def differentiable(options: dict) -> list[Tensor]:
    """What of the options has a gradient."""
    return [options["bias"]] if "bias" in options else []


def gradients(function: Callable, q: Tensor, k: Tensor, v: Tensor, options: dict, *uppers: Tensor) -> tuple:
    """Those of q, k, v and bias, for upstream gradients of what the function returns."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    bias = {"bias": options["bias"].detach().requires_grad_()} if "bias" in options else {}
    results = function(*inputs, **{**options, **bias})
    results = results if isinstance(results, tuple) else (results,)
    terms = [(x.masked_fill(x.isinf(), 0) * g).sum() for x, g in zip(results, uppers, strict=False)]
    return torch.autograd.grad(sum(terms), [*inputs, *bias.values()])


def ours(*args: Tensor, **options: object) -> object:
    """The function tested."""
    return nnfast.functional.attention(*args, **options)  # type: ignore[arg-type]
