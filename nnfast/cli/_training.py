"""Trains two models side by side on the same batches and dropout masks, and keeps what a comparison needs."""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ..conv_bn_act import replay
from ..core.op import Explanation, describe, explain
from ._tasks import Samples, Task

WARM_UP = 3
"""First steps that are not timed: memory is new, and `explain` is asked."""

LEARNING_RATE = 0.05
"""The largest. At twice as much attention's loss leaps, and no two roundings of one network stay together."""

Loss = Callable[[Tensor, Tensor], Tensor]
Served = Counter[tuple[str, str, str, str]]
"""Number of calls by (when, operation, input, backend)."""


class Side:
    """One of the two models, its optimizer, and what was seen of it.

    Attributes:
        label: how tables and plots call it.
        losses: of every step.
        seconds: of every step.
        accuracy: on the held-out samples after every epoch.
        memory: bytes of a step, see `step_memory`.
    """

    def __init__(self, label: str, model: nn.Module, steps: int) -> None:
        """For a training of `steps` steps."""
        self.label, self.model = label, model
        # Not Adam: its first step is the gradient's sign, so that rounding of a tiny one shows in full.
        self.optimizer = torch.optim.SGD(
            model.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        rise = max(1, steps // 4)  # then straight down to 0
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / rise, 1 - step / steps)
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.accuracy: list[float] = []
        self.memory = 0

    def step(self, loss_of: Loss, batch: Samples, seed: int) -> None:
        """Forward, backward and update; `seed` draws the dropout masks."""
        self.model.train()
        torch.manual_seed(seed)
        _synchronize(batch.inputs)
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss = loss_of(self.model(batch.inputs), batch.targets)
        loss.backward()
        self.optimizer.step()
        _synchronize(batch.inputs)
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(loss.item())
        self.schedule.step()

    def quartiles(self) -> tuple[float, float, float]:
        """Of the seconds of a step, the middle one their median; without the warm-up if others follow."""
        seconds = self.seconds[WARM_UP:] or self.seconds
        low, middle, high = statistics.quantiles(seconds * (1 + (len(seconds) == 1)), n=4, method="inclusive")
        return low, middle, high

    def weights(self) -> list[Tensor]:
        """Copies of the parameters, in float64."""
        return [p.detach().to(torch.float64, copy=True) for p in self.model.parameters()]


@dataclass
class Differences:
    """Largest absolute differences of a weight.

    Attributes:
        first_step: between the two models after the first step.
        written_error: between the network as written and the same in float64 after the first step.
        swapped_error: between the swapped network and the one as written in float64, likewise.
        change: that the first step itself made.
        last_step: between the two models after the last step.
    """

    first_step: float
    written_error: float
    swapped_error: float
    change: float
    last_step: float


@dataclass
class Result:
    """What training two models showed."""

    epochs: int
    memory_label: str
    written: Side
    swapped: Side
    differences: Differences
    served: Served = field(default_factory=Counter)
    not_served: dict[str, None] = field(default_factory=dict)
    """Reasons why kernels of ours for this device did not serve a call; an ordered set."""


def train(
    task: Task,
    data: tuple[Samples, Samples],
    written: nn.Module,
    swapped: nn.Module,
    *,
    epochs: int,
    steps: int,
    batch_size: int,
    seed: int,
) -> Result:
    """Train a network as written and its swapped copy. Their steps take turns, batch by batch.

    Args:
        task: gives the loss.
        data: samples to train on and held-out ones, on the models' device.
        written: the network as written.
        swapped: a swapped copy of it.
        epochs: how often to shuffle the samples and go through them.
        steps: batches of an epoch.
        batch_size: samples in a batch.
        seed: of the order of samples and of the dropout masks.
    """
    from tqdm import tqdm

    samples, held_out = data
    sides = (
        Side("as written", written, epochs * steps),
        Side("nnfast", swapped, epochs * steps),
    )
    order = torch.Generator().manual_seed(seed)
    result: Result | None = None
    with tqdm(total=epochs * steps, unit="step", disable=None, dynamic_ncols=True) as bar:
        for epoch in range(epochs):
            bar.set_description(f"epoch {epoch + 1}/{epochs}")
            shuffled = torch.randperm(len(samples), generator=order)
            for step in range(steps):
                batch = samples[shuffled[step * batch_size : (step + 1) * batch_size]]
                step_seed = seed + len(sides[0].losses)
                if result is None:
                    result = _begin(task, epochs, steps, *sides, batch, step_seed)
                else:
                    for side in sides if step % 2 else reversed(sides):
                        side.step(task.loss, batch, step_seed)
                bar.set_postfix_str(
                    "; ".join(f"{s.label}: loss {s.losses[-1]:.3f}" for s in sides), refresh=False
                )
                bar.update()
            assert result is not None
            with _watch(swapped, "evaluation", result):
                for side in sides:
                    side.accuracy.append(_accuracy(side.model, held_out))
    assert result is not None
    result.differences.last_step = _difference(*(side.weights() for side in sides))
    return result


def _begin(
    task: Task, epochs: int, steps: int, written: Side, swapped: Side, batch: Samples, seed: int
) -> Result:
    """The first step of both, watched; beside them that of the network as written in float64."""
    for side in (written, swapped):
        side.memory = step_memory(copy.deepcopy(side.model), task.loss, batch)
    exact = Side("float64", copy.deepcopy(written.model).double(), epochs * steps)
    exact.step(task.loss, Samples(batch.inputs.double(), batch.targets), seed)
    before = written.weights()
    label = "peak memory" if batch.inputs.is_cuda else "kept for backward"
    result = Result(epochs, label, written, swapped, Differences(0, 0, 0, 0, 0))
    written.step(task.loss, batch, seed)
    with _watch(swapped.model, "training step", result):
        swapped.step(task.loss, batch, seed)
    w, s, e = written.weights(), swapped.weights(), exact.weights()
    result.differences = Differences(
        first_step=_difference(w, s),
        written_error=_difference(w, e),
        swapped_error=_difference(s, e),
        change=_difference(before, w),
        last_step=_difference(w, s),
    )
    return result


def _difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def _accuracy(model: nn.Module, samples: Samples, batch_size: int = 500) -> float:
    """Share of samples whose largest output is their target's."""
    model.eval()
    right = 0
    with torch.no_grad():
        for begin in range(0, len(samples), batch_size):
            batch = samples[begin : begin + batch_size]
            right += int((model(batch.inputs).argmax(1) == batch.targets).sum())
    return right / len(samples)


def step_memory(model: nn.Module, loss: Loss, batch: Samples) -> int:
    """Bytes of a step: on CUDA its peak beyond what was there before; on CPU what is kept for backward.

    What is kept is counted once for each storage; parameters are left out. The step changes the model.
    """
    model.train()
    if batch.inputs.is_cuda:
        peak = 0
        for _ in range(2):  # the first one also pays for the libraries' workspaces
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats(batch.inputs.device)
            before = torch.cuda.memory_allocated(batch.inputs.device)
            loss(model(batch.inputs), batch.targets).backward()
            peak = torch.cuda.max_memory_allocated(batch.inputs.device) - before
        return peak
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        total = loss(model(batch.inputs), batch.targets)  # alive, so no storage takes another's place
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del total
    return sum(kept.values())


@contextmanager
def _watch(model: nn.Module, when: str, result: Result) -> Iterator[None]:
    """Note who serves every call of nnfast's modules and every unit of their chains, once in a `when`."""
    if any(key[0] == when for key in result.served):
        yield
        return

    def note(x: Tensor, found: Explanation) -> None:
        size = describe((x,), {}).strip("()")
        result.served[when, found.op, size, found.backend or "none"] += 1
        ours = ("cuda", "triton") if x.is_cuda else ("cpu",)
        if found.backend not in (*ours, "folded"):
            for name in ours:
                for reason in found.reasons.get(name, []):
                    result.not_served[f"{found.op} not by {name}: {reason}"] = None

    def watched(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: nn.Module, *args: Any) -> Any:
            note(args[0], explain(self if self.nnfast_op == "attention" else type(self), *args))
            return forward(self, *args)

        return run

    # Chains and blocks tell of their units themselves. Of the classes, not by hooks: these break chains up.
    operations = ("attention", "silu", "mish", "softmax_focal_loss", "sigmoid_focal_loss")
    classes = {type(m) for m in model.modules() if getattr(m, "nnfast_op", "") in operations}
    replay.observers.append(note)
    with ExitStack() as patches:
        patches.callback(replay.observers.remove, note)
        for patch in [mock.patch.object(cls, "forward", watched(cls.forward)) for cls in classes]:
            patches.enter_context(patch)
        yield


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
