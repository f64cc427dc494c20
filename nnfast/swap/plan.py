"""What of a program can run as chains, and the classes that run it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..conv_bn_act.replay import again, noted
from .chain import (
    ACTIVATION_FUNCTIONS,
    IDENTITY,
    Act,
    Add,
    Fused,
    as_written,
    eager,
    expected_calls,
    flatten,
    in_turn,
    norm_of,
    plain,
    run,
    small,
)
from .read import Program, Ref, Step, answer, function
from .rule import as_read

_ADDS = {"operator.add", "operator.iadd", "torch.add", "Tensor.add", "Tensor.add_"}
_IN_PLACE = {"operator.iadd", "Tensor.add_"}


class Plus(NamedTuple):
    """In a line: add what `line` makes of the value `source`. `first`: what came so far is on the left."""

    step: Step
    source: int
    line: tuple[Any, ...]
    first: bool


class Line(NamedTuple):
    """Steps from one value to another, each on the result of the one before, which nobody else needs."""

    source: int
    line: tuple[Any, ...]
    result: int


class Alone(NamedTuple):
    """A step of any other kind."""

    step: Step
    result: int


@dataclass(frozen=True)
class Plan:
    """A program as lines: what each step leaves behind is dropped after its last use.

    Attributes:
        parts: lines and single steps, in order.
        drops: for each part the values that nobody needs after it.
        output: what is returned.
        answers: what the module's attributes have to say for this to hold.
        forward: the function that was read; None in a pickle, which could not name it.
    """

    parts: tuple[Line | Alone, ...]
    drops: tuple[tuple[int, ...], ...]
    output: Any
    answers: tuple[tuple[str, Any], ...]
    forward: Callable[..., Any] | None

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "forward": None}

    def holds(self, module: Any) -> bool:
        """The module still is what was read, and so is its class's own forward."""
        if module.swapped_from.forward is not self.forward:
            return False
        return all(answer(module, name) == expected for name, expected in self.answers)

    @property
    def line(self) -> tuple[Any, ...] | None:
        """All of it, if that is one line of calls."""
        part = self.parts[0] if len(self.parts) == 1 else None
        if not isinstance(part, Line) or part.source != 0 or self.output != Ref(part.result):
            return None
        return None if any(isinstance(step, Plus) for step in part.line) else part.line


def plan(program: Program) -> Plan:
    """Join the steps of a program into lines, and lines that meet in a sum into one."""
    uses = Counter(ref.place for step in program.steps for ref in _refs_in((step.args, step.kwargs)))
    uses.update(ref.place for ref in _refs_in(program.output))
    parts: list[Line | Alone] = []
    for result, step in enumerate(program.steps, 1):
        last = parts[-1] if parts and isinstance(parts[-1], Line) and uses[parts[-1].result] == 1 else None
        if (source := _unary(step)) is not None:
            if last is not None and last.result == source:
                parts[-1] = Line(last.source, (*last.line, step), result)
            else:
                parts.append(Line(source, (step,), result))
        elif (pair := _sum(step)) and last is not None and last.result in pair and pair[0] != pair[1]:
            other = pair[pair[0] == last.result]
            before = parts[-2] if len(parts) > 1 and uses[other] == 1 else None
            if isinstance(before, Line) and before.result == other:
                plus = Plus(step, last.source, last.line, other == pair[0])
                parts[-2:] = [Line(before.source, (*before.line, plus), result)]
            else:
                plus = Plus(step, other, (), last.result == pair[0])
                parts[-1] = Line(last.source, (*last.line, plus), result)
        else:
            parts.append(Alone(step, result))
    drops, answers = _drops(parts, program.output), tuple(program.answers.items())
    return Plan(tuple(parts), drops, program.output, answers, program.forward)


