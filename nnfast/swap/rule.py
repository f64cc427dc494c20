"""What a rule says of a module, and what the rules share.

A rule is a function from a module to proposals: none if it does not know the module, and otherwise what to
change, or why not. It never imports the library it knows: classes are known by their names.
"""

from __future__ import annotations

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
    parts = thing.__module__.split(".")
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
