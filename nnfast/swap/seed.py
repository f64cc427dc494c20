"""User-written Swish and Mish: forward is `x * torch.sigmoid(x)` or `x * torch.tanh(F.softplus(x))`.

Such a class is recognised by running its forward on a symbol, after its bytecode has shown that it can reach
nothing but its input and torch's functions; the numbers of the module itself then have to agree.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..activation import reference
from ..activation.module import Mish, SiLU, Swish
from .rule import Proposal, instance_reasons, new_class, public_name

FORMULAS = {
    "mul(sigmoid(x), x)": (Swish, reference.silu),
    "silu(x)": (SiLU, reference.silu),  # which takes no integers either
    "mul(tanh(softplus(x)), x)": (Mish, reference.mish),
    "mish(x)": (Mish, reference.mish),
}
"""What a forward may compute, as `_Symbol` writes it."""

_NEITHER = "not exactly x * sigmoid(x) or x * tanh(softplus(x))"
_LOOKS_ALIKE = re.compile(r"silu|swish|mish", re.IGNORECASE)
_OTHERS = re.compile(r"hard", re.IGNORECASE)
_EVERY_CLASS_HAS = {
    *vars(type("", (), {})),
    *("__init__", "forward", "extra_repr", "__annotations__", "__annotate__", "__annotate_func__"),
    *("__annotations_cache__", "__constants__", "__firstlineno__", "__static_attributes__"),
}


def modules(module: nn.Module) -> list[Proposal]:
    """Classes of the formulas above; what only has the name of one is kept."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule) or cls.__module__.startswith("torch."):
        return []
    term, obstacle = _read(cls)
    if term not in FORMULAS:
        alike = _looks_alike(cls.__name__) and not _is_block(module)
        reason = f"forward is {_NEITHER}: {obstacle}"
        return [Proposal(public_name(cls), reasons=(reason, *obstacles(module)))] if alike else []
    new, formula = FORMULAS[term]
    reasons = obstacles(module)
    if not reasons and not instance_reasons(module) and (difference := _difference(cls, formula)):
        reasons.append(difference)
    return new_class(module, new, reasons)


def function_reason(function: object) -> str:
    """Why a user-written Swish or Mish that is a function, or has the name of one, is kept; "" for others."""
    if not isinstance(function, FunctionType) or str(function.__module__).startswith(("torch.", "nnfast.")):
        return ""
    term, obstacle = _read_function(function, takes=1)
    if term in FORMULAS:
        return f"it is user-written; give it nnfast.functional.{FORMULAS[term][0].__name__.lower()} by hand"
    return f"it is {_NEITHER}: {obstacle}" if _looks_alike(function.__name__) else ""


def _looks_alike(name: str) -> bool:
    return bool(_LOOKS_ALIKE.search(name) and not _OTHERS.search(name))


def _is_block(module: nn.Module) -> bool:
    """It holds more than activations: a ConvBNSiLU."""
    return any(child._parameters or child._buffers for child in module.modules() if child is not module)


def obstacles(module: nn.Module) -> list[str]:
    """Why a class of nnfast could not stand in, whatever forward computes."""
    cls = type(module)
    reasons = []
    if cls.__bases__ != (nn.Module,):
        reasons.append(f"its class derives from {', '.join(map(public_name, cls.__bases__))}")
    if extra := sorted(vars(cls).keys() - _EVERY_CLASS_HAS):
        reasons.append(f"its class also defines {', '.join(extra)}")
    for what in ("parameters", "buffers", "modules"):
        if names := list(getattr(module, f"_{what}")):
            reasons.append(f"it has {what} of its own: {', '.join(names)}")
    return reasons


def _read(cls: type[nn.Module]) -> tuple[str, str]:
    """The formula of a class's forward in `_Symbol`'s words, or "" and what stands in the way."""
    forward: Any = vars(cls).get("forward")
    static = isinstance(forward, staticmethod)
    if static:
        forward = forward.__func__
    if not isinstance(forward, FunctionType):
        return "", "the class has no forward of its own"
    return _read_function(forward, takes=2 - static)