def _refs_in(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, slice):
        yield from _refs_in((value.start, value.stop, value.step))
    elif isinstance(value, (tuple, list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _refs_in(each)


def _unary(step: Step) -> int | None:
    """The one value that a child or an activation is called on."""
    if step.child:
        alone = len(step.args) == 1 and not step.kwargs and isinstance(step.args[0], Ref)
        return step.args[0].place if alone else None
    return step.args[0].place if _act(step) else None


def _act(step: Step) -> tuple[str, float] | None:
    """Name and slope of an activation's function."""
    name = ACTIVATION_FUNCTIONS.get(step.function)
    if name is None or not step.args or not isinstance(step.args[0], Ref):
        return None
    names = ("negative_slope", "inplace") if name == "leaky_relu" else ("inplace",)
    given = {**dict(zip(names, step.args[1:], strict=False)), **step.kwargs}
    if any(_refs_in(given)) or len(step.args) > 1 + len(names) or not given.keys() <= {*names}:
        return None
    return name, given.get("negative_slope", 0.01) if name == "leaky_relu" else 0.0


def _sum(step: Step) -> tuple[int, int] | None:
    args = step.args
    if (
        step.function in _ADDS
        and len(args) == 2
        and not step.kwargs
        and all(isinstance(a, Ref) for a in args)
    ):
        return args[0].place, args[1].place
    return None


def _drops(parts: list[Line | Alone], output: Any) -> tuple[tuple[int, ...], ...]:
    last: dict[int, int] = {}
    for at, part in enumerate(parts):
        for index in _needs(part):
            last[index] = at
    kept = {ref.place for ref in _refs_in(output)}
    return tuple(
        tuple(index for index, when in last.items() if when == at and index not in kept)
        for at in range(len(parts))
    )


def _needs(part: Line | Alone) -> set[int]:
    if isinstance(part, Alone):
        return {ref.place for ref in _refs_in((part.step.args, part.step.kwargs))}
    return {part.source, *_added(part.line)}


def _added(line: tuple[Any, ...]) -> Iterator[int]:
    """What the sums of a line add, those of their own lines included."""
    for each in line:
        if isinstance(each, Plus):
            yield each.source
            yield from _added(each.line)


# At call time


class FusedForward(Fused):
    """Runs the plan of its forward while that holds, and its own forward otherwise."""

    @classmethod
    def members(cls, base: type) -> dict[str, Any]:
        """`forward`, with the signature of the base class's."""
        written: Any = base  # whose forward may be another one by the time of a call

        @wraps(written.forward)
        def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and not kwargs:
                plan: Plan = self.__dict__["_nnfast_plan"]
                if (known := again(self, args[0], plan.holds)) is not None:
                    return known
                if small(self, args[0]):
                    return as_written(self, written.forward, args[0])
                if eager(args[0]) and plan.holds(self):
                    return execute(plan, self, args[0])
            return written.forward(self, *args, **kwargs)

        return {"forward": fused}

    def __setstate__(self, state: Any) -> None:
        """A plan from a pickle is taken to be of the forward that the class has now."""
        super().__setstate__(state)  # type: ignore[misc]
        plan = self.__dict__["_nnfast_plan"]
        if plan.forward is None:
            object.__setattr__(plan, "forward", self.swapped_from.forward)  # type: ignore[attr-defined]

    def items(self) -> list[Any]:
        """Of the part that takes the input."""
        plan: Plan = self.__dict__["_nnfast_plan"]
        first = plan.parts[0]
        if not isinstance(first, Line) or first.source != 0 or not plan.holds(self):
            return []
        unknown = dict.fromkeys(range(len(plan.parts) + 1))
        return flatten(items(first.line, self, parts, unknown), parts)  # type: ignore[arg-type]


class FusedSequential(Fused):
    """Runs its children one after another, and chains among them at once."""

    def forward(self, input: Any) -> Any:
        """As nn.Sequential's."""
        if not as_read(self):
            return super().forward(input)  # type: ignore[misc]
        if (known := again(self, input)) is not None:  # type: ignore[arg-type]
            return known
        if small(self, input):  # type: ignore[arg-type]
            return as_written(self, in_turn, input)  # type: ignore[arg-type]
        if not eager(input):
            return super().forward(input)  # type: ignore[misc]
        line = self.items()
        expected = partial(expected_calls, line)
        return noted(self, input, expected, partial(run, line, input, ordinary=True))  # type: ignore[arg-type]

    def items(self) -> list[Any]:
        """Its children, and theirs."""
        return flatten(self._modules.values(), parts) if as_read(self) else []  # type: ignore[attr-defined]


class FusedNorm(Fused):
    """timm's BatchNormAct2d: batch norm, `drop` and `act`."""

    def forward(self, x: Any) -> Any:
        """As the class's own."""
        if not (eager(x) and plain(self) and as_read(self)):  # type: ignore[arg-type]
            return super().forward(x)  # type: ignore[misc]
        return run(self.items(), x)

    def items(self) -> list[Any]:
        """Batch norm, `drop` and `act`."""
        return flatten(norm_parts(self), parts) if as_read(self) else []


def norm_parts(module: Any) -> list[Any]:
    """What timm's BatchNormAct2d does."""
    return [norm_of(module), module.drop, module.act]


def parts(module: nn.Module) -> list[Any] | None:
    """What a container calls one after another; None if it does anything else."""
    if isinstance(module, FusedForward):
        plan = module.__dict__["_nnfast_plan"]
        line = plan.line
        return items(line, module, parts) if line and plan.holds(module) else None
    if isinstance(module, FusedNorm):
        return norm_parts(module) if as_read(module) else None
    if type(module) is nn.Sequential or (isinstance(module, FusedSequential) and as_read(module)):
        return list(module._modules.values())
    return None


def execute(plan: Plan, module: nn.Module, x: Any) -> Any:
    """Run a module's plan on its input."""
    values: dict[int, Any] = {0: x}
    del x
    for part, drops in zip(plan.parts, plan.drops, strict=True):
        if isinstance(part, Alone):
            result = _call(part.step, module, values)
        else:
            line = flatten(items(part.line, module, parts, values), parts)
            last = part.source in drops and part.source not in _added(part.line)
            start = values.pop(part.source) if last else values[part.source]
            if len(plan.parts) == 1 and part.source == 0 and plan.output == Ref(part.result):
                result = noted(module, start, partial(expected_calls, line), partial(run, line, start))
            else:
                result = run(line, start)
            del line, start
        for index in drops:
            values.pop(index, None)
        values[part.result] = result
        del result
    return _fill(plan.output, values)


def items(
    line: tuple[Any, ...],
    module: nn.Module,
    parts: Callable[[nn.Module], list[Any] | None],
    values: dict[int, Any] | None = None,
) -> list[Any]:
    """A line with the module's children, and with the values of the sums in it."""
    found: list[Any] = []
    for each in line:
        if isinstance(each, Plus):
            branch = flatten(items(each.line, module, parts, values), parts)
            writes = each.step.function in _IN_PLACE
            x = values[each.source] if values is not None else None
            found.append(
                Add(x, branch, partial(_plus, each), writes and each.first, writes and not each.first)
            )
        elif each.child:
            found.append(child(module, each.child))
        else:
            found.append(Act(_act(each) or IDENTITY, partial(_activate, each)))
    return found


def child(module: nn.Module, path: tuple[str, ...]) -> Any:
    """A module's child, by its path."""
    for name in path:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def _call(step: Step, module: nn.Module, values: dict[int, Any]) -> Any:
    call = child(module, step.child) if step.child else function(step.function)
    return call(*_fill(step.args, values), **{name: _fill(arg, values) for name, arg in step.kwargs.items()})


def _plus(plus: Plus, so_far: Tensor, branch: Tensor) -> Any:
    return function(plus.step.function)(*((so_far, branch) if plus.first else (branch, so_far)))


def _activate(step: Step, x: Tensor) -> Any:
    return function(step.function)(x, *step.args[1:], **step.kwargs)


def _fill(value: Any, values: dict[int, Any]) -> Any:
    """The values in place of the references to them."""
    if isinstance(value, Ref):
        return values[value.place]
    if isinstance(value, slice):
        return slice(*(_fill(each, values) for each in (value.start, value.stop, value.step)))
    if type(value) in (tuple, list):
        return type(value)(_fill(each, values) for each in value)
    return value
