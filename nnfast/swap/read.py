"""Reads a user's forward: which children it calls in which order, and what it does between.

The forward runs on symbols, in place of the module a stand-in, and in place of its globals only what is known
to be harmless. What it must not do (ask for a value, for the training flag, for a parameter, write anything,
reach anything unknown) it cannot do: the attempt is the reason why the module is kept. What it asked of the
module's other attributes is written down, and the result holds only while the answers stay the same.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Ref(NamedTuple):
    """The result of a step; 0 is forward's input."""

    place: int


class Step(NamedTuple):
    """One call: of a child by its path, or of a torch function, operator or method by its name."""

    child: tuple[str, ...]
    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Program:
    """What forward does: steps, the value returned, and what it was told of the module's attributes."""

    steps: tuple[Step, ...]
    output: Any
    answers: dict[str, Any]
    forward: FunctionType


class UnreadableError(Exception):
    """Why a forward cannot be read."""


def read(module: nn.Module) -> Program:
    """The program of a module's forward, called with one input.

    Raises:
        UnreadableError: if it does more, or other things, than a program can say.
    """
    reader = _Reader(module)
    try:
        forward = inspect.getattr_static(type(module), "forward", None)
        if not isinstance(forward, FunctionType):
            raise UnreadableError("its class's forward is not a plain function")
        _check_signature(forward)
        result = reader.sandboxed(forward, (reader.itself,))(reader.symbol(0))
        output = _refs(result)
    except Exception as error:
        reader.refused.append(str(error) if isinstance(error, UnreadableError) else f"it raises {error!r}")
    if reader.refused:
        raise UnreadableError(reader.refused[0])
    return Program(tuple(reader.steps), output, reader.answers, forward)


def answer(module: nn.Module, name: str) -> Any:
    """What a module says of an attribute, in a form that can be compared and kept."""
    own = vars(module)
    places = (own, own["_modules"], own["_parameters"], own["_buffers"])
    default = getattr(type(module), name, _NOTHING)
    value = next((place[name] for place in places if name in place), default)
    if value is _NOTHING:
        return "nothing"
    if isinstance(value, nn.Module):
        return "a module", tuple(value._modules) if isinstance(value, _CONTAINERS) else None
    if callable(value):
        return "a function", name in own, known_function(value) or getattr(value, "__qualname__", None)
    return type(value).__name__, value


def function(name: str) -> Callable[..., Any]:
    """The function of a step."""
    space, _, name = name.rpartition(".")
    if space == "Tensor.get":
        return operator.attrgetter(name)
    found: Callable[..., Any] = getattr(_SPACES[space], name)
    return found


def known_function(value: Any) -> str:
    """A torch function's name for `function`; "" for others. nnfast's own go by the name of torch's."""
    name, home = getattr(value, "__name__", ""), str(getattr(value, "__module__", None))
    if home.startswith("nnfast."):
        return f"F.{name}" if hasattr(value, "nnfast_op") and hasattr(F, name) else ""
    for space in ("torch", "F", "special"):
        if name and getattr(_SPACES[space], name, None) is value:
            return f"{space}.{name}"
    return (
        _made_by_functions().get(value, "")
        if home.startswith("torch.") and isinstance(value, FunctionType)
        else ""
    )


@cache
def _made_by_functions() -> dict[Any, str]:
    """max_pool2d and its like, which are made by a function and know no name."""
    return {value: f"F.{name}" for name, value in vars(F).items() if isinstance(value, FunctionType)}


_NOTHING = object()
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SPACES: dict[str, Any] = {
    "torch": torch,
    "F": F,
    "special": torch.special,
    "operator": operator,
    "Tensor": Tensor,
}
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.memory_format)
_BUILTINS = {"range", "enumerate", "zip", "reversed", "len", "list", "tuple", "dict", "float", "int", "bool"}
_WRITES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME"}
_CATCHES = {"SETUP_FINALLY", "SETUP_WITH", "PUSH_EXC_INFO", "BEFORE_WITH", "WITH_EXCEPT_START"}


def _check_signature(forward: FunctionType) -> None:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    takes = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in takes:
        raise UnreadableError("forward takes no input")
    for parameter in parameters[1:]:
        if parameter.default is parameter.empty:
            raise UnreadableError(f"forward needs more than one input: {parameter.name}")


def _refs(value: Any) -> Any:
    """Symbols, alone or in tuples and lists, as references; constants as they are."""
    if isinstance(value, _Symbol):
        return Ref(object.__getattribute__(value, "index"))
    if type(value) in (tuple, list):
        return type(value)(map(_refs, value))
    if type(value) is slice:
        return slice(*map(_refs, (value.start, value.stop, value.step)))
    if isinstance(value, _CONSTANTS) or value is Ellipsis:
        return value
    raise UnreadableError(f"it passes on {_called(value)}")


def _called(value: Any) -> str:
    return str(getattr(value, "_name", "")) or f"a {type(value).__name__}"


