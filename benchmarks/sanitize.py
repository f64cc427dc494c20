"""Every kernel of ours on small inputs, to be run under compute-sanitizer: `python -m benchmarks.sanitize`.

Vector and scalar paths, tails, misaligned views, in place, forward and backward, in each dtype; rows of every
length that has a path of its own. What is wrong is named, and the rest runs on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

import nnfast
from nnfast.core.op import triton_why_not
from tests import interpreter
from tests.attention.calls import CALLS, SMALL, Shape, call, gradients, heads, ours, randn, truth
from tests.ops import DTYPES, TABLE, Case

SLICES = (slice(0, 4096), slice(0, 5003), slice(1, 4098), slice(3, 20), slice(0, 1))
"""Whole blocks; blocks and a tail; misaligned; less than a block; one element."""
SHAPES = {
    "focal_loss": ((37, 10), (3, 1000), (1, 40000), (2, 40, 5), (9, 64), (5, 100), (2, 5003), (2, 7, 33)),
    "conv_bn_act": ((130, 33), (5, 6, 9, 7), (9, 65, 8), (7, 11, 13), (2, 3, 5003)),
    "convolution": ((2, 16, 9, 7), (3, 3, 17, 12), (1, 65, 5, 6), (2, 40, 8, 8), (1, 1, 1, 1)),
    "attention": ((13, 24), (2, 3, 33, 64), (3, 65, 8), (300, 256)),
}
"""Rows x classes, and rows that lie side by side; images x channels, with pixels behind the channels or none;
images x channels x pixels; queries x head dim. What is quick takes the first ones."""
FIRST = {"focal_loss": 4, "conv_bn_act": 2, "convolution": 2, "attention": 2}

ATTENTION = (
    SMALL,
    Shape(1, 4, 2, 130, 190, 64, 64),
    Shape(1, 2, 2, 65, 1, 5, 24),
    Shape(1, 1, 1, 1, 300, 256, 256),
)
"""Less than a tile, several, odd heads and one key, large heads and one query."""
OURS = ("cuda", "triton", "cpu")
QUICK_CALLS = ("plain", "causal", "padding mask", "bias", "window", "all")

Run = tuple[str, Callable[[], None]]
"""What is run, in words, and the run, which raises if its result is wrong."""


def inputs(case: Case, dtype: torch.dtype, device: str, quick: bool) -> Iterator[Tensor]:
    """What a case runs on."""
    if case.family == "activation":
        buffer = torch.linspace(-30, 30, 5003).to(dtype).to(device)
        yield from (buffer[where] for where in SLICES)
        return
    few = FIRST[case.family] if dtype in (torch.float32, torch.bfloat16) else 1
    for shape in SHAPES[case.family][: few if quick else None]:
        buffer = (torch.linspace(-9, 8, 1 + torch.Size(shape).numel()).sin().to(dtype) * 4).to(device)
        yield buffer[:-1].reshape(shape)
        yield buffer[1:].reshape(shape)


def close(result: Tensor, truth: Tensor) -> None:
    """As near as a sanitizer's run has to show: the tests measure errors.

    A truth may be zero throughout, as the gradient of queries that see one key: terms of order 1 cancel.
    """
    result, truth = result.detach().cpu(), truth.detach()
    part = {2: 2e-2, 4: 1e-4, 8: 1e-9}[result.itemsize]
    assert_close(result.double(), truth, rtol=part, atol=part * max(float(truth.abs().max()), 0.1))


def check(case: Case, x: Tensor, backend: str) -> None:
    """Forward, backward and, where there is such a thing, in place.

    The truth is computed on the CPU: under a sanitizer each of torch's kernels would cost its share.
    """
    x = x.detach().requires_grad_()
    exact = x.detach().double().cpu().requires_grad_()
    truth = case.truth(exact)
    upstream = torch.linspace(-1, 1, truth.numel()).reshape(truth.shape).cos().to(x.dtype)
    with nnfast.backend(backend):
        y = case.ours(x)
        close(y, truth)
        found = torch.autograd.grad(y, x, upstream.to(x.device))[0]
        if (
            case.family not in ("conv_bn_act", "convolution") or x.itemsize > 2
        ):  # the residual's rounding moves halves across relu's kink
            close(found, torch.autograd.grad(truth, exact, upstream.double())[0])
        if "inplace" in case.traits:
            close(case.ours(x.detach().clone(), inplace=True), truth)


def of_table(case: Case, dtype: torch.dtype, device: str, quick: bool) -> Iterator[Run]:
    """A row of the table in each of our backends that serves it."""
    for backend in OURS:
        if case.takes(backend, dtype) and serves(case, backend, device):
            for x in inputs(case, dtype, device, quick):
                yield f"{case.label} {backend} {list(x.shape)} {dtype}", partial(check, case, x, backend)


def serves(case: Case, backend: str, device: str) -> bool:
    """Whether a backend says that it can; what goes wrong in it shows in the runs."""
    try:
        with nnfast.backend(backend):
            case.ours(case.example(torch.float32, device))
    except nnfast.BackendError:
        return False
    except Exception:
        return True
    return True


def check_call(shape: Shape, name: str, dtype: torch.dtype, device: str, turns: bool) -> None:
    """Attention, forward and backward; turns: with rotary embedding, in the kernels up to heads of 128."""
    q, k, v = heads(shape, dtype, device)
    options = call(name, shape, dtype, device)
    wide = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in options.items()}
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in wide.items()}
    exact = [x.double().cpu() for x in (q, k, v)]
    attend, expect = ours, truth
    if turns:
        turning = {"rotary_dim": shape.head // 2 * 2, "interleaved": dtype.itemsize > 2}
        rope = nnfast.RotaryEmbedding(shape.head, **turning)
        attend = partial(ours, rotary=deepcopy(rope).to(device, dtype))
        rope.double()

        def expect(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            return truth(*rope(q, k), v, **options)

    expected = expect(*exact, **wide)[0]
    upper = randn(*expected.shape, seed=9).to(dtype)
    with nnfast.backend("triton"):
        close(attend(q, k, v, **options), expected)
        found = gradients(attend, q, k, v, options, upper.to(device))
    for of_ours, of_truth in zip(found, gradients(expect, *exact, wide, upper.double()), strict=True):
        close(of_ours, of_truth)


def of_attention(shape: Shape, dtype: torch.dtype, device: str, quick: bool) -> Iterator[Run]:
    """Attention's Triton kernels through every kind of call; in quick, each way in the kernels once."""
    if triton_why_not(device):
        return
    short = ("all",) if dtype in (torch.bfloat16, torch.float64) else QUICK_CALLS
    for name in short if quick else CALLS:
        for turns in (False, True) if name in ("plain", "all") else (False,):
            what = f"{'rotary ' * turns}attention {name}, {shape} {dtype}"
            yield what, partial(check_call, shape, name, dtype, device, turns)


