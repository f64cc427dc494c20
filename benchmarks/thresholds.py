"""From how many elements each backend beats torch's own here: `python -m benchmarks.thresholds [NAME ...]`.

Prints, beside the thresholds that nnfast ships, the least power of two from which a backend is never slower
in any dtype and shape, with and without autograd, and the ratios behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import nnfast
from benchmarks.runner import both_ways, compare, forced, rotation
from nnfast.core import tuning
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


def main() -> None:
    """Measure and print them all, or those that are named."""
    torch.set_num_threads(2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = sys.argv[1:] or [c.name for c in TABLE if c.family == "activation" or c.name in PREPARED]
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
