"""Sums and means of softmax focal loss within the operator, as the CPU's kernels have them."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import nnfast
from nnfast.core import extension
from nnfast.core.operator import compute_dtype
from nnfast.focal_loss import op, reference

pytestmark = pytest.mark.skipif(
    bool(extension.why_not("softmax_focal_loss_total", "CPU")), reason="built without CPU kernels"
)
# a tile and less, whole packs and what is left, a row longer than a pack, long rows, strided ones
SHAPES = [
    (1, 1),
    (7, 2),
    (64, 3),
    (67, 10),
    (130, 16),
    (65, 40),
    (33, 63),
    (5, 64),
    (40, 1000),
    (2, 20_003),
    (3, 11, 50),
]


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(sum(shape))
    x = (torch.randn(shape) * 4).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    if target.numel() > 1:
        target.flatten()[-1] = -100
    return x, target, torch.linspace(0.5, 2, shape[1], dtype=compute_dtype(x))


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_formula(shape, dtype, gamma, mean):
    x, target, weight = sample(shape, dtype)
    loss, denominator, slopes = op._total(x, target, weight, weight if mean else None, gamma, -100, mean)
    rows, targets = op._deep(x.double(), target)
    truth = reference.softmax_focal_loss(rows, targets, weight.double(), gamma, -100).sum()
    count = weight.double()[target[target != -100]].sum() if mean else torch.ones((), dtype=torch.float64)
    eps = torch.finfo(loss.dtype).eps
    fast = 2e-5 if dtype.itemsize == 2 else 0  # half types take a shorter polynomial
    assert_close(denominator.double(), count, rtol=4 * eps, atol=0)
    assert_close(loss.double(), truth / count, rtol=16 * eps + fast, atol=eps)

    grad = torch.tensor(0.75, dtype=loss.dtype)
    result = op._total_backward(grad, denominator, x, target, slopes, -100)
    upstream = (0.75 / count).expand(targets.shape)
    expected = reference.softmax_focal_loss_backward(upstream, rows, targets, weight.double(), gamma, -100)
    expected = expected.reshape(x.shape)
    assert_close(
        result.double(),
        expected,
        rtol=torch.finfo(dtype).eps + 64 * eps + fast,
        atol=8 * eps,
    )
    if op._worth_gradient(x):
        both = op._total_and_gradient(x, target, weight, weight if mean else None, gamma, -100, mean, 0.75)
        assert_close(both[0].double(), 0.75 * truth / count, rtol=16 * eps, atol=eps)
        assert_close(both[1].double(), expected, rtol=64 * eps, atol=8 * eps)


@pytest.mark.parametrize("shape", [(67, 10), (40, 1000), (3, 11, 50)], ids=str)
def test_opcheck(shape):
    x, target, weight = sample(shape, torch.float32)
    args = x, target, None, weight, 1.5, -100, True
    torch.library.opcheck(op._total, args)
    _, denominator, slopes = op._total(*args)
    torch.library.opcheck(op._total_backward, (torch.ones(()), denominator, x, target, slopes, -100))
    if op._worth_gradient(x):
        torch.library.opcheck(op._total_and_gradient, (*args, 0.5))


@pytest.mark.parametrize("shape", [(100_003, 10), (3001, 1000), (31, 11, 503)], ids=str)
def test_as_many_threads_as_there_are(shape):
    """A result depends neither on the run nor on the number of threads."""
    x, target, weight = sample(shape, torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            found.append(op._total(x, target, None, weight, 2.0, -100, True))
            if op._worth_gradient(x):
                found[-1] += op._total_and_gradient(x, target, None, weight, 2.0, -100, True, 0.5)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def long_rows(alpha: float = 0.25, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits, a row of them without a target, and their loss, whose gradient was made along with it."""
    x, target, _ = sample((40, 1000), torch.float32)
    loss = nnfast.functional.softmax_focal_loss(x.requires_grad_(), target, alpha, **options)
    assert loss.grad_fn.name() == "_SoftmaxTotalAndGradientBackward"
    return x, loss


def formula(x: Tensor, target: Tensor, alpha: float, upstream: float) -> Tensor:
    exact = x.detach().double().requires_grad_()
    ce = F.cross_entropy(exact, target, reduction="none")
    loss = (alpha * (1 - torch.exp(-ce)) ** 2 * ce).sum() / (target != -100).sum()
    return torch.autograd.grad(loss, exact, torch.tensor(upstream, dtype=torch.float64))[0]


