"""`swap` gives modules of a model nnfast's classes in place; `restore` gives them their own back.

`RULES` holds what is known of each ecosystem; a new family or ecosystem adds one rule.
"""

# A swapped module stays the same object: only its `__class__` changes, and a record of that goes into its
# `__dict__`. So hooks, names, state, sharing and references held anywhere live on, in copies and pickles too.

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import attention, conv_bn_act, seed, seed_loss, timm, torch_nn, torchvision, transformers
from .rule import Proposal, Rule, public_name

RULES: list[Rule] = [
    torch_nn.modules,
    timm.modules,
    transformers.modules,
    attention.multihead,
    attention.timm,
    attention.transformers,
    attention.seed,
    conv_bn_act.modules,
    torchvision.modules,
    seed.modules,
    seed_loss.modules,
    attention.encoder_layer,
]
"""In order: the first rule that has anything to say of a module decides. What a module holds as an attribute,
`torch_nn.function_attributes` says besides."""

_RECORD = "_nnfast_swapped"
"""Key in a swapped module's `__dict__`: {what: (new, old)}, or (new,) where there was nothing before."""


def swap(model: nn.Module) -> Report:
    """Give every module of `model` that nnfast can serve its nnfast class, in place.

    Convolution -> batch norm (-> sum) -> activation runs as one in any nn.Sequential without a forward of its
    own, in timm's BatchNormAct2d, and in user-written and library blocks whose forward is only calls of their
    children and of torch's functions; what runs as one is decided at each call, from the modules as they are.
    Such a module's class becomes a subclass of it.

    Replaced are `nn.SiLU` and `nn.Mish`, timm's and transformers' own, user-written classes whose forward is
    exactly `x * torch.sigmoid(x)` or `x * torch.tanh(F.softplus(x))` in any spelling, and the functions
    `F.silu` and `F.mish` where a module holds them as attributes; user-written focal losses whose forward is
    `alpha * (1 - exp(-ce)) ** gamma * ce` over `F.cross_entropy`, which stay instances of their class; and
    the classification head of torchvision's RetinaNet, whose loss then calls nnfast's. So are
    `nn.MultiheadAttention` anywhere, `nn.TransformerEncoderLayer`, timm's Attention, user-written classes
    that compute `nnfast.SelfAttention`, and the attn_implementation of transformers' models where it is
    "sdpa". Modules stay the same objects with the same attributes, hooks and state_dict; so a module that
    another model shares is swapped there too, just as `.eval()` would reach it. Two things differ: called by
    keyword, an activation's argument is `input`, a focal loss's are `inputs` and `targets`; and
    `torch.jit.script` cannot read nnfast's modules, so restore before it.

    Args:
        model: any module, wrapped (DDP, torch.compile, FX) or not. It may be an activation itself.

    Returns:
        A `Report` with `.replaced` and `.kept`; print it. After a second swap `.replaced` is empty.

    Raises:
        TypeError: if model is not a module. After any error the model is as it was.
    """
    _check("swap", model)
    plan: list[tuple[nn.Module, Mapping[str, Any]]] = []
    replaced, kept = [], []
    places = _places(model)
    for module, names in places.items():
        for proposal in _proposals(module):
            where = tuple(".".join(filter(None, (name, proposal.attribute))) for name in names)
            if proposal.reasons:
                kept.append(Entry(where, proposal.old, None, proposal.reasons))
            else:
                replaced.append(Entry(where, proposal.old, proposal.new, ()))
                plan.append((module, proposal.changes))
    _apply(plan)
    return Report(tuple(replaced), tuple(kept), len(places))


def restore(model: nn.Module) -> None:
    """Undo `swap`: every module of `model` takes its own class back. Without a swap before, nothing happens.

    The modules are the same objects all along, so training flags, attributes and hooks set since then stay.
    Works on deep copies and on unpickled models too.

    Raises:
        TypeError: if model is not a module.
        RuntimeError: if something else has changed a swapped module's class since. The model stays as it is.
    """
    _check("restore", model)
    swapped = [(name, module) for name, module in model.named_modules() if _RECORD in vars(module)]
    for name, module in swapped:
        ours, *_ = vars(module)[_RECORD].get("__class__", (_kind(type(module)),))
        if _kind(type(module)) is not ours:
            raise RuntimeError(
                f"nnfast.restore: {name or 'the model'} was made a {public_name(ours)} by swap and has since "
                f"become a {public_name(type(module))}; undo that first"
            )
    for _, module in swapped:
        _undo(module)
    for module in model.modules():  # slices of a swapped nn.Sequential
        if "swapped_from" in vars(type(module)):
            object.__setattr__(module, "__class__", vars(type(module))["swapped_from"])


