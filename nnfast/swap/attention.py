"""Attention: nn.MultiheadAttention, timm's Attention, transformers' models, and the seed's SelfAttention.

timm's class keeps its own forward, with one name bound anew in a copy of its globals, and a transformers
model its code, with another attention function: nothing of either library is changed.
"""

from __future__ import annotations

import copy
import dis
import importlib
import inspect
import re
import sys
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import op
from ..attention.encoder import TransformerEncoderLayer
from ..attention.module import attention
from ..attention.multihead import MultiheadAttention
from ..attention.self_attention import SelfAttention
from ..core.operator import DTYPES
from .rule import Proposal, instance_reasons, public_name
from .seed import obstacles


def multihead(module: nn.Module) -> list[Proposal]:
    """nn.MultiheadAttention itself, wherever it is: transformer layers keep what they do around it."""
    cls = type(module)
    if cls is nn.MultiheadAttention:
        reasons = tuple(instance_reasons(module))
        return [
            Proposal(
                public_name(cls), public_name(MultiheadAttention), {"__class__": MultiheadAttention}, reasons
            )
        ]
    if isinstance(module, nn.MultiheadAttention):
        return [Proposal(public_name(cls), reasons=("it is a subclass of torch.nn.MultiheadAttention",))]
    return []


def encoder_layer(module: nn.Module) -> list[Proposal]:
    """nn.TransformerEncoderLayer, whose fused path passes its self_attn by."""
    cls = type(module)
    if cls is not nn.TransformerEncoderLayer:
        reason = "it is a subclass of torch.nn.TransformerEncoderLayer"
        alike = isinstance(module, nn.TransformerEncoderLayer)
        return [Proposal(public_name(cls), reasons=(reason,))] if alike else []
    new = {"__class__": TransformerEncoderLayer}
    reasons = tuple(instance_reasons(module))
    return [Proposal(public_name(cls), public_name(TransformerEncoderLayer), new, reasons)]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by nnfast where it can serve."""
    if not _serves(query, key, value, attn_mask):
        gqa = {"enable_gqa": True} if enable_gqa else {}
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **gqa
        )
    added = attn_mask is not None and attn_mask.dtype != torch.bool
    out: Tensor = attention(
        query,
        key,
        value,
        mask=None if added else attn_mask,
        bias=attn_mask if added else None,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
    )
    return out


def _serves(query: Any, key: Any, value: Any, *masks: Any) -> bool:
    given = [x for x in (query, key, value, *masks) if x is not None]
    return (
        all(type(x) is Tensor or type(x) is nn.Parameter for x in given)
        and all(x.dim() == 4 and x.dtype in DTYPES and x.shape[3] <= op.LARGEST_HEAD for x in given[:3])
        and all(x.dtype == torch.bool or x.is_floating_point() for x in given[3:])
    )


# --- timm ---------------------------------------------------------------------------------------------------

_TIMM = "timm.layers.attention.Attention"


def timm(module: nn.Module) -> list[Proposal]:
    """timm's Attention itself, where it calls F.scaled_dot_product_attention."""
    cls: Any = type(module)
    if f"{cls.__module__}.{cls.__qualname__}" != _TIMM:
        return []
    reasons = instance_reasons(module)
    if not vars(module).get("fused_attn"):
        reasons.append("its fused_attn is False: it makes its weights itself")
    if getattr(cls.forward, "__globals__", {}).get("F") is not F:
        reasons.append("its forward does not call torch's functions as F")
    if reasons:
        return [Proposal(public_name(cls), reasons=tuple(reasons))]
    new = globals().get("TimmAttention") or __getattr__("TimmAttention")
    return [Proposal(public_name(cls), f"{__name__}.{new.__name__}", {"__class__": new})]


def __getattr__(name: str) -> Any:
    """The class is made when it is asked for, by a swap or by pickle: timm is imported only then."""
    if name != "TimmAttention":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, cls = _TIMM.rpartition(".")
    base = getattr(importlib.import_module(module), cls)
    functional = ModuleType("functional")
    vars(functional).update(vars(F), scaled_dot_product_attention=scaled_dot_product_attention)
    method = base.forward
    scope = {**method.__globals__, "F": functional}
    scope.pop("__name__", None)  # by which torch.compile would find the original's, with torch's F
    forward = FunctionType(method.__code__, scope, "forward", method.__defaults__)
    forward.__kwdefaults__, forward.__module__ = method.__kwdefaults__, __name__
    members = {"__doc__": base.__doc__, "__module__": __name__, "forward": forward, "nnfast_op": "attention"}
    globals()[name] = made = type(name, (base,), members)
    return made


