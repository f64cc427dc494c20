"""What an inference of a module came to, done again at once.

To find chains and who serves them takes Python longer than small images take to compute. Where all that a
module did was to run convolutions with batch norms folded into them, these calls are kept for inputs like
that one, and repeated as long as nothing has changed that they depend on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..core import tuning
from ..core.op import Explanation, forced
from ..core.operator import traced, transformed
from ..core.snapshot import Snapshot, hooked_everywhere
from . import fold, notes

observers: list[Callable[[Tensor, Explanation], None]] = []
"""Called with the input of every unit that runs, and with who serves it and why the others do not."""


class Replays:
    """Of one module, by what is known of the input."""

    __slots__ = ("found", "tried")

    def __init__(self) -> None:
        self.found: dict[Any, Replay] = {}
        self.tried: dict[Any, int] = {}


class _Step(NamedTuple):
    """A call of a folded convolution, or without `how` of a module; input and residual are indices of
    results, 0 the module's input."""

    how: fold.Run | None
    found: Any
    conv: Any
    source: int
    residual: int | None
    act: str
    slope: float
    drops: tuple[int, ...]


class Replay:
    """The calls, and what has to stay as it was."""

    __slots__ = ("forwards", "hooks", "modules", "snapshot", "sources", "steps", "uses")

    def __init__(self, module: nn.Module, snapshot: Snapshot, steps: list[_Step]) -> None:
        self.snapshot, self.steps = snapshot, steps
        self.uses = 0
        self.modules = []  # but the module itself, which would be kept alive
        self.hooks: list[Any] = []
        self.sources = []
        written = {getattr(type(each), "swapped_from", nn.Sequential) for each in module.modules()}
        self.forwards = [(cls, cls.forward) for cls in written - {nn.Sequential}]  # which users may replace
        for each in module.modules():
            state, children = vars(each), each._modules
            known = (state, tuple(state.values()), children, tuple(children.values()))
            self.modules.append((None if each is module else each, type(each), *known))
            self.hooks += [
                each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks,
            ]  # fmt: skip
            for tensors in (each._parameters, each._buffers):
                if tensors:
                    self.sources.append((tensors, tuple(map(id, tensors.values())), tuple(tensors.values())))

    def holds(self, module: nn.Module) -> bool:
        """The module, those in it, their hooks, attributes and weights are what they were."""
        for each, cls, state, values, children, known in self.modules:
            if type(module if each is None else each) is not cls or tuple(state.values()) != values:
                return False
            if children and tuple(children.values()) != known:
                return False
        for tensors, ids, _ in self.sources:  # which are held, so that no other has their id
            if tuple(map(id, tensors.values())) != ids:
                return False
        for cls, forward in self.forwards:
            if cls.forward is not forward:
                return False
        return not any(self.hooks) and self.snapshot.unchanged()

    def run(self, x: Tensor) -> Tensor:
        """The result."""
        self.uses += 1
        values: list[Any] = [x]
        for how, found, conv, source, residual, act, slope, drops in self.steps:
            if how is None:
                values.append(found(values[source]))
            else:
                added = None if residual is None else values[residual]
                values.append(how(found, conv, values[source], added, act, slope))
            for index in drops:
                values[index] = None
        return values[-1]  # type: ignore[no-any-return]


_REPLAYS: WeakKeyDictionary[nn.Module, Replays] = WeakKeyDictionary()
"""Beside the modules: no copy, pickle or state_dict sees them."""


def again(module: nn.Module, x: Any, holds: Callable[[nn.Module], bool] | None = None) -> Tensor | None:
    """The module's result for x, if it is known what comes to it; holds: what else has to."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor:
        return None
    replays = _REPLAYS.get(module)
    if replays is None or not replays.found:
        return None
    key = fold.call_like(x)
    found = replays.found.get(key)
    if found is None or not _plain_call():
        return None
    try:
        same = found.holds(module) and (holds is None or holds(module))
    except Exception:  # an attribute is a tensor or an array now, say: neither equal nor not
        same = False
    if same:
        return found.run(x)
    replays.found.pop(key, None)  # another thread may have been first
    if found.uses > 1:  # else it will change again
        replays.tried.pop(key, None)
    return None


def _plain_call() -> bool:
    """Nobody watches, transforms or forces."""
    return (
        forced() is None and not observers and not transformed() and not traced() and not hooked_everywhere()
    )


def noted(
    module: nn.Module, x: Tensor, expected_of: Callable[[], list[Any] | None], run: Callable[[], Any]
) -> Any:
    """run(), the module's result for x. What it comes to is kept if that is what `expected_of` gives: folded
    convolutions, as (convolution, batch norm, with a residual, activation), and modules called on it."""
    if torch.is_grad_enabled() or not _plain_call():
        return run()
    replays = _REPLAYS.setdefault(module, Replays())
    key = fold.call_like(x)
    tried = replays.tried.get(key, 0)
    if key is None or tried >= _TRIES:
        return run()
    if len(replays.tried) >= tuning.FOLDED_CALLS:
        replays.found, replays.tried = {}, {}
    replays.tried[key] = tried + 1
    expected = expected_of()
    if expected is None:
        return run()
    pairs = [part[:2] for part in expected if type(part) is tuple]
    if any(fold.unplain(*pair) for pair in pairs):
        return run()
    given = [fold.sources(*pair) for pair in pairs]
    if None in given:
        return run()
    tensors = [t for each in given if each is not None for t in each]
    if any(t is not None and t.is_inference() for t in tensors):  # which have no version
        return run()
    snapshot = Snapshot(tensors)  # first: what changes meanwhile is seen later
    with notes.watching() as calls:
        result = run()
    if steps := _steps(x, expected, calls, result):
        replays.found[key] = Replay(module, snapshot, steps)
    return result


_TRIES = 4
"""How often a call is looked at: at the first ones it is still found out who serves."""


def _steps(x: Tensor, expected: list[Any], calls: notes.Notes, result: Any) -> list[_Step] | None:
    """The calls as steps from x to the result; None if they are not what was expected."""
    if len(calls) != len(expected) or calls[-1].result is not result:
        return None
    values = [x]
    taken: list[list[int]] = []
    for part, call in zip(expected, calls, strict=True):
        if isinstance(call, notes.Call):
            same, given = part is call.module, [call.x]
        elif type(part) is not tuple:
            return None
        else:
            conv, bn, added, act = part
            same = conv is call.conv and bn is call.bn and added == (call.residual is not None)
            same = same and act[0] == call.act and (act[1] == call.slope or act[0] != "leaky_relu")
            given = [call.x] if call.residual is None else [call.x, call.residual]
        places = [max((i for i, value in enumerate(values) if value is each), default=-1) for each in given]
        if not same or -1 in places:
            return None
        taken.append(places)
        values.append(call.result)
    last = {place: at for at, places in enumerate(taken) for place in places}
    steps = []
    for at, (call, places) in enumerate(zip(calls, taken, strict=True)):
        drops = tuple(place for place in set(places) if last[place] == at)
        residual = places[1] if len(places) > 1 else None
        if isinstance(call, notes.Call):
            steps.append(_Step(None, call.module, None, places[0], None, "", 0.0, drops))
        else:
            steps.append(
                _Step(call.how, call.found, call.conv, places[0], residual, call.act, call.slope, drops)
            )
    return steps
