"""nn.MultiheadAttention's drop-in: one packed projection, and attention on strided views of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..core import tuning
from ..core.op import BackendError, Explanation, describe, forced
from ..core.operator import DTYPES, autocasts, transformed
from ..core.product import linear
from . import op
from .module import attention

_NAME = "nnfast.MultiheadAttention"


class MultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention: constructor, parameters, state_dict and results are its own.

    Calls with need_weights=False are served by nnfast's attention: memory is linear in the lengths, and no
    mask is made of heads x Lq x Lk. What asks for the weights, nested tensors, small inputs on the CPU and,
    there, dropout where our kernels do not serve, and what torch refuses, is torch's:
    `nnfast.explain(module, query, key, value, ...)` says why.
    Two things differ: a query that sees no key gives out_proj's bias everywhere, where torch may give NaN;
    and dropout drops other elements.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2.
    """

    nnfast_op = "attention"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention takes and gives them.

        Args:
            query: (Lq, N, E), (N, Lq, E) if batch_first, or unbatched (Lq, E).
            key: (Lk, N, kdim), likewise.
            value: (Lk, N, vdim), likewise.
            key_padding_mask: (N, Lk), or (Lk,) unbatched; bool, True = not attended, or floating, added.
            need_weights: also return the weights, which takes torch's slower path.
            attn_mask: (Lq, Lk) or (N * heads, Lq, Lk); bool, True = not attended, or floating, added.
            average_attn_weights: average the weights over the heads.
            is_causal: a promise that attn_mask is causal.

        Returns:
            The output, shaped like query, and the weights or None.

        Raises:
            What nn.MultiheadAttention does.
            BackendError: if a forced backend cannot serve.
        """
        if isinstance(query, Proxy):
            masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return recorded(self, query, key, value, *masks)
        name = forced()
        if name is None and is_small(query):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        call = _Call(query, key, value, key_padding_mask, attn_mask, is_causal)
        reasons = _torchs_reasons(self, call, need_weights)
        if reasons or (name is None and _not_worth(self, call)):
            if name not in (None, "aten"):
                why = "\n".join(f"  {name}: {reason}" for reason in reasons)
                raise BackendError(
                    f"{_NAME}: backend {name!r} is forced and cannot serve {call.described()}\n{why}"
                )
            result: tuple[Tensor, Tensor | None] = super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
            return result
        if each := _slice(self, call):
            return torch.cat([_attended(self, some) for some in _slices(self, call, each)]), None
        return _attended(self, call), None

    def explain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Explanation:
        """What `nnfast.explain` says of a call."""
        call = _Call(query, key, value, key_padding_mask, attn_mask, is_causal)
        reasons = _torchs_reasons(self, call, need_weights)
        if forced() is None:
            reasons = reasons or _not_worth(self, call)
        if reasons:
            return op.explain_torchs(call.described(), reasons)
        q, k, v, options = _arguments(self, call, self.in_proj_bias)
        return op.ATTENTION.explain(*op.arguments(q, k, v, **options))


class _Call(NamedTuple):
    """Arguments of `MultiheadAttention.forward`."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    is_causal: bool

    @property
    def is_self_attention(self) -> bool:
        """Queries, keys and values are one."""
        return self.query is self.key is self.value

    def described(self) -> str:
        """In words."""
        return describe(self[:3], {})


class _Sizes(NamedTuple):
    """Of a call."""

    batch: int
    queries: int
    keys: int


def _sizes(m: nn.MultiheadAttention, call: _Call) -> _Sizes:
    query, key = call.query, call.key
    if query.dim() == 2:
        return _Sizes(1, query.shape[0], key.shape[0])
    if m.batch_first:
        return _Sizes(query.shape[0], query.shape[1], key.shape[1])
    return _Sizes(query.shape[1], query.shape[0], key.shape[0])