def _read_function(forward: FunctionType, takes: int) -> tuple[str, str]:
    """`_read`, of a function that takes x alone, or after a self."""
    code = forward.__code__
    if hasattr(forward, "__wrapped__") or code.co_freevars:
        return "", "it is decorated or a closure"
    if code.co_argcount != takes or code.co_kwonlyargcount or code.co_flags & 0x0C:  # *args, **kwargs
        return "", "it takes more than one input"
    if foreign := _foreign_names(code, forward.__globals__):
        return "", f"it uses {', '.join(foreign)}"
    try:
        result = forward(*[object()] * (takes - 1), _Symbol("x"))
    except Exception as error:
        return "", str(error)
    return (
        (result.term, f"it is {result.term}")
        if isinstance(result, _Symbol)
        else ("", "it is no formula of x")
    )


_METHODS = {"sigmoid", "tanh", "mul"}
_MODULES: tuple[Any, ...] = (torch, torch.nn, F)
_FUNCTIONS: dict[Callable[..., Any], str] = {
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    F.softplus: "softplus",
    torch.mul: "mul",
    F.silu: "silu",
    F.mish: "mish",
}


def _foreign_names(code: CodeType, scope: dict[str, Any]) -> list[str]:
    """What a function may reach besides its arguments and the functions above: self's attributes, globals."""
    attributes = {"nn", "functional", *_METHODS, *_FUNCTIONS.values()}

    def own(name: str) -> bool:
        if name in scope or hasattr(builtins, name):
            value = scope.get(name)
            return any(value is allowed for allowed in (*_MODULES, *_FUNCTIONS, F.sigmoid, F.tanh))
        return name in attributes

    inner = ["an inner function" for constant in code.co_consts if isinstance(constant, CodeType)]
    return sorted({*inner, *(name for name in code.co_names if not own(name))})


class _Symbol:
    """Stands for a tensor and writes down what is done to it; anything but the formulas' functions raises."""

    def __init__(self, term: str) -> None:
        self.term = term

    def __mul__(self, other: object) -> _Symbol:
        if not isinstance(other, _Symbol):
            raise TypeError(f"it multiplies by {other!r}")
        return _Symbol(f"mul({', '.join(sorted((self.term, other.term)))})")

    mul = __rmul__ = __mul__

    def __imul__(self, other: object) -> _Symbol:
        raise TypeError("it writes to its input")

    def __bool__(self) -> bool:
        raise TypeError("it branches on its input")

    def sigmoid(self) -> _Symbol:
        return _Symbol(f"sigmoid({self.term})")

    def tanh(self) -> _Symbol:
        return _Symbol(f"tanh({self.term})")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Symbol:
        name = _FUNCTIONS.get(function)
        if name is None or kwargs not in (None, {}, {"inplace": False}):
            raise TypeError(f"it calls {getattr(function, '__name__', function)} with {kwargs}")
        if name == "mul":
            return cls.__mul__(*args)
        if len(args) != 1:
            raise TypeError(f"it calls {name} with {args[1:]}")
        return _Symbol(f"{name}({args[0].term})")


def _difference(cls: type[nn.Module], formula: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Run forward on a few numbers: "" if it gives the formula's."""
    try:
        with torch.no_grad():
            x = torch.linspace(-20, 20, 81, dtype=torch.float64, device="cpu")
            forward: Any = cls.forward
            args = (x,) if isinstance(vars(cls)["forward"], staticmethod) else (None, x)
            torch.testing.assert_close(forward(*args), formula(x), rtol=1e-12, atol=1e-12)
    except Exception as error:
        return f"its numbers could not be shown to be the formula's: {str(error).splitlines()[0]}"
    return ""
