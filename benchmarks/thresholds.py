"""From how many elements each backend beats torch's own kernel here: `python -m benchmarks.thresholds`.

Prints, beside the thresholds that nnfast ships, the least power of two from which a backend is never slower
in any dtype, with and without autograd, and the ratios behind it.
"""

from __future__ import annotations

import torch

from benchmarks.runner import both_ways, compare, forced, rotation
from nnfast.core import tuning
from nnfast.core.op import OPS
from tests.ops import TABLE, Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def ratios(case: Case, backend: str, grad: bool, sizes: list[int], device: str) -> dict[int, float]:
    """Of each size, torch's time over the backend's, in the dtype where that is least."""
    found = {}
    for size in sizes:
        of_dtypes = []
        for dtype in DTYPES:
            x = torch.randn(size, device=device).to(dtype).requires_grad_(grad)
            contenders = {"ours": forced(case.ours, backend), "torch": case.torchs}
            inputs = rotation(lambda x=x: torch.randn_like(x), 2 * x.nbytes, device)
            if grad:
                contenders = {name: both_ways(function) for name, function in contenders.items()}
                inputs = [(i.requires_grad_(), torch.randn_like(i)) for i in inputs]
            times = compare(contenders, inputs, device, 0.15)
            of_dtypes.append(times["torch"] / times["ours"])
        found[size] = min(of_dtypes)
    return found


def crossover(found: dict[int, float]) -> int | None:
    """The least size from which on every ratio is at least 1."""
    slower = [size for size, ratio in found.items() if ratio < 1]
    faster = [size for size in found if size > max(slower, default=0)]
    return min(faster, default=None)


def main() -> None:
    """Measure and print them all."""
    torch.set_num_threads(2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [1 << n for n in (range(12, 31, 2) if device == "cuda" else range(8, 25))]
    for case in (c for c in TABLE if c.family == "activation"):
        x = torch.zeros(1, device=device)
        for backend in OPS[case.name].backends:
            if backend.name in ("aten", "reference") or backend.why_not(x):
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