def _torchs_reasons(m: nn.MultiheadAttention, call: _Call, need_weights: bool) -> list[str]:
    """Why a call is torch's."""
    query, key, value, key_padding_mask, attn_mask, is_causal = call
    if need_weights:
        return ["need_weights is True, and fused attention never has the weights"]
    given = [query, key, value, *(x for x in (key_padding_mask, attn_mask) if x is not None)]
    if any(type(x) is not Tensor and type(x) is not nn.Parameter for x in given):
        return ["an input is no plain tensor"]
    if any(x.is_nested for x in given):
        return ["an input is a nested tensor"]
    weights = [w for w in _weights(m) if w is not None]
    if any(type(w) is not Tensor and type(w) is not nn.Parameter for w in weights):
        return ["a parameter is no plain tensor"]
    if any(x.dtype not in DTYPES for x in given[:3]):
        return [f"query has dtype {query.dtype}; attention takes {', '.join(map(str, DTYPES))}"]
    if m.head_dim > op.LARGEST_HEAD:
        return [f"the head dim is {m.head_dim}; attention takes up to {op.LARGEST_HEAD}"]
    reasons = []
    if is_causal and attn_mask is None:
        reasons.append("is_causal needs attn_mask")
    if any(x.device != query.device for x in (*given, *weights)):
        reasons.append("inputs and parameters are on several devices")
    if not autocasts(query) and any(x.dtype != query.dtype for x in (key, value, *weights)):
        reasons.append("query, key, value and the parameters have several dtypes")
    return reasons or _shape_reasons(m, call)


def recorded(module: nn.Module, x: Proxy, *args: Any) -> Any:
    """torch.fx records a call of the module, as of torch's own, which it does not look into."""
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *args), {})


def is_small(query: Tensor) -> bool:
    """An inference on the CPU that is torch's, told before all that takes as long as it does."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(query) is Tensor
        and query.is_cpu
        and query.numel() < tuning.MULTIHEAD_ELEMENTS
    )


def _differentiates(m: nn.MultiheadAttention, query: Tensor) -> bool:
    return torch.is_grad_enabled() and (query.requires_grad or any(w.requires_grad for w in m.parameters()))


def _not_worth(m: nn.MultiheadAttention, call: _Call) -> list[str]:
    """Why torch's own way is the faster one."""
    query = call.query
    if not query.is_cpu or torch.compiler.is_compiling():
        return []
    grad = _differentiates(m, query)
    if not grad and query.numel() < tuning.MULTIHEAD_ELEMENTS:
        return [f"{query.numel()} elements; measured to pay from {tuning.MULTIHEAD_ELEMENTS} on"]
    n, queries, keys = _sizes(m, call)
    if op.is_for_cpu(query, queries):
        return []
    weights = n * m.num_heads * queries * keys
    if m.training and m.dropout and weights <= tuning.MULTIHEAD_DROPOUT_WEIGHTS:
        return ["dropout on the CPU, which torch draws faster for weights that fit in memory"]
    if (
        call.is_self_attention
        and m.batch_first
        and not (grad or m.training or m.num_heads % 2 or m.add_zero_attn)
        and m.bias_k is None
        and m.in_proj_weight is not None
        and m.in_proj_bias is not None
        and query.dim() == 3
        and query.shape[1] <= tuning.MULTIHEAD_FASTPATH_LENGTH
        and torch.backends.mha.get_fastpath_enabled()
        and not torch.is_autocast_enabled()
        and not any(x is not None and x.is_floating_point() for x in (call.key_padding_mask, call.attn_mask))
    ):
        return [
            f"torch's fused inference path, measured to be faster up to length "
            f"{tuning.MULTIHEAD_FASTPATH_LENGTH}"
        ]
    return []