def jobs(device: str, quick: bool) -> list[Iterator[Run]]:
    """Everything, in parts that one process each can take: a shape or a row, in half of the types."""

    def in_types(runs: Callable[..., Iterator[Run]], what: Shape | Case) -> list[Iterator[Run]]:
        halves = (DTYPES[::2], DTYPES[1::2])
        return [chain(*(runs(what, dtype, device, quick) for dtype in half)) for half in halves]

    found = [in_types(of_attention, shape) for shape in ATTENTION[: 2 if quick else None]]
    found += [in_types(of_table, case) for case in TABLE if case.operators]
    return list(chain(*found))


def work(index: int, quick: bool) -> tuple[int, int]:
    """Do one of the jobs: how many runs, and how many of them failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not triton_why_not(device):
        interpreter.mend()
    began, count, failed, name = time.monotonic(), 0, 0, ""
    for name, run in jobs(device, quick)[index]:
        count += 1
        try:
            run()
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {' '.join(str(error).split())}"[:500])
        try:
            if device == "cuda":
                torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"FAILED {name}: the device is lost: {str(error).splitlines()[0]}", flush=True)
            return count, failed + 1
    if count:
        print(f"to {name}: {count} runs, {time.monotonic() - began:.0f} s", flush=True)
    return count, failed


def apart(index: int, quick: bool) -> tuple[int, int]:
    """`work` in a process of its own: a fault of the device is the end of all that a process does there."""
    command = [sys.executable, "-m", "benchmarks.sanitize", "--job", str(index), *["--quick"] * quick]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    *said, last = done.stdout.splitlines() or [""]
    print(*said, sep="\n", end="\n" * bool(said), flush=True)
    if done.returncode > 1 or done.returncode < 0 or not last.endswith("of our kernels"):
        print(f"FAILED job {index}: it ended with status {done.returncode}: {last}", flush=True)
        return 0, 1
    return int(last.split()[0]), sum(line.startswith("FAILED") for line in said)


def main() -> int:
    """Run them all, check each result, and say how many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="each way through the kernels once")
    parser.add_argument("--processes", type=int, default=0, help="share the jobs, and their compiling, out")
    parser.add_argument("--job", type=int, help="one of the jobs alone")
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared as such
    if arguments.job is not None:
        count, failed = work(arguments.job, arguments.quick)
        print(f"{count} runs of our kernels")
        return int(failed > 0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    todo = range(len(jobs(device, arguments.quick)))
    if arguments.processes:
        with ThreadPoolExecutor(arguments.processes) as pool:
            results = list(pool.map(partial(apart, quick=arguments.quick), todo))
    else:
        results = [work(index, arguments.quick) for index in todo]
    count, failed = (sum(column) for column in zip(*results, strict=True))
    print(f"{count} runs of our kernels on {device}, {f'{failed} FAILED' if failed else 'all results right'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
