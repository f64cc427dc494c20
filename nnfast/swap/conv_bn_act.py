"""Chains of convolution, batch norm, sum and activation: in nn.Sequential, and in readable forwards."""

from __future__ import annotations

import inspect
from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from ..conv_bn_act.blocks import extent
from . import seed, timm, torch_nn, transformers
from .chain import (
    ACTIVATIONS,
    IDENTITY,
    Add,
    activation_of,
    flatten,
    is_conv,
    is_norm,
    match,
    plain,
)
from .plan import FusedForward, FusedNorm, FusedSequential, Line, Plus, child, items, norm_parts, parts, plan
from .read import Program, UnreadableError, read
from .rule import Proposal, public_name, subclass

_ACTIVATION_RULES = (torch_nn.modules, timm.modules, transformers.modules, seed.modules)


def modules(module: nn.Module) -> list[Proposal]:
    """Containers that call a convolution and a batch norm, or a batch norm and an activation, in turn."""
    if timm.is_norm_act(module):
        return _norm_act(module)
    return _sequential(module) if _is_sequential(module) else _forward(module)


def _is_sequential(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Sequential) and getattr(type(module), "forward", None) is nn.Sequential.forward
    )


def _norm_act(module: nn.Module) -> list[Proposal]:
    """timm's BatchNormAct2d: also where nothing follows the batch norm: a convolution may come before it."""
    return _proposals(module, {"__class__": FusedNorm}, _chains(norm_parts(module)) or ["bn"], [])


def _sequential(module: nn.Module) -> list[Proposal]:
    found = _chains(list(module._modules.values()))
    kept = _near_misses(list(module._modules.items()))
    return _proposals(module, {"__class__": FusedSequential}, found, kept)


def _forward(module: nn.Module) -> list[Proposal]:
    if not _may_hold_chains(module):
        return []
    try:
        program = read(module)
    except UnreadableError as error:
        pairs = list(zip(module._modules.values(), list(module._modules.values())[1:], strict=False))
        alike = any(isinstance(a, nn.Conv2d) and isinstance(b, nn.BatchNorm2d) for a, b in pairs)
        reason = f"its forward is not only calls of its children and of torch's functions: {error}"
        return [Proposal(public_name(type(module)), reasons=(reason, *_obstacles(module)))] if alike else []
    made = plan(program)
    changes = {"__class__": FusedForward, "_nnfast_plan": made}
    lines = (part.line for part in made.parts if isinstance(part, Line))
    found = [chain for line in lines for chain in _line_chains(line, module)]
    return _proposals(module, changes, found, _near_misses(_called(program, module)))


def _may_hold_chains(module: nn.Module) -> bool:
    """It has batch norms below, and a forward of a user's."""
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        return False
    forward = inspect.getattr_static(type(module), "forward", None)
    ours = str(getattr(forward, "__module__", "")).startswith(("torch.nn.modules.", "nnfast."))
    return not ours and any(
        isinstance(each, nn.BatchNorm2d) for each in module.modules() if each is not module
    )


def _proposals(
    module: nn.Module, changes: dict[str, Any], found: list[str], kept: list[str]
) -> list[Proposal]:
    """Replaced for the chains found, kept for the pairs that only look like one, or both."""
    old = public_name(type(module))
    obstacles = _obstacles(module)
    proposals = []
    if found and not obstacles:
        made = subclass(changes["__class__"], type(module))
        changes = {**changes, "__class__": made, "_nnfast_extent": extent(module.modules())}
        proposals.append(Proposal(old, f"fused {_listed(found)}", changes))
    elif found:
        kept = [*obstacles, *kept]
    if kept:
        proposals.append(Proposal(old, reasons=tuple(kept)))
    return proposals


def _listed(chains: list[str]) -> str:
    """`3 conv+bn+relu, conv+bn`."""
    return ", ".join(f"{n} {chain}" if n > 1 else chain for chain, n in Counter(chains).items())


def _obstacles(module: nn.Module) -> list[str]:
    """What would make a subclass with a fused forward behave otherwise."""
    cls = type(module)
    reasons = []
    if "forward" in vars(module):
        reasons.append("its forward was set on this instance")
    if cls.__call__ is not nn.Module.__call__:
        reasons.append("its class defines __call__")
    if "__init_subclass__" in {name for base in cls.__mro__[:-1] for name in vars(base)}:
        reasons.append("its class wants to know of subclasses (__init_subclass__)")
    return reasons


# Which chains there will be once the whole model is swapped


