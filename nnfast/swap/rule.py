"""What a rule says of a module, and what the rules share.

A rule is a function from a module to proposals: none if it does not know the module, and otherwise what to
change, or why not. It never imports the library it knows: classes are known by their names.
"""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Proposal:
    """One change to a module, or the reasons against it.

    Attributes:
        old: what is there, as the report names it.
        new: what would take its place.
        changes: {attribute: value} that bring it about; "__class__" is one of the attributes.
        reasons: every reason to keep what is there; () to go ahead.
        attribute: name of the module's attribute this is about; "" for the module itself.
    """

    old: str
    new: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    attribute: str = ""


Rule = Callable[[nn.Module], list[Proposal]]


def public_name(thing: type | Callable[..., Any]) -> str:
    """The shortest dotted name under which a class or function can be found: `torch.nn.SiLU`."""
    if "swapped_from" in vars(thing):
        return f"fused {public_name(vars(thing)['swapped_from'])}"
    parts = (thing.__module__ or "__main__").split(".")  # None where exec made it
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end])
        if vars(sys.modules.get(prefix, object)).get(thing.__name__) is thing:
            return f"{prefix}.{thing.__name__}"
    name = thing.__qualname__.rpartition("<locals>.")[2]
    return name if parts == ["__main__"] else f"{thing.__module__}.{name}"


def new_class(module: nn.Module, new: type[nn.Module], reasons: list[str] | None = None) -> list[Proposal]:
    """Propose that `module` take the class `new`, which reads one attribute, `inplace`."""
    attributes = {} if "inplace" in vars(module) else {"inplace": False}
    return [
        Proposal(
            public_name(type(module)),
            public_name(new),
            {"__class__": new, **attributes},
            (*(reasons or ()), *instance_reasons(module)),
        )
    ]


def instance_reasons(module: nn.Module) -> list[str]:
    """What would make a module behave otherwise than its class says."""
    forward = type(module).forward
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    reasons = []
    if "forward" in vars(module):
        reasons.append("its forward was set on this instance")
    if vars(module).get("inplace") and "inplace" not in names:
        reasons.append("it has a true attribute inplace, which its forward does not read")
    if getattr(forward, "__module__", None) != type(module).__module__:
        reasons.append(
            f"its class's forward was set from outside, by {getattr(forward, '__module__', forward)}"
        )
    return reasons


def known(classes: Mapping[str, type[nn.Module]]) -> Rule:
    """A rule from a table: full class name to the nnfast class that does the same."""

    def rule(module: nn.Module) -> list[Proposal]:
        new = classes.get(f"{type(module).__module__}.{type(module).__qualname__}")
        return new_class(module, new) if new else []

    return rule


class Swapped:
    """Comes before a user's class in a class made by `subclass`."""

    nnfast_op: str
    mixin: type[Swapped]
    swapped_from: type
    written: Any

    @classmethod
    def members(cls, base: type) -> dict[str, Any]:
        """What the class needs beyond what it inherits."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes made at run time are found by no name; they are made again from the ones they stand for."""
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_new, (self.mixin, self.swapped_from), *reduced[2:])


def as_read(module: Any) -> bool:
    """The class of a swapped module still has the forward that the swap knew."""
    same: bool = module.swapped_from.forward is type(module).written
    return same


def subclass(mixin: type[Swapped], cls: Any) -> Any:
    """The class `cls` with `mixin` before it, under the same name: isinstance and all methods stay."""
    if (mixin, cls) not in _SUBCLASSES:
        members = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        members.update(mixin.members(cls), mixin=mixin, swapped_from=cls, written=cls.forward)
        _SUBCLASSES[mixin, cls] = type(cls.__name__, (mixin, cls), members)
    return _SUBCLASSES[mixin, cls]


_SUBCLASSES: dict[tuple[type, type], type] = {}


def _new(mixin: type[Swapped], cls: type) -> Any:
    made = subclass(mixin, cls)
    return made.__new__(made)