def _shape_reasons(m: nn.MultiheadAttention, call: _Call) -> list[str]:
    """What torch has an error for."""
    query, key, value, key_padding_mask, attn_mask, _ = call
    dims = query.dim()
    if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
        return ["query, key and value need all to be 3-D, or all 2-D"]
    if query.shape[-1] != m.embed_dim or key.shape[-1] != m.kdim or value.shape[-1] != m.vdim:
        return [f"embed_dim is {m.embed_dim}, kdim {m.kdim}, vdim {m.vdim}; the inputs have others"]
    n, queries, keys = _sizes(m, call)
    if key.shape[:-1] != value.shape[:-1] or (dims == 3 and key.shape[1 - m.batch_first] != n):
        return ["query, key and value need the same batch, key and value the same length"]
    if key_padding_mask is not None:
        shape = (n, keys) if dims == 3 else (keys,)
        if key_padding_mask.shape != shape or not _is_mask(key_padding_mask):
            return [f"key_padding_mask needs to be bool or floating, of shape {list(shape)}"]
    if attn_mask is not None:
        shapes = (queries, keys), (n * m.num_heads, queries, keys)
        if attn_mask.shape not in shapes or not _is_mask(attn_mask):
            return [f"attn_mask needs to be bool or floating, of shape {' or '.join(map(str, shapes))}"]
    return []


def _is_mask(x: Tensor) -> bool:
    return x.dtype == torch.bool or x.is_floating_point()


def _weights(m: nn.MultiheadAttention) -> tuple[Tensor | None, ...]:
    separate = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    packed = (m.in_proj_weight,) if m._qkv_same_embed_dim else separate
    return *packed, m.in_proj_bias, m.bias_k, m.bias_v, m.out_proj.weight, m.out_proj.bias


# --- the computation ----------------------------------------------------------------------------------------


def _attended(m: nn.MultiheadAttention, call: _Call) -> Tensor:
    """The output."""
    out: Tensor
    if _adds_inside(m, call):
        q, k, v, options = _arguments(m, call, None)
        del options["dropout_p"]  # 0
        in_bias = m.in_proj_bias.view(3, m.num_heads, m.head_dim)
        out = op.projected_attention(q, k, v, in_bias=in_bias, **options)
    else:
        q, k, v, options = _arguments(m, call, m.in_proj_bias)
        out = attention(q, k, v, **options)
    batched = call.query.dim() == 3
    # (N, H, Lq, D), whose rows of all heads have no gaps where our kernels made it
    out = out.transpose(1, 2) if m.batch_first or not batched else out.permute(2, 0, 1, 3)
    out = linear(out.flatten(2), m.out_proj.weight, m.out_proj.bias)
    return out if batched else out.squeeze(0)


def _adds_inside(m: nn.MultiheadAttention, call: _Call) -> bool:
    """Our CPU kernels add in_proj_bias as they read: a pass over the projections less."""
    n, queries, keys = _sizes(m, call)
    return (
        call.is_self_attention
        and m.in_proj_bias is not None
        and m.in_proj_weight is not None
        and m.bias_k is None
        and not (m.add_zero_attn or (m.training and m.dropout))
        and forced() in (None, "cpu")
        and op.is_for_cpu(call.query, queries)
        and n * m.num_heads * queries * keys >= tuning.ATTENTION_SCORES
        and not transformed()
        and not _differentiates(m, call.query)
    )