@pytest.mark.parametrize("alpha", [1, 0.25])
@pytest.mark.parametrize("upstream", [1.0, -0.5, 0.0])
def test_gradient_made_in_forward(upstream, alpha):
    x, loss = long_rows(alpha)
    target = sample((40, 1000), torch.float32)[1]
    expected = formula(x, target, alpha, upstream)
    grad = torch.tensor(upstream)
    (first,) = torch.autograd.grad(loss, x, grad, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, x, 3 * grad, retain_graph=True)
    (third,) = torch.autograd.grad(loss, x, grad, create_graph=True)
    for found, scale in ((first, 1), (second, 3), (third.detach(), 1)):
        assert_close(found.double(), scale * expected, rtol=1e-5, atol=1e-9)
    assert third.requires_grad
    assert torch.equal(first, kept)  # what was given away is not written to again


@pytest.mark.parametrize("upstream", [math.inf, math.nan])
def test_upstream_is_not_finite(upstream):
    x, loss = long_rows()
    loss.backward(torch.tensor(upstream))
    assert not x.grad[:-1].isfinite().any()
    assert not x.grad[-1].any()  # has no target


def test_logits_changed_before_backward():
    x, loss = long_rows()
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_again_without_its_graph():
    x, loss = long_rows()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert x.grad.isfinite().all()


def test_gradient_is_made_of_what_it_can_be():
    x, target, _ = sample((40, 1000), torch.float32)
    for bad, message in ((x.half(), "dtype Half"), (x[:, :63].contiguous(), "from 64 classes on")):
        with pytest.raises(RuntimeError, match=message):
            op._total_and_gradient(bad, target.clamp(max=62), None, None, 2.0, -100, True, 1.0)


@pytest.mark.parametrize("shape", [(9, 8), (3, 66)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_derivatives(reduction, shape):
    x, target, _ = sample(shape, torch.float64)
    x.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return nnfast.functional.softmax_focal_loss(x, target, 0.25, 1.5, reduction=reduction)

    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


def test_many_rows_lose_no_digits():
    """Losses of one size: a plain sum in float32 would be off by 1e-4 and more."""
    x = torch.zeros(1 << 20, 4)
    loss = nnfast.functional.softmax_focal_loss(x, torch.zeros(1 << 20, dtype=torch.long), gamma=0)
    assert_close(loss.double(), torch.tensor(4.0, dtype=torch.float64).log(), rtol=2e-7, atol=0)


def test_rows_without_a_target():
    x = torch.randn(40, 10, requires_grad=True)
    target = torch.full((40,), -100)
    loss = nnfast.functional.softmax_focal_loss(x, target)
    assert loss.isnan()  # as F.cross_entropy's
    assert not torch.autograd.grad(loss, x)[0].any()
    assert nnfast.functional.softmax_focal_loss(x, target, reduction="sum") == 0


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(67, 10), (40, 1000)], ids=str)
def test_no_class(shape, grad):
    x, target, _ = sample(shape, torch.float32)
    x.requires_grad_(grad)
    target[21] = shape[1]
    with pytest.raises(IndexError, match=rf"class {shape[1]} at index 21;"):
        nnfast.functional.softmax_focal_loss(x, target)
    target[21] = (1 << 32) + 1  # its lower half is a class
    with pytest.raises(IndexError, match=r"class 4294967297 at index 21;"):
        nnfast.functional.softmax_focal_loss(x, target)


def test_served_at_once_as_explained():
    """What is served before any check is valid, and what `explain` says the CPU's kernels serve."""
    x, target, _ = sample((67, 10), torch.float32)
    one, strided = torch.ones(10), x.t().contiguous().t()
    inputs = [x, x[:, :0], x[0], x[:0], x.unsqueeze(2), strided, x.bfloat16(), x.long(), nn.Parameter(x)]
    targets = [target, target.int(), target[:3], target.unsqueeze(1), torch.softmax(x, 1), target.numpy()]
    alphas, gammas = [1, 0.25, True, one, None], [2, 0.0, -1, math.inf, math.nan, "2"]
    kept = 0
    for args in itertools.product(inputs, targets, alphas, gammas, ["mean", "sum", "none", "all"]):
        if op._is_plain(*args):
            kept += 1
            *given, reduction = args
            assert op.SOFTMAX.explain(*given, reduction=reduction).backend == "cpu"
            with nnfast.backend("cpu"):  # which has every check made
                checked = nnfast.functional.softmax_focal_loss(*given, reduction=reduction)
            assert torch.equal(nnfast.functional.softmax_focal_loss(*given, reduction=reduction), checked)
    assert kept == 2 * 1 * 2 * 2 * 2
    with nnfast.backend("aten"):
        assert not op._is_plain(x, target, 1, 2, "mean")


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    here = f"{__file__}::test_against_formula"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here, "-k", "67 or 1000 or 63"]
    done = subprocess.run(
        command, env={**os.environ, "NNFAST_CPU_ISA": isa}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
