"""Operations and their backends: who serves a call, and why the others do not.

An `Op` is a name and an ordered list of `Backend`s. The first backend without a reason against it serves.
`nnfast.backend(name)` or the variable NNFAST_BACKEND force one; a forced backend serves or raises.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch

BACKENDS = ("folded", "cuda", "triton", "cpu", "aten", "reference")
"""Every backend name: a batch norm folded into torch's convolution, our C++/CUDA, Triton and C++ CPU kernels,
torch's own kernel, plain PyTorch."""


Answer = TypeVar("Answer")


def constant(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """Ask once for each arguments, and let torch.compile take the answer as a constant."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def ask(*args: Any) -> Answer:
        return cached(*args)

    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask


class BackendError(RuntimeError):
    """A forced backend cannot serve a call; the message holds every reason."""


def _check_name(name: object, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; the backends are {', '.join(BACKENDS)}")


_default = os.environ.get("NNFAST_BACKEND") or None
if _default is not None:
    _check_name(_default, "NNFAST_BACKEND")

_forced: ContextVar[str | None] = ContextVar("nnfast_backend", default=_default)

# torch.compile cannot read a ContextVar, but it guards on a module global and recompiles when that changes:
# the block entered last of those open in any thread.
_forced_in_compile: str | None = _default
_open: list[tuple[Token[str | None], str]] = []
_open_lock = threading.Lock()


forced_outside_compile = _forced.get
"""What `forced` gives where torch.compile is not tracing, at a fifth of its cost."""


def forced() -> str | None:
    """Name of the backend forced here, or None."""
    if torch.compiler.is_compiling():
        return _forced_in_compile
    return _forced.get()


class backend(ContextDecorator):  # noqa: N801 - used as a function
    """Force one backend for every nnfast operation inside a `with` block; blocks nest.

    The choice belongs to the current thread (or asyncio task). torch.compile reads one choice for the whole
    process: the block entered last, in any thread. Activation checkpointing repeats a forward in backward, by
    the choice made there: put backward into the block too, or give checkpoint a context_fn.

    Args:
        name: "folded", "cuda", "triton", "cpu", "aten" or "reference".

    Raises:
        ValueError: for an unknown name.
        BackendError: by an operation inside the block that this backend cannot serve.
    """

    def __init__(self, name: str) -> None:
        _check_name(name, "nnfast.backend")
        self.name = name
        self._entered: list[tuple[Token[str | None], str]] = []

    def __enter__(self) -> backend:
        entry = (_forced.set(self.name), self.name)
        self._entered.append(entry)
        self._update(_open.append, entry)
        return self

    def __exit__(self, *_: object) -> None:
        entry = self._entered.pop()
        self._update(_open.remove, entry)
        _forced.reset(entry[0])

    @staticmethod
    def _update(
        change: Callable[[tuple[Token[str | None], str]], None], entry: tuple[Token[str | None], str]
    ) -> None:
        global _forced_in_compile
        with _open_lock:
            change(entry)
            _forced_in_compile = _open[-1][1] if _open else _default

    def _recreate_cm(self) -> backend:
        return backend(self.name)


def _none(*_: Any, **__: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """One way to run an operation.

    Attributes:
        name: one of `BACKENDS`.
        run: takes the operation's arguments, returns its result, differentiable.
        why_not: takes the same arguments; every reason why this backend cannot serve them, or [].
        not_worth: takes the same arguments; every reason why another backend is the better choice, or [].
            A forced backend serves in spite of these.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., list[str]] = _none
    not_worth: Callable[..., list[str]] = _none


OPS: dict[str, Op] = {}
"""Every operation by name."""


