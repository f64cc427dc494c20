"""torch's own: nn.SiLU, nn.Mish, and F.silu, F.mish held as attributes of a module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..activation import module as activation
from . import seed
from .rule import Proposal, new_class, public_name

CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.SiLU: activation.SiLU, nn.Mish: activation.Mish}
ACTIVATIONS = tuple(CLASSES.values())
FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {F.silu: activation.silu, F.mish: activation.mish}


def modules(module: nn.Module) -> list[Proposal]:
    """nn.SiLU and nn.Mish themselves; what derives from them, or was scripted from them, is kept."""
    if new := CLASSES.get(type(module)):
        return new_class(module, new)
    if isinstance(module, torch.jit.ScriptModule):
        name = getattr(module, "original_name", "")
        reason = f"it is a {type(module).__name__}, whose code is fixed"
        return [Proposal(name, reasons=(reason,))] if name in {old.__name__ for old in CLASSES} else []
    for base in CLASSES:
        if isinstance(module, base):
            return [Proposal(public_name(type(module)), reasons=(_subclass_reason(type(module), base),))]
    return []


def _subclass_reason(cls: type[nn.Module], base: type[nn.Module]) -> str:
    above = cls.__mro__[: cls.__mro__.index(base)]
    own = sorted({name for c in above for name in vars(c) if name == "forward" or not name.startswith("__")})
    return f"it is a subclass of {public_name(base)}" + (f" with its own {', '.join(own)}" if own else "")


def function_attributes(module: nn.Module) -> list[Proposal]:
    """`self.act = F.silu` and the like; what is a user's own is kept."""
    if isinstance(module, torch.jit.ScriptModule):
        return []
    proposals = []
    for name, value in vars(module).items():
        function = value.func if isinstance(value, partial) else value
        new = next((new for old, new in FUNCTIONS.items() if old is function), None)
        reason = "" if new else seed.function_reason(function)
        if name == "forward" or not (new or reason):
            continue
        old = public_name(function)
        if function is not value:
            old, reason = f"partial({old})", "it is a functools.partial; give it nnfast's function by hand"
        if new and not reason:
            proposals.append(Proposal(old, f"nnfast.functional.{new.__name__}", {name: new}, attribute=name))
        else:
            proposals.append(Proposal(old, reasons=(reason,), attribute=name))
    return proposals
