"""User-written focal losses: forward is the mean, the sum or the rows of alpha * (1 - exp(-ce))**gamma * ce.

Such a class is recognised as in `seed.py`: by running its forward on symbols after its bytecode has shown
that it reaches nothing but its inputs, numbers of its own and torch's functions; its results then have to
agree.
"""

from __future__ import annotations

import builtins
import math
import re
from types import CodeType, FunctionType
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..focal_loss import op, reference
from .rule import Proposal, Swapped, as_read, instance_reasons, public_name, subclass
from .seed import obstacles

_LOOKS_ALIKE = re.compile(r"focal", re.IGNORECASE)
_CE = "cross_entropy(x, target)"
_FACTOR = f"pow(sub(1, exp(neg({_CE}))), {{gamma}})"


def modules(module: nn.Module) -> list[Proposal]:
    """Classes of the formula above; what only has the name of one is kept."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule) or not _LOOKS_ALIKE.search(cls.__name__):
        return []
    if cls.__module__.split(".")[0] in ("torch", "torchvision"):
        return []
    found = _read(module)
    if isinstance(found, str):
        reason = f"forward is not exactly alpha * (1 - exp(-cross_entropy)) ** gamma * cross_entropy: {found}"
        return [Proposal(public_name(cls), reasons=(reason, *obstacles(module)))]
    reasons = obstacles(module) + instance_reasons(module)
    if not reasons and (difference := _difference(module, found)):
        reasons.append(difference)
    if not reasons:
        new = subclass(RowsFocalLoss, cls)
        if new.written is cls.forward:
            changes = {"__class__": new, "_nnfast_formula": found}
            return [Proposal(public_name(cls), f"nnfast.functional.{new.nnfast_op}", changes)]
        reasons.append("its class had another forward when a module of it was swapped")
    return [Proposal(public_name(cls), reasons=tuple(reasons))]


class Formula(NamedTuple):
    """Of a user's forward the attributes for alpha ("" for 1) and gamma, and the reduction."""

    alpha: str
    gamma: str
    reduction: str


class RowsFocalLoss(Swapped):
    """A user's focal loss.

    Its mean counts ignored targets too, as rows of loss 0. Where an attribute is no number any more, gamma
    negative, or the class's forward another one, that forward runs.
    """

    nnfast_op = "softmax_focal_loss"
    _nnfast_formula: Formula

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """See `nnfast.functional.softmax_focal_loss`."""
        alpha_name, gamma_name, reduction = self._nnfast_formula
        alpha = getattr(self, alpha_name, None) if alpha_name else 1
        gamma = getattr(self, gamma_name, None)
        if not (_is_number(alpha) and _is_number(gamma) and 0 <= gamma < math.inf and as_read(self)):
            return super().forward(inputs, targets)  # type: ignore[misc,no-any-return]
        loss = op.softmax_focal_loss(inputs, targets, alpha, gamma, None, -100, 0.0, "none")
        return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) in (int, float)


def _read(module: nn.Module) -> Formula | str:
    """The formula of a module's forward, or what stands in the way."""
    forward: Any = vars(type(module)).get("forward")
    if not isinstance(forward, FunctionType):
        return "the class has no forward of its own"
    code = forward.__code__
    if hasattr(forward, "__wrapped__") or code.co_freevars:
        return "it is decorated or a closure"
    if code.co_argcount != 3 or code.co_kwonlyargcount or code.co_flags & 0x0C:  # *args, **kwargs
        return "it does not take inputs and targets alone"
    numbers = {name: value for name, value in vars(module).items() if _is_number(value)}
    if foreign := _foreign_names(code, forward.__globals__, numbers):
        return f"it uses {', '.join(foreign)}"
    try:
        result = forward(_Self(numbers), _Symbol("x"), _Symbol("target"))
    except Exception as error:
        return str(error)
    if not isinstance(result, _Symbol):
        return "it is no formula of its inputs"
    reduction = "none"
    for name in ("mean", "sum"):
        if len(result.factors) == 1 and result.factors[0].startswith(f"{name}("):
            reduction = name
            result = result if result.inner is None else result.inner
    factors = list(result.factors)
    if _CE not in factors:
        return f"it is {result}"
    factors.remove(_CE)
    alphas = [f for f in factors if f in numbers]
    powers = [f for f in factors if f not in numbers]
    gamma = next((g for g in numbers if powers == [_FACTOR.format(gamma=g)]), None)
    if gamma is None:
        return f"it is {result}"
    if len(alphas) > 1 or result.number != 1:
        return f"it is {result}"
    if not (math.isfinite(numbers[gamma]) and numbers[gamma] >= 0):
        return f"its {gamma} is {numbers[gamma]}"
    return Formula(alphas[0] if alphas else "", gamma, reduction)