def _has_symbol(value: Any) -> bool:
    if type(value) in (tuple, list):
        return any(map(_has_symbol, value))
    return isinstance(value, _Symbol)


@dataclass
class _Reader:
    module: nn.Module
    steps: list[Step] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.itself = _Itself(self)

    def refuse(self, why: str) -> Any:
        self.refused.append(why)  # whoever catches the error does not get away with it
        raise UnreadableError(why)

    def symbol(self, index: int) -> _Symbol:
        return _Symbol(self, index)

    def step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], function: str = "", child: tuple[str, ...] = ()
    ) -> _Symbol:
        if not (child or any(map(_has_symbol, (*args, *kwargs.values())))):
            self.refuse(f"it calls {function} without its input")
        self.steps.append(
            Step(child, function, _refs(args), {key: _refs(value) for key, value in kwargs.items()})
        )
        return self.symbol(len(self.steps))

    # what the forward can reach

    def attribute(self, name: str) -> Any:
        """`self.name`."""
        module = self.module
        if name == "training":
            return self.refuse("it asks whether it is training")
        if type(module).__getattr__ is not nn.Module.__getattr__:
            return self.refuse("its class has its own __getattr__")
        self.answers[name] = answer(module, name)
        if name in vars(module):
            return self.constant(name, vars(module)[name])
        if name in module._modules:
            child = module._modules[name]
            return None if child is None else _Child(self, (name,), child)
        for what in (module._parameters, module._buffers):
            if name in what:
                return (
                    None
                    if what[name] is None
                    else self.refuse(f"it uses its {type(what[name]).__name__} {name}")
                )
        value = inspect.getattr_static(type(module), name, _NOTHING)
        if value is _NOTHING:
            raise AttributeError(name)
        if isinstance(value, FunctionType) and not value.__module__.startswith("torch."):
            return self.sandboxed(value, (self.itself,))
        return self.constant(name, value)

    def constant(self, name: str, value: Any) -> Any:
        if isinstance(value, _CONSTANTS):
            return value
        if type(value) is tuple and all(isinstance(each, _CONSTANTS) for each in value):
            return value
        if callable(value) and not isinstance(value, type) and (known := known_function(value)):
            return _Function(self, known)
        return self.refuse(f"it uses {name}, a {type(value).__name__}")

    def sandboxed(self, function: FunctionType, bound: tuple[Any, ...] = ()) -> Callable[..., Any]:
        """The same code with nothing but harmless names around it."""
        code, name = function.__code__, function.__name__
        if hasattr(function, "__wrapped__") or code.co_freevars:
            self.refuse(f"{name} is decorated, or a closure")
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if not all(isinstance(value, _CONSTANTS) for value in defaults):
            self.refuse(f"{name} has defaults that can change")
        if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            self.refuse(f"{name} is a generator")
        if any(inspect.iscode(constant) for constant in code.co_consts):
            self.refuse(f"{name} has an inner function")
        before: Any = None
        for instruction in dis.get_instructions(code):
            what = instruction.opname
            if what in _WRITES:
                self.refuse(
                    f"{name} sets {instruction.argval}" if "IMPORT" not in what else f"{name} imports"
                )
            if what in _CATCHES:
                self.refuse(f"{name} has a try or a with")
            if what == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval is None):
                self.refuse(f"{name} asks whether two things are the same")
            before = instruction
        scope = {name: self.outside(name, function.__globals__) for name in code.co_names}
        copy = FunctionType(code, {**scope, "__builtins__": {}}, name, function.__defaults__)
        copy.__kwdefaults__ = function.__kwdefaults__
        return lambda *args, **kwargs: copy(*bound, *args, **kwargs)

    def outside(self, name: str, scope: dict[str, Any]) -> Any:
        """A global name, as the forward gets it."""
        if name not in scope:
            if name == "getattr":
                return self.getattr
            if name == "len":
                return self.len
            return getattr(builtins, name) if name in _BUILTINS else _Unknown(self, name)
        value = scope[name]
        if isinstance(value, ModuleType):
            return _Library(self, name, value)
        if isinstance(value, type):
            return _Unknown(self, name)
        if callable(value) and (known := known_function(value)):
            return _Function(self, known)
        if isinstance(value, FunctionType):
            return lambda *args, **kwargs: self.sandboxed(value)(*args, **kwargs)
        return _Unknown(self, name)

    def getattr(self, thing: Any, name: str, *default: Any) -> Any:
        if not isinstance(thing, (_Itself, _Child)):
            self.refuse(f"it asks for an attribute {name} of {_called(thing)}")
        return getattr(thing, name, *default)

    def len(self, thing: Any) -> int:
        return (
            len(thing) if type(thing) in (_Child, list, tuple, dict) else self.refuse("it asks for a length")
        )


class _Itself:
    """`self`."""

    def __init__(self, reader: _Reader) -> None:
        object.__setattr__(self, "_reader", reader)

    def __getattr__(self, name: str) -> Any:
        return self._reader.attribute(name)