# --- transformers -------------------------------------------------------------------------------------------

IMPLEMENTATION = "nnfast"
"""The name under which transformers' models find nnfast's attention."""


def register_transformers() -> None:
    """Let `attn_implementation="nnfast"` mean nnfast's attention in transformers' models.

    Registers a function and torch's form of masks with transformers' AttentionInterface and
    AttentionMaskInterface. `nnfast.swap` does it for the models that it changes; so does a program that loads
    or unpickles a model that names it.

    Raises:
        ImportError: if transformers is not there.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, transformers_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls them.

    Args:
        module: the layer; its `is_causal` holds where the argument is None.
        query: (N, H, Lq, D).
        key: (N, Hk, Lk, D); Hk divides H.
        value: (N, Hk, Lk, D).
        attention_mask: bool, True = attend, or floating, added; (N, 1 or H, Lq, Lk) or None.
        dropout: probability.
        scaling: of the scores.
        is_causal: counts without a mask alone.
        position_bias: added to the scores.
        cache: a paged cache, which is transformers' own function's to update.
        **kwargs: `softcap`; others do not concern attention.

    Returns:
        (N, Lq, H, D), contiguous, and no weights.
    """
    if cache is not None or not _serves(query, key, value, attention_mask, position_bias):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = {"position_bias": position_bias, "cache": cache, **kwargs}
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return result
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = query.shape[2] > 1 and attention_mask is None and causal
    mask, bias = attention_mask, position_bias
    if mask is not None and mask.dtype != torch.bool:
        bias = mask if bias is None else mask + bias
        mask = None
    options = {"mask": mask, "bias": bias, "is_causal": causal, "softcap": kwargs.get("softcap")}
    out = attention(query, key, value, dropout_p=dropout, scale=scaling, **options)
    return out.transpose(1, 2).contiguous(), None


_ASKS = re.compile(r"""_attn_implementation\b.*["']sdpa["']""")


def transformers(module: nn.Module) -> list[Proposal]:
    """transformers' models whose attention is found by name and is torch's."""
    library: Any = sys.modules.get("transformers")
    if library is None or not type(module).__module__.startswith("transformers."):
        return []
    if not isinstance(module, library.PreTrainedModel) or "config" not in vars(module):
        return []
    cls, current = type(module), module.config._attn_implementation
    scope = vars(sys.modules[cls.__module__])
    if current in (None, IMPLEMENTATION) or "ALL_ATTENTION_FUNCTIONS" not in scope:
        return []
    reasons = []
    if current != "sdpa":
        reasons.append(f"its attn_implementation is {current!r}; it needs to be 'sdpa'")
    if scope["ALL_ATTENTION_FUNCTIONS"] is not library.modeling_utils.ALL_ATTENTION_FUNCTIONS:
        reasons.append("its module has attention functions of its own")
    elif _ASKS.search(inspect.getsource(sys.modules[cls.__module__])):
        reasons.append("its code asks whether its attn_implementation is 'sdpa'")
    attribute = "config._attn_implementation"
    old = f"{public_name(cls)} with {current}"
    if reasons:
        return [Proposal(old, reasons=tuple(reasons), attribute=attribute)]
    register_transformers()
    return [Proposal(old, IMPLEMENTATION, {attribute: IMPLEMENTATION}, attribute=attribute)]


# --- the seed's ---------------------------------------------------------------------------------------------

_CHILDREN = {"values", "keys", "queries", "fc_out"}
_INPUTS = ("values", "keys", "query", "mask")
_NUMBERS = ("embed_size", "heads", "head_dim")
_NAMES = {
    *_CHILDREN,
    *_NUMBERS,
    *("torch", "nn", "F", "functional", "math", "float", "sqrt", "int"),
    *("shape", "size", "reshape", "view", "permute", "transpose", "contiguous", "flatten", "unsqueeze"),
    *("einsum", "matmul", "bmm", "masked_fill", "softmax"),
}
_LOOPS = re.compile(
    r"FOR_ITER|SETUP|BEFORE_WITH|PUSH_EXC|STORE_(ATTR|GLOBAL|SUBSCR)|DELETE|IMPORT|YIELD|JUMP_BACKWARD"
)