def _slice(m: nn.MultiheadAttention, call: _Call) -> int:
    """How much of the batch an inference takes at once whose projections would be large; 0: all."""
    query = call.query
    size = 3 * query.numel() * query.element_size()
    if (
        size <= tuning.MULTIHEAD_SLICE
        or not (call.is_self_attention and m.batch_first and query.dim() == 3)
        or query.shape[0] == 1
        or not op.is_for_cpu(query, query.shape[1])
        or transformed()
        or _differentiates(m, query)
    ):
        return 0
    n = query.shape[0]
    count = -(-n // max(n * tuning.MULTIHEAD_SLICE // size, 1))
    return -(-n // count)


def _slices(m: nn.MultiheadAttention, call: _Call, each: int) -> Iterator[_Call]:
    """The call in slices of the batch."""
    padding, mask = call.key_padding_mask, call.attn_mask
    for begin in range(0, call.query.shape[0], each):
        end = begin + each
        x = call.query[begin:end]
        yield _Call(
            *(x, x, x),
            None if padding is None else padding[begin:end],
            mask if mask is None or mask.dim() == 2 else mask[begin * m.num_heads : end * m.num_heads],
            call.is_causal,
        )


def _arguments(
    m: nn.MultiheadAttention, call: _Call, in_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Queries, keys and values (N, H, L, D), and the options that `op.attention` takes."""
    query, key_padding_mask = call.query, call.key_padding_mask
    sizes = _sizes(m, call)
    q, k, v = _projected(m, call, in_bias)
    where = 0 if query.dim() == 2 else int(m.batch_first)  # the length's dimension
    extra = 0
    if m.bias_k is not None:
        assert m.bias_v is not None
        one = [*k.shape[:-2]]
        one[where] = 1
        k = torch.cat([k, m.bias_k.to(k.dtype).view(*k.shape[-2:]).expand(*one, -1, -1)], where)
        v = torch.cat([v, m.bias_v.to(v.dtype).view(*v.shape[-2:]).expand(*one, -1, -1)], where)
        extra += 1
    if m.add_zero_attn:
        k, v = (
            torch.cat([x, x.new_zeros([*x.shape[:where], 1, *x.shape[where + 1 :]])], where) for x in (k, v)
        )
        extra += 1
    causal = call.is_causal and key_padding_mask is None
    mask, bias = _masks(m, None if causal else call.attn_mask, sizes)
    padding = None
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.view(sizes.batch, sizes.keys)
        if key_padding_mask.dtype == torch.bool:
            padding = key_padding_mask
        else:
            added = key_padding_mask[:, None, None]
            bias = added if bias is None else bias + added
    if extra:
        mask = None if mask is None else F.pad(mask, (0, extra), value=True)
        bias = None if bias is None else F.pad(bias, (0, extra))
        padding = None if padding is None else F.pad(padding, (0, extra), value=False)
    options = {
        "mask": mask,
        "bias": bias,
        "key_padding_mask": padding,
        "is_causal": causal,
        "dropout_p": m.dropout if m.training else 0.0,
    }
    if query.dim() == 2:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    else:
        order = (0, 2, 1, 3) if m.batch_first else (1, 2, 0, 3)
        q, k, v = (x.permute(order) for x in (q, k, v))
    return q, k, v, options


def _masks(
    m: nn.MultiheadAttention, attn_mask: Tensor | None, sizes: _Sizes
) -> tuple[Tensor | None, Tensor | None]:
    """A mask, True = attend, or a bias."""
    if attn_mask is None:
        return None, None
    if attn_mask.dim() == 3:
        attn_mask = attn_mask.view(sizes.batch, m.num_heads, sizes.queries, sizes.keys)
    return (~attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)


def _projected(m: nn.MultiheadAttention, call: _Call, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with their features as (H, D), as few products as there are inputs."""
    query, key, value = call[:3]
    heads = (m.num_heads, m.head_dim)
    if not m._qkv_same_embed_dim:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
        q, k, v = (
            linear(x, w, b).unflatten(-1, heads)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v
    weight = m.in_proj_weight
    if key is value:
        if query is key:
            q, k, v = linear(query, weight, bias).unflatten(-1, (3, *heads)).unbind(-3)
            return q, k, v
        parts = (m.embed_dim, 2 * m.embed_dim)
        of_query, of_both = weight.split(parts)
        b_query, b_both = (None, None) if bias is None else bias.split(parts)
        k, v = linear(key, of_both, b_both).unflatten(-1, (2, *heads)).unbind(-3)
        return linear(query, of_query, b_query).unflatten(-1, heads), k, v
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    q, k, v = (
        linear(x, w, b).unflatten(-1, heads)
        for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
    )
    return q, k, v