def _chains(
    direct: list[Any], branches: dict[int, list[str]] | None = None, without_last: bool = False
) -> list[str]:
    """The chains among what a module calls in turn, in words, without those that lie within one child.

    branches: the chains before the last one of a sum's branch.
    without_last: leave out a batch norm at the very end.
    """
    line, origins = [], []
    for at, each in enumerate(direct):
        inner = flatten([each], _parts)
        line += inner
        origins += [len(direct) + at if inner == [each] else at] * len(inner)
    words: list[str] = []
    at = 0
    while at < len(line):
        start, chain = at, match(line, at, _activation)
        add = chain.add if chain else line[at] if isinstance(line[at], Add) else None
        at += chain.length if chain else 1
        words += (branches or {}).get(id(add), [])
        joined = _tail(add.items) if add else ""
        if chain is None and joined and add is not None:
            last = _activation(line[at]) if at < len(line) else None
            at += last is not None
            words.append("+".join([joined, "add", *([last[0]] if last else [])]))
        if chain is None or not chain.pays or (without_last and at == len(line) and chain.act == IDENTITY):
            continue
        whose = {*origins[start:at]}
        if len(whose) > 1 or whose.pop() >= len(direct):
            words.append(str(chain).replace("add", f"add({joined})" if joined else "add"))
    return words


def _tail(line: list[Any]) -> str:
    """The batch norm at the end of a branch."""
    if not line or not is_norm(line[-1]):
        return ""
    return "conv+bn" if len(line) > 1 and is_conv(line[-2]) else "bn"


def _line_chains(line: tuple[Any, ...], module: nn.Module, without_last: bool = False) -> list[str]:
    direct = items(line, module, _parts)
    sums = [(add, step) for add, step in zip(direct, line, strict=True) if isinstance(step, Plus)]
    branches = {id(add): _line_chains(step.line, module, without_last=True) for add, step in sums}
    return _chains(direct, branches, without_last)


def _activation(item: Any) -> tuple[str, float] | None:
    """`activation_of`, of what an activation will be."""
    if (found := activation_of(item)) or not isinstance(item, nn.Module) or not plain(item):
        return found
    for rule in _ACTIVATION_RULES:
        for proposal in rule(item):
            return None if proposal.reasons else ACTIVATIONS.get(proposal.changes["__class__"])
    return None


def _parts(module: nn.Module) -> list[Any] | None:
    """`parts`, of what a container will be."""
    found = parts(module)
    if found is not None or hasattr(type(module), "nnfast_op"):
        return found
    if timm.is_norm_act(module):
        return norm_parts(module)
    if _is_sequential(module):
        return list(module._modules.values())
    if not _may_hold_chains(module) or _obstacles(module):
        return None
    try:
        line = plan(read(module)).line
    except UnreadableError:
        return None
    return items(line, module, _parts) if line else None


# What looks like a chain


def _called(program: Program, module: nn.Module) -> list[tuple[str, Any]]:
    return [(".".join(step.child), child(module, step.child)) for step in program.steps if step.child]


def _near_misses(called: list[tuple[str, Any]]) -> list[str]:
    """Why a convolution and a batch norm called one after another are not a chain."""
    reasons: list[str] = []
    for (name, first), (next_name, second) in pairwise(called):
        if not (_is_a(first, _ConvNd, "conv") and _is_a(second, _NormBase, "norm")):
            continue
        for who, what, wanted in ((name, first, nn.Conv2d), (next_name, second, nn.BatchNorm2d)):
            if wanted is nn.BatchNorm2d and timm.is_norm_act(what):
                continue
            if reason := _no_part(what, wanted):
                reasons.append(f"{who} {reason}")
    return list(dict.fromkeys(reasons))


def _is_a(module: Any, base: type, word: str) -> bool:
    return isinstance(module, base) or (
        isinstance(module, nn.Module)
        and word in str(getattr(module, "original_name", type(module).__name__)).lower()
        and not any(isinstance(each, nn.Module) for each in module.children())
    )


def _no_part(module: nn.Module, wanted: type[nn.Module]) -> str:
    """Why a module cannot be part of a chain; "" if it can."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return f"is a {cls.__name__}, whose code is fixed"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return f"is parametrized: {', '.join(module.parametrizations)}"  # type: ignore[arg-type]
    if isinstance(module, LazyModuleMixin):
        return f"is a {public_name(cls)}, which has no shape yet: call the model once before the swap"
    if cls is not wanted:
        return f"is a {public_name(cls)}, not {public_name(wanted)} itself"
    if "forward" in vars(module):
        return "has a forward that was set on this instance"
    if module._compiled_call_impl is not None:
        return "is compiled"
    if not plain(module):
        hooks = {
            "forward pre": module._forward_pre_hooks,
            "forward": module._forward_hooks,
            "backward pre": module._backward_pre_hooks,
            "backward": module._backward_hooks,
        }
        kinds = ", ".join(kind for kind, registered in hooks.items() if registered)
        return f"has {kinds} hooks (as pruning, weight_norm and spectral_norm do), which must see its tensors"
    return ""