def seed(module: nn.Module) -> list[Proposal]:
    """User-written classes of the children values, keys, queries and fc_out that compute SelfAttention."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule) or set(module._modules) != _CHILDREN:
        return []
    children = [module._modules[name] for name in ("values", "keys", "queries", "fc_out")]
    if any(type(child) is not nn.Linear for child in children):
        return [Proposal(public_name(cls), reasons=("its children are not all plain nn.Linear",))]
    values, keys, queries, out = (child for child in children if isinstance(child, nn.Linear))
    width, embed = values.in_features, out.out_features
    reasons = [r for r in obstacles(module) if not r.startswith("it has modules")] + instance_reasons(module)
    if any(c.bias is not None or c.weight.shape != (width, width) for c in (values, keys, queries)):
        reasons.append("values, keys and queries are not three square projections without bias")
    if out.in_features != embed or embed % width:
        reasons.append("fc_out is not square, or no multiple of the heads' width")
    numbers = dict(zip(_NUMBERS, (embed, embed // width, width), strict=True))
    reasons += [
        f"its {name} is {vars(module)[name]!r}, where {value} was read off its children"
        for name, value in numbers.items()
        if vars(module).get(name, value) != value
    ]
    if obstacle := _unreadable(cls):
        reasons.append(f"forward is not exactly SelfAttention's: {obstacle}")
    changes = {"__class__": SelfAttention, **{k: v for k, v in numbers.items() if k not in vars(module)}}
    if not reasons and (difference := _difference(module, changes)):
        reasons.append(difference)
    if reasons:
        return [Proposal(public_name(cls), reasons=tuple(reasons))]
    return [Proposal(public_name(cls), public_name(SelfAttention), changes)]


def _unreadable(cls: type[nn.Module]) -> str:
    """What in a class's forward could do more than a few numbers show."""
    forward: Any = vars(cls).get("forward")
    if (
        not isinstance(forward, FunctionType)
        or hasattr(forward, "__wrapped__")
        or forward.__code__.co_freevars
    ):
        return "it is no plain function"
    code = forward.__code__
    if code.co_varnames[1 : code.co_argcount] != _INPUTS or code.co_kwonlyargcount or code.co_flags & 0x0C:
        return f"it does not take {', '.join(_INPUTS)}"
    if foreign := sorted(set(code.co_names) - _NAMES):
        return f"it uses {', '.join(foreign)}"
    known: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": importlib.import_module("math")}
    for name in code.co_names:
        if name in forward.__globals__ and forward.__globals__[name] is not known.get(name, forward):
            return f"it uses a {name} of its own"
    if any(inspect.iscode(constant) for constant in code.co_consts):
        return "it has an inner function"
    before: Any = None
    for instruction in dis.get_instructions(code):
        what = instruction.opname
        if _LOOPS.match(what):
            return f"it has {what.lower()}"
        if "JUMP_IF" in what and "NONE" not in what and before.opname != "IS_OP":
            return "it branches"
        before = instruction
    return ""


def _difference(module: nn.Module, changes: dict[str, Any]) -> str:
    """Run both on a few numbers, with other weights: "" if they give the same."""
    made = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64, device="cpu")

    try:
        with torch.no_grad():
            theirs = copy.deepcopy(module).to("cpu", torch.float64).eval()
            for weight in theirs.parameters():
                weight.copy_(numbers(*weight.shape) / weight.shape[-1] ** 0.5)
            ours = copy.deepcopy(theirs)
            vars(ours).update({name: value for name, value in changes.items() if name != "__class__"})
            ours.__class__ = SelfAttention
            for queries, keys, shape in (
                (4, 4, None),
                (3, 5, (2, 1, 3, 5)),
                (3, 5, (2, 1, 1, 5)),
                (4, 4, (4, 4)),
            ):
                embed = ours.embed_size
                v, k, q = (numbers(2, length, embed) for length in (keys, keys, queries))  # type: ignore[arg-type]
                mask = None
                if shape is not None:
                    mask = (numbers(*shape) > 0).to(torch.bool if len(shape) == 2 else torch.float32)
                    mask.view(-1, shape[-1])[0] = 0
                torch.testing.assert_close(theirs(v, k, q, mask), ours(v, k, q, mask), rtol=1e-9, atol=1e-11)
    except Exception as error:
        return f"its numbers could not be shown to be SelfAttention's: {str(error).splitlines()[0]}"
    return ""