class _Stranger:
    """Refuses to say anything of itself."""

    _reader: _Reader
    _name: str

    def _no(self, *_: Any, **__: Any) -> Any:
        return self._reader.refuse(f"it uses {self._name}")

    __call__ = __bool__ = __iter__ = __len__ = __contains__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = _no
    __ge__ = __hash__ = __str__ = __format__ = __index__ = __int__ = __float__ = __getitem__ = __setitem__ = (
        _no
    )
    __enter__ = __exit__ = __next__ = _no


class _Unknown(_Stranger):
    """A name that nothing is known of."""

    def __init__(self, reader: _Reader, name: str) -> None:
        self._reader, self._name = reader, name

    def __getattr__(self, name: str) -> Any:
        return self._no()


class _Function(_Stranger):
    """A function of torch's: calls of it are steps."""

    def __init__(self, reader: _Reader, name: str) -> None:
        self._reader, self._name = reader, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._reader.step(args, kwargs, self._name)

    def __getattr__(self, name: str) -> Any:
        return self._no()


class _Library(_Stranger):
    """`torch`, `torch.nn`, `F`: their functions, and nothing else."""

    def __init__(self, reader: _Reader, name: str, library: ModuleType) -> None:
        self._reader, self._name, self._library = reader, name, library

    def __getattr__(self, name: str) -> Any:
        if self._library not in (torch, nn, F, torch.jit, torch.special):
            return self._no()
        value = getattr(self._library, name, None)
        if isinstance(value, ModuleType):
            return _Library(self._reader, f"{self._name}.{name}", value)
        if value in (torch.jit.is_scripting, torch.jit.is_tracing):  # type: ignore[attr-defined]
            return lambda: False
        if isinstance(value, (torch.dtype, torch.memory_format)):
            return value
        if callable(value) and not isinstance(value, type) and (known := known_function(value)):
            return _Function(self._reader, known)
        return self._reader.refuse(f"it uses {self._name}.{name}")


class _Child(_Stranger):
    """A module below the one that is read."""

    def __init__(self, reader: _Reader, path: tuple[str, ...], module: nn.Module) -> None:
        self._reader, self._path, self._module, self._name = reader, path, module, ".".join(path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._reader.step(args, kwargs, child=self._path)

    def _children(self) -> dict[str, nn.Module]:
        if len(self._path) > 1 or not isinstance(self._module, _CONTAINERS):
            self._no()
        return {name: child for name, child in self._module._modules.items() if child is not None}

    def _below(self, name: str) -> _Child:
        return _Child(self._reader, (*self._path, name), self._children()[name])

    def __getitem__(self, key: Any) -> Any:
        names = list(self._children())
        if isinstance(self._module, nn.ModuleDict) and isinstance(key, str):
            return self._below(key)
        return self._below(names[key]) if type(key) is int else self._no()

    def __iter__(self) -> Any:
        if isinstance(self._module, nn.ModuleDict):
            self._no()
        return iter([self._below(name) for name in self._children()])

    def __len__(self) -> int:
        return len(self._children())

    def __bool__(self) -> bool:
        return len(self) > 0 if isinstance(self._module, _CONTAINERS) else True

    def __getattr__(self, name: str) -> Any:
        return self._reader.refuse(f"it uses {self._name}.{name}")


class _Symbol:
    """A value that is not known yet."""

    def __init__(self, reader: _Reader, index: int) -> None:
        self.reader, self.index = reader, index

    def __getattribute__(self, name: str) -> Any:
        get = object.__getattribute__
        if name.startswith("__"):
            return get(self, name)
        reader = get(self, "reader")
        value = getattr(Tensor, name, _NOTHING)
        if value is _NOTHING or name.startswith("_"):
            return reader.refuse(f"it uses an attribute {name} of a tensor")
        if callable(value):
            return lambda *args, **kwargs: reader.step((self, *args), kwargs, f"Tensor.{name}")
        return reader.step((self,), {}, f"Tensor.get.{name}")


def _operators() -> None:
    """Give symbols Python's operators."""

    def of(name: str, swapped: bool = False) -> Callable[..., Any]:
        def method(self: _Symbol, *others: Any) -> Any:
            reader: _Reader = object.__getattribute__(self, "reader")
            return reader.step((*others, self) if swapped else (self, *others), {}, f"operator.{name}")

        return method

    def no(name: str) -> Callable[..., Any]:
        def method(self: _Symbol, *_: Any) -> Any:
            reader: _Reader = object.__getattribute__(self, "reader")
            return reader.refuse(f"it depends on a tensor's value or size ({name})")

        return method

    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
        setattr(_Symbol, f"__{name}__", of(name))
        setattr(_Symbol, f"__r{name}__", of(name, swapped=True))
        setattr(_Symbol, f"__i{name}__", of(f"i{name}"))
    for name in ("neg", "abs", "getitem"):
        setattr(_Symbol, f"__{name}__", of(name))
    refused = (
        "setitem bool len iter int float index contains str repr format eq ne lt le gt ge hash enter exit"
    )
    for name in refused.split():
        setattr(_Symbol, f"__{name}__", no(name))


_operators()