@dataclass(frozen=True)
class Entry:
    """One module, or function held by a module, in a report.

    Attributes:
        names: its qualified names in the model, one for each place that uses it; "" is the model itself.
        old: its class or function before.
        new: its class or function now; None if it was kept.
        reasons: every reason why it was kept; () if it was replaced.
    """

    names: tuple[str, ...]
    old: str
    new: str | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Report:
    """What `swap` did; print it to read it.

    Attributes:
        replaced: what was replaced.
        kept: what looks as if it could have been, with the reasons why it was not.
        looked_at: the number of modules in the model, each counted once.
    """

    replaced: tuple[Entry, ...]
    kept: tuple[Entry, ...]
    looked_at: int

    def __repr__(self) -> str:
        """A head line, and a row for every group of equal entries."""
        done = f"{len(self.replaced)} replaced, {len(self.kept)} kept"
        lines = [f"nnfast.swap: {_count(self.looked_at, 'module')} looked at, {done}"]
        rows = list(self._rows())
        verbs, counts, whats = (max((len(row[column]) for row in rows), default=0) for column in range(3))
        for verb, count, what, where, reasons in rows:
            lines.append(f"  {verb:<{verbs}}  {count:>{counts}}  {what:<{whats}}  at {where}")
            lines += [f"  {'':<{verbs}}  {'':<{counts}}  - {reason}" for reason in reasons]
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[str, str, str, str, tuple[str, ...]]]:
        """Equal entries in one row, most first: verb, how many, what, where, why not."""
        groups: dict[tuple[str, str, tuple[str, ...]], list[Entry]] = {}
        for verb, entries in (("replaced", self.replaced), ("kept", self.kept)):
            for entry in entries:
                what = f"{entry.old} -> {entry.new}" if entry.new else entry.old
                groups.setdefault((verb, what, entry.reasons), []).append(entry)
        for (verb, what, reasons), group in sorted(
            groups.items(), key=lambda item: (item[0][0] == "kept", -len(item[1]))
        ):
            yield (
                verb,
                str(len(group)),
                what,
                _where(name for entry in group for name in entry.names),
                reasons,
            )


def _where(names: Iterable[str], most: int = 3) -> str:
    """A few words for many names: numbers become `*`, and only the commonest patterns are shown."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(re.sub(r"\d+", "*", name), []).append(name or "the model itself")
    same = sorted(patterns.items(), key=lambda item: -len(item[1]))
    shown = ", ".join(found[0] if len(found) == 1 else pattern for pattern, found in same[:most])
    rest = sum(len(found) for _, found in same[most:])
    return shown + (f" and {_count(rest, 'place')} more" if rest else "")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _check(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        got = f"the class {public_name(model)}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"nnfast.{function}: model is {got}; it needs to be an instance of torch.nn.Module")


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module of the model, once, with every name it has there."""
    places: dict[nn.Module, list[str]] = {model: [""]}
    for prefix, parent in model.named_modules():
        for key, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append(f"{prefix}.{key}" if prefix else key)
    return places


def _proposals(module: nn.Module) -> list[Proposal]:
    found: list[Proposal] = []
    if not hasattr(type(module), "nnfast_op"):
        found = next(filter(None, (rule(module) for rule in RULES)), [])
    becomes = [proposal.changes.get("__class__", object) for proposal in found if not proposal.reasons]
    if any(issubclass(cls, torch_nn.ACTIVATIONS) for cls in (type(module), *becomes)):
        return found  # it calls no function that it holds
    return [*found, *torch_nn.function_attributes(module)]


def _apply(plan: list[tuple[nn.Module, Mapping[str, Any]]]) -> None:
    """All or nothing."""
    before = [(module, type(module), dict(vars(module))) for module, _ in plan]
    try:
        for module, changes in plan:
            _put(module, changes)
    except BaseException:
        for module, cls, state in before:
            for what, (new, *old) in vars(module).get(_RECORD, {}).items():
                if "." in what and what not in state.get(_RECORD, {}):
                    _set_held(module, what, new, old[0])
            object.__setattr__(module, "__class__", cls)
            vars(module).clear()
            vars(module).update(state)
        raise


def _put(module: nn.Module, changes: Mapping[str, Any]) -> None:
    for what, new in changes.items():
        if what == "__class__":
            old: tuple[Any, ...] = (type(module),)
            object.__setattr__(module, what, new)
            new = _kind(new)
        elif "." in what:  # of an object that the module holds
            holder, _, name = what.partition(".")
            old = (getattr(vars(module)[holder], name),)
            _set_held(module, what, old[0], new)
        else:
            old = tuple(value for name, value in vars(module).items() if name == what)
            vars(module)[what] = new
        vars(module)[_RECORD] = {**vars(module).get(_RECORD, {}), what: (new, *old)}


def _set_held(module: nn.Module, what: str, now: Any, then: Any) -> None:
    """`holder.name` of a module, if it still is what it was."""
    holder, _, name = what.partition(".")
    held = vars(module).get(holder)
    if getattr(held, name, None) == now:
        setattr(held, name, then)


def _kind(cls: type) -> type:
    """The class itself, or for one made at run time, which no pickle can name, what it was made with."""
    kind: type = vars(cls).get("mixin", cls)
    return kind


def _undo(module: nn.Module) -> None:
    for what, (new, *old) in vars(module).pop(_RECORD, {}).items():
        if what == "__class__":
            object.__setattr__(module, what, old[0])
        elif "." in what:
            _set_held(module, what, new, old[0])
        elif vars(module).get(what) is not new:
            continue  # set by someone else since then
        elif old:
            vars(module)[what] = old[0]
        else:
            del vars(module)[what]
