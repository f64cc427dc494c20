"""Every kernel of ours on small inputs, to be run under compute-sanitizer: `python -m benchmarks.sanitize`.

Vector and scalar paths, tails, misaligned views, in place, forward and backward, in each dtype; rows of every
length that has a path of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.testing import assert_close

import nnfast
from nnfast.core.op import OPS, triton_why_not
from tests.attention.calls import CALLS, SMALL, Shape, call, gradients, heads, ours, randn, truth
from tests.ops import DTYPES, TABLE, Case

SLICES = (slice(0, 4096), slice(0, 5003), slice(1, 4098), slice(3, 20), slice(0, 1))
"""Whole blocks; blocks and a tail; misaligned; less than a block; one element."""
SHAPES = ((37, 10), (9, 64), (5, 100), (3, 1000), (2, 5003), (1, 40000), (2, 7, 33), (2, 40, 5))
"""Rows x classes, and rows that lie side by side."""
PICTURES = ((2, 16, 9, 7), (1, 65, 5, 6), (3, 3, 17, 12), (2, 40, 8, 8), (1, 1, 1, 1))
"""Images x channels x pixels, for convolutions."""
IMAGES = ((130, 33), (7, 11, 13), (5, 6, 9, 7), (9, 65, 8), (2, 3, 5003))
"""Images x channels, with pixels behind the channels or none."""

ATTENTION = (
    SMALL,
    Shape(1, 4, 2, 130, 190, 64, 64),
    Shape(1, 2, 2, 65, 1, 5, 24),
    Shape(1, 1, 1, 1, 300, 256, 256),
)
"""Less than a tile, several, odd heads and one key, large heads and one query."""


def inputs(case: Case, dtype: torch.dtype, device: str) -> Iterator[Tensor]:
    """What a case runs on."""
    if case.family == "activation":
        buffer = torch.linspace(-30, 30, 5003, device=device).to(dtype)
        yield from (buffer[where] for where in SLICES)
    else:
        shapes = {"conv_bn_act": IMAGES, "convolution": PICTURES}.get(case.family, SHAPES)
        for shape in shapes:
            buffer = torch.linspace(-9, 8, 1 + torch.Size(shape).numel(), device=device).sin().to(dtype) * 4
            yield buffer[:-1].reshape(shape)
            yield buffer[1:].reshape(shape)


def close(result: Tensor, truth: Tensor) -> None:
    """As near as a sanitizer's run has to show: the tests measure errors.

    A truth may be zero throughout, as the gradient of queries that see one key: terms of order 1 cancel.
    """
    result, truth = result.detach(), truth.detach()
    part = {2: 2e-2, 4: 1e-4, 8: 1e-9}[result.itemsize]
    assert_close(result.double(), truth, rtol=part, atol=part * max(float(truth.abs().max()), 0.1))


def check(case: Case, x: Tensor) -> None:
    """Forward, backward and, where there is such a thing, in place."""
    x = x.detach().requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, truth = case.ours(x), case.truth(exact)
    close(y, truth)
    upstream = torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape).cos()
    pairs = ((y, x), (truth, exact))
    gradients = [torch.autograd.grad(out, given, upstream.to(out))[0] for out, given in pairs]
    if (
        case.family not in ("conv_bn_act", "convolution") or x.itemsize > 2
    ):  # the residual's rounding moves halves across relu's kink
        close(*gradients)
    if "inplace" in case.traits:
        close(case.ours(x.detach().clone(), inplace=True), truth)


def attention(device: str) -> int:
    """Attention's Triton kernels, forward and backward, through every kind of call; says how many."""
    if triton_why_not(device):
        return 0
    for shape in ATTENTION:
        for name in CALLS:
            for dtype in DTYPES:
                q, k, v = heads(shape, dtype, device)
                options = call(name, shape, dtype, device)
                wide = {
                    n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
                    for n, x in options.items()
                }
                exact = [x.double() for x in (q, k, v)]
                expected = truth(*exact, **wide)[0]
                upper = randn(*expected.shape, seed=9).to(q)
                with nnfast.backend("triton"):
                    close(ours(q, k, v, **options), expected)
                    found = gradients(ours, q, k, v, options, upper)
                for of_ours, of_truth in zip(
                    found, gradients(truth, *exact, wide, upper.double()), strict=True
                ):
                    close(of_ours, of_truth)
    return len(ATTENTION) * len(CALLS) * len(DTYPES)


def main() -> None:
    """Run them all, check each result, and say how many."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = 0
    for case in (c for c in TABLE if c.operators):
        for dtype in DTYPES:
            args = OPS[case.name].example(device)
            served = [b.name for b in OPS[case.name].backends if not b.why_not(*args)]
            for backend in sorted(set(served) - {"aten", "reference"}):
                for x in inputs(case, dtype, device):
                    with nnfast.backend(backend):
                        check(case, x)
                    count += 1
    count += attention(device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} runs of our kernels on {device}, all results right")


if __name__ == "__main__":
    main()
