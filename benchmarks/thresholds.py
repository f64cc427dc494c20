"""From how many elements each backend beats torch's own here: `python -m benchmarks.thresholds [NAME ...]`.

Prints, beside the thresholds that nnfast ships, the least power of two from which a backend is never slower
in any dtype and shape, with and without autograd, and the ratios behind it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import nnfast
from benchmarks.runner import both_ways, compare, forced, rotation
from nnfast.core import product, tuning
from nnfast.core.op import OPS
from tests.ops import TABLE, Case, class_targets, soft_targets

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CLASSES = (2, 10, 100, 1000, 32000)

Measured = Callable[[Tensor], Tensor]


def softmax(x: Tensor) -> Measured:
    """Softmax focal loss of x's targets."""
    targets = class_targets(x)
    return lambda x: nnfast.functional.softmax_focal_loss(x, targets)


def sigmoid(x: Tensor) -> Measured:
    """Sigmoid focal loss of x's targets."""
    targets = soft_targets(x)
    return lambda x: nnfast.functional.sigmoid_focal_loss(x, targets, reduction="sum")


PREPARED: dict[str, Callable[[Tensor], Measured]] = {
    "softmax_focal_loss": softmax,
    "sigmoid_focal_loss": sigmoid,
}
"""What takes more than x, with that made before it is timed; a linear layer's loss goes by the softmax's."""


