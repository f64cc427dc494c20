"""Train a small network on real images as written and swapped by nnfast, and compare the two.

Both start from the same weights and see the same batches and dropout masks. Their steps take turns, so that
whatever else the machine does disturbs both alike. Shows losses, held-out accuracy, time, memory and which
backend served each operation, and writes a plot to a PNG. Then some classes are made rare, and what cross
entropy and focal loss find of each class is shown.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

import nnfast

from . import CommandError, _imbalance
from ._tasks import TASKS, Task
from ._text import facts, table
from ._training import Result, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where, how long, how."""
    add, natural = parser.add_argument, _whole(1)
    add("--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--epochs", type=natural, default=5, metavar="N", help="default: 5")
    add("--steps", type=natural, metavar="N", help="most steps an epoch (default: as many as there are)")
    add("--batch-size", type=natural, default=64, metavar="N", help="default: 64")
    add(
        "--seed", type=_whole(0), default=0, metavar="N", help="of weights, order, dropout masks (default: 0)"
    )
    add("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default: ./demo-output")


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"got {text!r}; it needs a whole number of at least {least}")
        return int(text)

    return whole


def _device(text: str) -> torch.device:
    count = torch.cuda.device_count()
    if text == "auto":
        return torch.device("cuda" if count else "cpu")
    kind, colon, number = text.partition(":")
    if text != "cpu" and (kind != "cuda" or number.isdecimal() != bool(colon)):
        raise argparse.ArgumentTypeError(f"got {text!r}; it needs auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= count:
        raise argparse.ArgumentTypeError(f"got {text!r}; torch {torch.__version__} sees {count} CUDA devices")
    return torch.device(text)


def run(args: argparse.Namespace) -> int:
    """Train every task both ways and show what came of it."""
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"needs {' and '.join(missing)}; install them, or nnfast with its extra `bench`")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output: {args.output} cannot be made a directory: {error.strerror}") from None
    for task in TASKS:
        _show(task, args)
    _imbalance.show(args.device, args.epochs, args.steps, args.batch_size, args.seed)
    return 0


def _show(task: Task, args: argparse.Namespace) -> None:
    from ._plot import plot

    device: torch.device = args.device
    samples, held_out = task.data()
    if args.batch_size > len(samples):
        raise CommandError(
            f"--batch-size: got {args.batch_size}; there are {len(samples)} samples to train on"
        )
    steps = min(len(samples) // args.batch_size, args.steps or len(samples))
    torch.manual_seed(args.seed)
    network = task.network().to(device)
    swapped = copy.deepcopy(network)
    report = nnfast.swap(swapped)
    if not report.replaced:
        raise CommandError(
            f"there is nothing to compare: nnfast.swap replaced no module of {task.title}\n{report}"
        )
    machine = _machine(device)
    heading = [
        ("data", f"{task.title}, {len(samples):,} images to train on and {len(held_out):,} held out"),
        ("network", f"{task.description}, {sum(p.numel() for p in network.parameters()):,} parameters"),
        (
            "training",
            f"{args.epochs} epochs of {steps} steps with {args.batch_size} images, seed {args.seed}",
        ),
        ("device", machine),
    ]
    print(f"{facts(heading)}\n\n{report}\n", flush=True)
    data = samples.to(device), held_out.to(device)
    try:
        result = train(
            task,
            data,
            network,
            swapped,
            epochs=args.epochs,
            steps=steps,
            batch_size=args.batch_size,
            seed=args.seed,
        )
    except nnfast.BackendError as error:
        raise CommandError(str(error)) from None
    path = args.output.absolute() / f"{task.name}.png"
    plot(result, task.title, machine, path)
    print(
        "\n\n".join(
            [_epochs(result), _costs(result), _differences(result), _backends(result), f"Plot: {path}"]
        )
    )


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _epochs(result: Result) -> str:
    """Loss and accuracy of both after each epoch."""
    sides = result.written, result.swapped
    steps = len(sides[0].losses) // result.epochs
    rows = []
    for epoch in range(result.epochs):
        losses = [statistics.fmean(side.losses[epoch * steps : (epoch + 1) * steps]) for side in sides]
        rows.append(
            [
                str(epoch + 1),
                *(f"{x:.4f}" for x in losses),
                *(f"{side.accuracy[epoch]:.2%}" for side in sides),
            ]
        )
    labels = [side.label for side in sides]
    header = ["epoch", *(f"loss, {x}" for x in labels), *(f"accuracy, {x}" for x in labels)]
    return "Training loss, and accuracy on the held-out images\n" + table(header, rows)


def _costs(result: Result) -> str:
    """Time and memory of a step of both."""
    sides = result.written, result.swapped
    quartiles = [side.quartiles() for side in sides]
    sizes = [side.memory / 2**20 for side in sides]
    rows = [
        [
            "time, median",
            *(f"{q[1] * 1e3:.1f} ms" for q in quartiles),
            f"{quartiles[0][1] / quartiles[1][1]:.2f}x",
        ],
        ["time, middle half", *(f"{q[0] * 1e3:.1f}-{q[2] * 1e3:.1f} ms" for q in quartiles), ""],
        [result.memory_label, *(f"{size:.1f} MiB" for size in sizes), f"{sizes[0] / sizes[1]:.2f}x"],
    ]
    return "A training step\n" + table(["", *(side.label for side in sides), "ratio"], rows)


def _differences(result: Result) -> str:
    """How far the weights of both are apart, and from the truth."""
    found = result.differences
    rows: list[tuple[str, str, float]] = [
        ("first", "as written and nnfast", found.first_step),
        ("", "as written and the same in float64", found.written_error),
        ("", "nnfast and the same in float64", found.swapped_error),
        ("", "before and after the step", found.change),
        ("last", "as written and nnfast", found.last_step),
    ]
    text = [[when, what, f"{difference:.1e}"] for when, what, difference in rows]
    return "Weights: largest difference\n" + table(["after step", "between", ""], text, left=2)


def _backends(result: Result) -> str:
    rows = [[*key, str(count)] for key, count in result.served.items()]
    lines = [
        "Who served nnfast's operations",
        table(["in a", "operation", "input", "backend", "calls"], rows, left=4),
    ]
    return "\n".join([*lines, *(f"  {reason}" for reason in result.not_served)])
