"""Every kernel of ours on small inputs, to be run under compute-sanitizer: `python -m benchmarks.sanitize`.

Vector and scalar paths, tails, misaligned views, in place, forward and backward, in each dtype.
"""

from __future__ import annotations

import torch
from torch.testing import assert_close

import nnfast
from nnfast.core.op import OPS
from tests.ops import DTYPES, TABLE

SLICES = (slice(0, 4096), slice(0, 5003), slice(1, 4098), slice(3, 20), slice(0, 1))
"""Whole blocks; blocks and a tail; misaligned; less than a block; one element."""


def main() -> None:
    """Run them all, check each result, and say how many."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = 0
    for case in (c for c in TABLE if c.family == "activation"):
        for dtype in DTYPES:
            buffer = torch.linspace(-30, 30, 5003, device=device).to(dtype)
            served = [b.name for b in OPS[case.name].backends if not b.why_not(buffer)]
            for backend in sorted(set(served) - {"aten", "reference"}):
                for where in SLICES:
                    with nnfast.backend(backend):
                        x = buffer[where].detach().requires_grad_()
                        y = case.ours(x)
                        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
                        changed = case.ours(buffer.clone()[where], inplace=True)
                    expected = case.torchs(x)
                    assert_close(y, expected)
                    assert_close(changed, expected.detach())
                    assert_close(grad, torch.autograd.grad(expected, x, torch.ones_like(y))[0])
                    count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} runs of our kernels on {device}, all results right")


if __name__ == "__main__":
    main()