def shapes(case: Case, size: int) -> list[tuple[int, ...]]:
    """The shapes of a number of elements that are measured; rows x classes where that matters."""
    if case.name == "softmax_focal_loss":
        return [(size // classes, classes) for classes in CLASSES if size >= classes]
    return [(size,)]


def ratios(case: Case, backend: str, grad: bool, sizes: list[int], device: str) -> dict[int, float]:
    """Of each size, torch's time over the backend's, in the dtype and shape where that is least."""
    found = {}
    for size in sizes:
        each = []
        for shape in shapes(case, size):
            for dtype in DTYPES:
                x = torch.randn(shape, device=device).to(dtype).requires_grad_(grad)
                function = PREPARED[case.name](x) if case.name in PREPARED else case.ours
                contenders = {name: forced(function, name) for name in (backend, "aten")}
                inputs = rotation(lambda x=x: torch.randn_like(x), 2 * x.nbytes, device)
                if grad:
                    contenders = {name: both_ways(run) for name, run in contenders.items()}
                    inputs = [(i.requires_grad_(), torch.randn_like(function(i))) for i in inputs]
                times = compare(contenders, inputs, device, 0.1)
                each.append(times["aten"] / times[backend])
        found[size] = min(each)
    return found


def crossover(found: dict[int, float]) -> int | None:
    """The least size from which on every ratio is at least 1."""
    slower = [size for size, ratio in found.items() if ratio < 1]
    faster = [size for size in found if size > max(slower, default=0)]
    return min(faster, default=None)


PLANES = ((512, 7), (256, 14), (64, 56))
"""Channels, and height and width, of what batch norms are measured with."""


def norm_ratio(
    backend: str,
    shape: tuple[int, ...],
    layout: torch.memory_format,
    dtype: torch.dtype,
    mode: str,
    plain: bool,
) -> float:
    """torch's time over the backend's; plain: alone, else of an activation with and without a residual."""
    grad = mode == "autograd"
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def image() -> Tensor:
        x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
        return x.requires_grad_(grad)

    parameters = [torch.ones(shape[1], device=device, dtype=dtype, requires_grad=grad) for _ in range(2)]
    running = [torch.ones(shape[1], device=device, dtype=dtype) for _ in range(2)]
    found = []
    for act, with_residual in [("identity", False)] if plain else [("relu", False), ("relu", True)]:

        def step(inputs: tuple[Tensor, Tensor, Tensor], act: str = act, with_residual: bool = with_residual):
            x, residual, upstream = inputs
            y = nnfast.functional.batch_norm_act(
                x,
                *running,
                *parameters,
                mode != "inference",
                act=act,
                residual=residual if with_residual else None,
            )
            wanted = [x, *parameters, *[residual] * with_residual]
            return torch.autograd.grad(y, wanted, upstream) if grad else y

        contenders = {name: forced(step, name) for name in (backend, "aten")}
        inputs = rotation(lambda: (image(), image(), image().detach()), 9 * image().nbytes, device)
        times = compare(contenders, inputs, device, 0.1)
        found.append(times["aten"] / times[backend])
    return min(found)


def batch_norms(backend: str, sizes: list[int]) -> None:
    """Print from where on a backend's batch norm pays, for each row of its table of thresholds."""
    layouts = torch.contiguous_format, torch.channels_last
    for mode in ("inference", "statistics", "autograd"):
        for layout, plain in itertools.product(layouts, (False, True)):
            innermost = layout is torch.channels_last
            shipped = tuning.NORM_THRESHOLDS.get((backend, mode, innermost))
            what = "alone" if plain else "with an activation"
            print(
                f"batch_norm_act {backend} {mode} {str(layout).removeprefix('torch.')} {what} "
                f"(shipped: {shipped})"
            )
            for channels, side in PLANES:
                for dtype in DTYPES:
                    found = {}
                    for size in sizes:
                        images = size // (channels * side * side)
                        if images:
                            shape = (images, channels, side, side)
                            found[size] = norm_ratio(backend, shape, layout, dtype, mode, plain)
                    ratios = "  ".join(f"2^{n.bit_length() - 1}: {r:.2f}x" for n, r in found.items())
                    name = str(dtype).removeprefix("torch.")
                    print(f"  {channels} at {side}x{side} {name}: {crossover(found)}  {ratios}", flush=True)


def linears(rows: list[int]) -> None:
    """Print from how many multiplications a thread on a linear layer's products pay, where they are ours."""
    if missing := product.missing():
        print(f"linear: torch's; {missing}")
        return
    shipped, threads = tuning.PRODUCT, torch.get_num_threads()
    tuning.PRODUCT = tuning.PRODUCT_ROWS = 0

    def step(layer: Callable[[Tensor, Tensor], Tensor]) -> Callable[[tuple[Tensor, ...]], object]:
        def run(inputs: tuple[Tensor, ...]) -> object:
            x, weight, *upstream = inputs
            y = layer(x, weight)
            return torch.autograd.grad(y, (x, weight), upstream) if upstream else y

        return run

    contenders = {"ours": step(product.linear), "torch": step(F.linear)}
    for features, made in ((64, 64), (512, 512), (768, 3072)):
        for grad in (False, True):
            found = {}
            for count in rows:
                x, weight = (torch.randn(n, features, requires_grad=grad) for n in (count, made))
                inputs = (x, weight, *[torch.randn(count, made)] * grad)
                times = compare(contenders, [inputs], "cpu", 0.3)
                found[count * features * made // threads] = times["torch"] / times["ours"]
            mode = "with autograd" if grad else "without"
            print(f"linear {features} to {made} {mode}: {crossover(found)} (shipped: {shipped})")
            ratios = "  ".join(f"{n / 2**20:.3g}M: {ratio:.2f}x" for n, ratio in found.items())
            print(f"  {ratios}", flush=True)


def main() -> None:
    """Measure and print them all, or those that are named."""
    torch.set_num_threads(2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = sys.argv[1:] or [
        *[c.name for c in TABLE if c.family == "activation" or c.name in PREPARED],
        "batch_norm_act",
        "linear",
    ]
    if "linear" in names:
        linears([1 << n for n in range(4, 13)])
    if "batch_norm_act" in names:
        for backend in OPS["batch_norm_act"].backends:
            if backend.name not in ("aten", "reference") and not backend.why_not(
                *OPS["batch_norm_act"].example(device)
            ):
                batch_norms(backend.name, [1 << n for n in range(16, 23)])
        names = [name for name in names if name != "batch_norm_act"]
    for case in (c for c in TABLE if c.name in names):
        sizes = [1 << n for n in (range(12, 31, 2) if device == "cuda" else range(8, 25))]
        if case.name in PREPARED and device == "cpu":
            sizes = [1 << n for n in range(6, 19, 2)]
        args = OPS[case.name].example(device)
        for backend in OPS[case.name].backends:
            if backend.name in ("aten", "reference") or backend.why_not(*args):
                continue
            for grad in (False, True):
                found = ratios(case, backend.name, grad, sizes, device)
                shipped = tuning.threshold(case.name, backend.name, grad)
                mode = "with autograd" if grad else "without"
                print(f"{case.name} {backend.name} {mode}: {crossover(found)} (shipped: {shipped})")
                print(
                    "  " + "  ".join(f"2^{n.bit_length() - 1}: {r:.2f}x" for n, r in found.items()),
                    flush=True,
                )


if __name__ == "__main__":
    main()
