"""Self-attention with one small matrix for all heads, its projections folded where that is cheaper.

A head of width D has queries q Wq^T, keys k Wk^T and values v Wv^T, so

    scores = (q Wq^T) (k Wk^T)^T = (q (Wq^T Wk)) k^T = q (k (Wk^T Wq))^T,

and sum_h (P_h v_h Wv^T) Wo_h^T = sum_h (P_h v_h) (Wo_h Wv)^T: keys or queries, and values, are read raw.
"""

# Folded weights lie beside the modules, not in them: no state_dict, copy or pickle sees them.

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..core.op import BackendError, Explanation, describe, forced
from ..core.operator import DTYPES, autocasts, requires_grad, traced, transformed
from ..core.product import linear
from ..core.snapshot import Snapshot, altered, hooked_everywhere
from . import op
from .module import attention

_NAME = "nnfast.SelfAttention"


class SelfAttention(nn.Module):
    """Multi-head self-attention whose heads share three (head_dim, head_dim) projections without bias.

    energy = (q Wq^T) (k Wk^T)^T in each head, -1e20 where mask is 0; softmax(energy / sqrt(embed_size)) over
    the keys weighs the values v Wv^T, and `fc_out` mixes the heads. Parameters: values.weight, keys.weight,
    queries.weight (head_dim, head_dim), fc_out.weight (embed_size, embed_size), fc_out.bias (embed_size,).

    A query that sees no key gets the mean of all values. Memory is linear in the lengths. Projections are
    folded into one another where that is cheaper; in eval mode without gradients the folded weights are kept
    until a parameter changes. Half types fold in float32. Children with hooks, or that are no plain nn.Linear
    any more, are called as they are; so is everything for heads wider than 256.

    Args:
        embed_size: E, the features of inputs and output.
        heads: H; divides embed_size.

    Raises:
        ValueError: if heads does not divide embed_size.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """

    nnfast_op = "attention"

    def __init__(self, embed_size: int, heads: int) -> None:
        super().__init__()
        if embed_size < 1 or heads < 1 or embed_size % heads:
            raise ValueError(
                f"{_NAME}: embed_size is {embed_size}, heads is {heads}; heads needs to divide embed_size"
            )
        self.embed_size = embed_size
        self.heads = heads
        self.head_dim = embed_size // heads
        self.values = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.keys = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.queries = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.fc_out = nn.Linear(embed_size, embed_size)

    def forward(self, values: Tensor, keys: Tensor, query: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            values: (N, Lk, E).
            keys: (N, Lk, E).
            query: (N, Lq, E).
            mask: any dtype, broadcastable to (N, H, Lq, Lk); 0 = do not attend. None = attend to all.

        Returns:
            (N, Lq, E).

        Raises:
            ValueError: for shapes that do not fit.
            BackendError: if a forced backend cannot serve.
        """
        if _all_plain(values, keys, query):
            _check(self, values, keys, query, mask)
        if reasons := _formula_reasons(self, values, keys, query, mask):
            if (name := forced()) not in (None, "aten", "reference"):
                call = describe((values, keys, query, mask), {})
                why = "\n".join(f"  {name}: {reason}" for reason in reasons)
                raise BackendError(f"{_NAME}: backend {name!r} is forced and cannot serve {call}\n{why}")
            return _formula(self, values, keys, query, mask)
        if autocasts(query):
            device = query.device.type
            dtype = torch.get_autocast_dtype(device)
            values, keys, query = (_autocast(x, dtype) for x in (values, keys, query))
            with torch.autocast(device, enabled=False):
                return _attend(self, values, keys, query, mask)
        return _attend(self, values, keys, query, mask)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"embed_size={self.embed_size}, heads={self.heads}"

    def explain(self, values: Tensor, keys: Tensor, query: Tensor, mask: Tensor | None = None) -> Explanation:
        """What `nnfast.explain` says of a call."""
        _check(self, values, keys, query, mask)
        if reasons := _formula_reasons(self, values, keys, query, mask):
            return op.explain_torchs(describe((values, keys, query, mask), {}), reasons)
        with torch.no_grad():
            q, k, v = (_heads(self, x).transpose(1, 2) for x in (query, keys, values))
        arguments = op.arguments(q, k, v, mask=None if mask is None else mask != 0, scale=_scale(self))
        return op.ATTENTION.explain(*arguments)


# --- the call -----------------------------------------------------------------------------------------------


_LEAST_HALF = 8
"""Narrowest heads whose weights fold in half types: the rounding of products averages over their features."""


class _Fold(NamedTuple):
    """A projection of the scores folded into "query" or "keys", "" for none; values folded into fc_out."""

    scores: str
    values: bool


class _Weights(NamedTuple):
    """(D, D) factors of queries, keys and values, None for the identity, and fc_out's (E, E) weight."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    out: Tensor


def _attend(m: SelfAttention, values: Tensor, keys: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    weights = _weights(m, values, keys, query)
    q, k, v = (_heads(m, x) for x in (query, keys, values))
    w = weights.query
    inside = w is not None and not w.requires_grad and op.is_for_cpu(query, query.shape[1])
    parts = (q if inside else _project(q, w)), _project(k, weights.key), _project(v, weights.value)
    q, k, v = (x.transpose(1, 2) for x in parts)
    attend = mask if mask is None or mask.dtype == torch.bool else mask != 0
    out: Tensor
    if inside:
        out = op.projected_attention(q, k, v, query_weight=w, mask=attend, scale=_scale(m))
    else:
        out = attention(q, k, v, mask=attend, scale=_scale(m))
    if attend is not None and v.shape[2]:
        blind = ~attend.any(-1, keepdim=True)
        # asking costs a GPU its queue, and compilers the graph
        if not (blind.is_cpu and not torch.compiler.is_compiling() and not transformed() and not blind.any()):
            out = out.where(~blind, v.mean(2, keepdim=True))
    bias = m.fc_out.bias
    return linear(out.transpose(1, 2).flatten(2), weights.out, bias if bias is None else bias.to(out.dtype))


def _scale(m: SelfAttention) -> float:
    return float(m.embed_size**-0.5)


def _heads(m: SelfAttention, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], m.heads, m.head_dim)


def _project(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else linear(x, weight.t())


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _fold(m: SelfAttention, values: Tensor, keys: Tensor, query: Tensor, kept: bool) -> _Fold:
    """By multiplications saved, of D^2 for each row and head, over those of the folding itself."""
    if query.dtype.itemsize < 4 and m.head_dim < _LEAST_HALF:
        return _Fold("", False)
    queries, rows = query.shape[0] * query.shape[1], keys.shape[0] * keys.shape[1]
    folding = 0 if kept else m.head_dim
    side = "query" if queries <= rows else "keys"
    return _Fold(side if max(queries, rows) * m.heads > folding else "", rows > (0 if kept else m.embed_size))


def _weights(m: SelfAttention, values: Tensor, keys: Tensor, query: Tensor) -> _Weights:
    names = ("values", "keys", "queries", "fc_out")
    sources: tuple[Any, ...] = tuple(m._modules[name].weight for name in names)  # type: ignore[union-attr]
    kept = not (
        m.training
        or requires_grad(*sources)
        or torch.compiler.is_compiling()
        or transformed()
        or traced()
        or any(type(w) is not nn.Parameter or w.is_inference() for w in sources)
    )
    fold = _fold(m, values, keys, query, kept)
    if not kept:
        return _folded(sources, fold, query.dtype, torch.promote_types(sources[0].dtype, torch.float32))
    found = _KEPT.setdefault(m, {})
    key = (fold, query.dtype)
    if key not in found or not found[key][0].holds(sources):
        snapshot = Snapshot(sources)  # first: what changes meanwhile is seen later
        with torch.inference_mode(False), torch.no_grad():
            wide = torch.float32 if query.device.type == "mps" else torch.float64
            found[key] = snapshot, _folded(sources, fold, query.dtype, wide)
    return found[key][1]


_KEPT: WeakKeyDictionary[nn.Module, dict[tuple[_Fold, torch.dtype], tuple[Snapshot, _Weights]]] = (
    WeakKeyDictionary()
)


def _folded(sources: tuple[Tensor, ...], fold: _Fold, dtype: torch.dtype, wide: torch.dtype) -> _Weights:
    """Products in the type `wide`, rounded once."""
    value, key, query, out = (w.to(wide) for w in sources)
    of_query: Tensor | None
    of_key: Tensor | None
    if fold.scores:
        product = query.t() @ key
        of_query, of_key = (product, None) if fold.scores == "query" else (None, product.t())
    else:
        of_query, of_key = query.t(), key.t()
    of_value: Tensor | None = value.t()
    if fold.values:
        of_value, out = None, (out.reshape(-1, len(value)) @ value).view_as(out)
    of_query, of_key, of_value = (None if w is None else w.to(dtype) for w in (of_query, of_key, of_value))
    return _Weights(of_query, of_key, of_value, out.to(dtype))


# --- what is not for the kernels ----------------------------------------------------------------------------


def _all_plain(*tensors: Any) -> bool:
    return all(type(x) is Tensor or type(x) is nn.Parameter for x in tensors)


def _check(m: SelfAttention, values: Tensor, keys: Tensor, query: Tensor, mask: Tensor | None) -> None:
    for name, x in (("values", values), ("keys", keys), ("query", query)):
        if x.dim() != 3 or x.shape[2] != m.embed_size:
            raise ValueError(
                f"{_NAME}: {name} has shape {list(x.shape)}; it needs (N, length, embed_size={m.embed_size})"
            )
    if values.shape != keys.shape or keys.shape[0] != query.shape[0]:
        raise ValueError(
            f"{_NAME}: values has shape {list(values.shape)}, keys {list(keys.shape)}, query "
            f"{list(query.shape)}; values and keys need the same length, and all the same N"
        )
    if mask is not None:
        whole = (query.shape[0], m.heads, query.shape[1], keys.shape[1])
        sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
        if len(sizes) != 4 or any(s not in (1, w) for s, w in zip(sizes, whole, strict=True)):
            raise ValueError(
                f"{_NAME}: mask has shape {list(mask.shape)}; it needs to broadcast to "
                f"(N, heads, query length, key length) = {list(whole)}"
            )


def _formula_reasons(m: SelfAttention, *tensors: Tensor | None) -> list[str]:
    """Why the children are called one after another, and energy is held whole."""
    if not _all_plain(*(x for x in tensors if x is not None)):
        return ["an input is no plain tensor"]
    reasons = []
    for name, child in m._modules.items():
        if type(child) is not nn.Linear or child._parameters.get("weight") is None:
            reasons.append(f"{name} is a {type(child).__name__}; folding needs a plain nn.Linear")
        elif name != "fc_out" and child.bias is not None:
            reasons.append(f"{name} has a bias")
        elif altered(child):
            reasons.append(f"{name} has hooks or a forward of its own, which folding would skip")
    if hooked_everywhere():
        reasons.append("there are hooks on every module, which folding would skip")
    if m.head_dim > op.LARGEST_HEAD:
        reasons.append(f"head_dim is {m.head_dim}; attention takes up to {op.LARGEST_HEAD}")
    dtype = tensors[0].dtype if tensors[0] is not None else None
    if dtype not in DTYPES:
        reasons.append(f"values has dtype {dtype}; attention takes {', '.join(map(str, DTYPES))}")
    return reasons


def _formula(m: SelfAttention, values: Tensor, keys: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    """As it is written down, by the children."""
    n = query.shape[0]
    v, k, q = (
        child(x.reshape(n, x.shape[1], m.heads, m.head_dim))
        for child, x in ((m.values, values), (m.keys, keys), (m.queries, query))
    )
    energy = torch.einsum("nqhd,nkhd->nhqk", q, k)
    if mask is not None:
        least = torch.finfo(energy.dtype).min if isinstance(energy, Tensor) else -1e20
        energy = energy.masked_fill(mask == 0, max(-1e20, least))
    weights = torch.softmax(energy / m.embed_size**0.5, dim=3)
    out = torch.einsum("nhqk,nkhd->nqhd", weights.to(v.dtype), v).reshape(n, query.shape[1], m.embed_size)
    result: Tensor = m.fc_out(out)
    return result