_FUNCTIONS = {torch.exp: "exp", torch.pow: "pow", torch.mul: "mul", torch.neg: "neg", torch.mean: "mean"}
_FUNCTIONS |= {torch.sum: "sum", F.cross_entropy: "cross_entropy"}
_MODULES: tuple[Any, ...] = (torch, torch.nn, F)
_NAMES = {"nn", "functional", *_FUNCTIONS.values()}


def _foreign_names(code: CodeType, scope: dict[str, Any], numbers: dict[str, Any]) -> list[str]:
    """What a function may reach besides its arguments, their numbers and the functions above."""

    def own(name: str) -> bool:
        if name in numbers:
            return True
        if name in scope or hasattr(builtins, name):
            value = scope.get(name)
            known = any(value is allowed for allowed in (*_MODULES, *_FUNCTIONS))
            return known or (name == "pow" and name not in scope) or name == "sum"
        return name in _NAMES

    inner = ["an inner function" for constant in code.co_consts if isinstance(constant, CodeType)]
    return sorted({*inner, *(name for name in code.co_names if not own(name))})


class _Self:
    """Stands for the module: its numbers as symbols, and nothing else."""

    def __init__(self, numbers: dict[str, Any]) -> None:
        for name in numbers:
            object.__setattr__(self, name, _Symbol(name))

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError(f"it sets {name}")


class _Symbol:
    """A product of factors and a number; anything but the formula's functions raises."""

    def __init__(self, *factors: str, number: float = 1, inner: _Symbol | None = None) -> None:
        self.factors, self.number, self.inner = factors, number, inner

    def __str__(self) -> str:
        text = " * ".join(sorted(self.factors))
        return text if self.number == 1 else f"{self.number} * {text}"

    def __mul__(self, other: object) -> _Symbol:
        if isinstance(other, _Symbol):
            return _Symbol(*self.factors, *other.factors, number=self.number * other.number)
        raise TypeError(f"it multiplies by {other!r}")

    mul = __rmul__ = __mul__

    def __neg__(self) -> _Symbol:
        return _Symbol(f"neg({self})")

    neg = __neg__

    def exp(self) -> _Symbol:
        return _Symbol(f"exp({self})")

    def __rsub__(self, other: object) -> _Symbol:
        if other != 1:
            raise TypeError(f"it subtracts from {other!r}")
        return _Symbol(f"sub(1, {self})")

    def __pow__(self, other: object) -> _Symbol:
        return _Symbol(f"pow({self}, {other})")

    pow = __pow__

    def mean(self) -> _Symbol:
        return _Symbol(f"mean({self})", inner=self)

    def sum(self) -> _Symbol:
        return _Symbol(f"sum({self})", inner=self)

    def __bool__(self) -> bool:
        raise TypeError("it branches on its input")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Symbol:
        name = _FUNCTIONS.get(function)
        kwargs = {key: value for key, value in (kwargs or {}).items() if value is not None}
        if name == "cross_entropy":
            defaults = {"ignore_index": -100, "label_smoothing": 0.0}
            options = {key: value for key, value in kwargs.items() if defaults.get(key, key) != value}
            if len(args) != 2 or options != {"reduction": "none"}:
                raise TypeError(f"it calls cross_entropy with {options}")
            return cls(f"cross_entropy({args[0]}, {args[1]})")
        if name is None or kwargs:
            raise TypeError(f"it calls {getattr(function, '__name__', function)} with {kwargs}")
        first, *rest = args
        result: _Symbol = getattr(first if isinstance(first, cls) else cls(str(first)), name)(*rest)
        return result


def _difference(module: nn.Module, formula: Formula) -> str:
    """Run forward on a few numbers: "" if it gives the formula's."""
    alpha, gamma = vars(module).get(formula.alpha, 1), vars(module)[formula.gamma]
    reduction = formula.reduction
    try:
        with torch.no_grad():
            x = torch.linspace(-3, 4, 20, dtype=torch.float64, device="cpu").reshape(4, 5)
            target = torch.tensor([0, 4, -100, 2], device="cpu")
            rows = reference.softmax_focal_loss(x.unsqueeze(-1), target.unsqueeze(-1), None, gamma, -100)
            expected: Tensor = rows.squeeze(-1) * alpha
            expected = expected if reduction == "none" else getattr(expected, reduction)()
            torch.testing.assert_close(
                type(module).forward(module, x, target), expected, rtol=1e-10, atol=1e-12
            )
    except Exception as error:
        return f"its numbers could not be shown to be the formula's: {str(error).splitlines()[0]}"
    return ""