class Op:
    """A named operation with its backends, best first. The last one must be able to serve anything valid."""

    def __init__(self, name: str, backends: Sequence[Backend]) -> None:
        self.name = name
        self.backends = tuple(backends)
        self.arguments: Callable[..., tuple[Any, ...]] | None = None
        """Turns the arguments of the public function into the operation's, where they are others."""
        OPS[name] = self

    def example(self, device: str) -> tuple[Any, ...]:
        """The arguments of a large call on a device, for `nnfast info`."""
        return (torch.empty(1 << 24, device=device),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the chosen backend."""
        return self.choose(*args, **kwargs).run(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Op({self.name!r}, [{', '.join(b.name for b in self.backends)}])"

    def choose(self, *args: Any, **kwargs: Any) -> Backend:
        """The backend that serves a call.

        Of one on the CPU no kernels of elsewhere are asked, which would take as long as a small operation;
        `explain` asks them for their reasons.

        Raises:
            BackendError: if the forced backend cannot, or none can.
        """
        name = forced()
        on_cpu = name is None and args and getattr(args[0], "is_cpu", False)
        for candidate in self.backends:
            if on_cpu and candidate.name in ("cuda", "triton"):
                continue
            if name is not None:
                if candidate.name == name and not candidate.why_not(*args, **kwargs):
                    return candidate
            elif not candidate.why_not(*args, **kwargs) and not candidate.not_worth(*args, **kwargs):
                return candidate
        raise BackendError(self._refusal(name, *args, **kwargs))

    def _refusal(self, name: str | None, *args: Any, **kwargs: Any) -> str:
        reasons = {b.name: b.why_not(*args, **kwargs) for b in self.backends if name in (None, b.name)}
        if name is not None and name not in reasons:
            reasons[name] = [
                f"{self.name} has no such backend; it has {', '.join(b.name for b in self.backends)}"
            ]
        what = f"backend {name!r} is forced and cannot serve" if name else "no backend can serve"
        lines = [f"  {key}: {reason}" for key, found in reasons.items() for reason in found]
        return "\n".join([f"nnfast.{self.name}: {what} {describe(args, kwargs)}", *lines])

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Who would serve this call, and why the others would not. Runs nothing, raises nothing."""
        name = forced()
        chosen: str | None = None
        reasons: dict[str, list[str]] = {}
        for b in self.backends:
            found = b.why_not(*args, **kwargs)
            if name is None:
                found = found or b.not_worth(*args, **kwargs)
            elif b.name != name:
                found = [*found, f"{name!r} is forced"]
            if not found and chosen is None:
                chosen = b.name
            elif not found:
                found = [f"{chosen!r} comes first"]
            reasons[b.name] = found
        return Explanation(self.name, chosen, reasons, name, describe(args, kwargs))


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        op: the operation's name.
        backend: the name of the backend that serves the call; None if none can.
        reasons: for each backend every reason why it does not serve; [] for the one that does. Of residual
            blocks also, as `conv2d_act`, why convolutions are torch's; [] if they are nnfast's.
        forced: the forced backend's name, or None.
        arguments: the call in words.
    """

    op: str
    backend: str | None
    reasons: dict[str, list[str]]
    forced: str | None
    arguments: str

    def __str__(self) -> str:
        serves = f"served by {self.backend}" if self.backend else "served by none"
        lines = [f"nnfast.{self.op}{self.arguments}: {serves}"]
        width = max(map(len, [*self.reasons, "reference"])) + 1
        for name, reasons in self.reasons.items():
            lines.append(
                f"  {name:<{width}}{'serves' if name == self.backend else '; '.join(reasons) or 'serves'}"
            )
        return "\n".join(lines)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Name the backend that serves a call and, for each other one, every reason why it does not.

    Args:
        op: an operation's name ("mish"), a function of `nnfast.functional`, or one of nnfast's modules.
        *args: the arguments of the call.
        **kwargs: its keyword arguments.

    Returns:
        An `Explanation` with `.backend` and `.reasons`; print it to read it.

    Raises:
        ValueError: if there is no such operation.
    """
    name = op if isinstance(op, str) else getattr(op, "nnfast_op", None)
    if name not in OPS:
        raise ValueError(
            f"nnfast.explain: {op!r} is no operation of nnfast; the operations are {', '.join(OPS)}"
        )
    if not isinstance(op, (str, type)) and hasattr(op, "explain"):  # a module of several parts
        explanation: Explanation = op.explain(*args, **kwargs)
        return explanation
    found = OPS[name]
    arguments = None if isinstance(op, (str, type)) else getattr(op, "nnfast_arguments", None)
    if convert := arguments or found.arguments:
        args, kwargs = convert(*args, **kwargs), {}
    return found.explain(*args, **kwargs)


def describe(args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """The arguments of a call in words: `(float32[8, 128] on cpu, inplace=True)`."""

    def word(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            sizes = ", ".join(_size(value, dim) for dim in range(value.dim()))
            return f"{str(value.dtype).removeprefix('torch.')}[{sizes}] on {value.device}"
        return repr(value)

    return f"({', '.join([*map(word, args), *(f'{key}={word(value)}' for key, value in kwargs.items())])})"


def _size(x: torch.Tensor, dim: int) -> str:
    """In words; `*` where the parts of a nested tensor, which has no shape, differ."""
    try:
        return str(x.size(dim))
    except RuntimeError:
        return "*"


@functools.cache
def _triton() -> tuple[ModuleType | None, str]:
    """`core.triton`, imported at the first call, or why it cannot be."""
    try:
        return importlib.import_module("nnfast.core.triton"), ""
    except Exception as error:  # a broken triton may raise anything; nnfast must live on
        return None, f"triton cannot be imported: {type(error).__name__}: {error}"


@constant
def triton_why_not(device: str) -> str:
    """Why Triton kernels cannot run on a type of device ("cuda", "cpu"); "" if they can."""
    module, missing = _triton()
    if module is None:
        return missing
    if device == "cuda" or (device == "cpu" and module.INTERPRETED):
        return ""
    return f"x is on {device}; Triton needs a GPU (or TRITON_INTERPRET=1 and cpu tensors, for tests)"
