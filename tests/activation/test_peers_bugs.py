"""Bugs that users of other libraries met, each as a test of ours, with its source."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import nnfast

pytestmark = pytest.mark.only("activation")


def test_mish_gradient_above_22_is_one(run, case):
    """attorch: the gradient of its Mish is NaN for x above 22.18."""
    if case.name != "mish":
        pytest.skip("a bug of Mish")
    x = torch.tensor([22.0, 22.18, 22.2, 44.3, 44.4, 88.0, 89.0, 1e4, 6e4], device=run.device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        with run.forced():
            (grad,) = torch.autograd.grad(nnfast.functional.mish(leaf).sum(), leaf)
        assert_close(grad, torch.ones_like(grad))


def test_no_float_scalar_reaches_a_kernel():
    """Liger-Kernel: a float argument of a kernel becomes float64 under torch.compile: 108 us for 56."""
    import inspect

    from nnfast.activation import kernels

    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        runtime = [
            p
            for p in inspect.signature(kernel.fn).parameters.values()
            if "constexpr" not in str(p.annotation)
        ]
        assert [p.name for p in runtime if not p.name.endswith("_ptr")] == ["size"]


def test_autocast_gives_the_gradient_in_the_input_dtype(run, case):
    """attorch: its activations do not work with bfloat16 under autocast."""
    linear = torch.nn.Linear(8, 8, device=run.device)
    x = torch.randn(4, 8, device=run.device)
    with run.forced(), torch.autocast(run.device, dtype=torch.bfloat16):
        y = case.ours(linear(x))
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    assert linear.weight.grad.dtype == torch.float32


def test_backward_twice_over_a_retained_graph(run, case):
    """Liger-Kernel#1251, unsloth#5002: gradients written into the inputs corrupt the second pass."""
    x = torch.randn(100, device=run.device, requires_grad=True)
    with run.forced():
        y = case.ours(x)
        first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0].clone()
        second = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(first, second)


def test_double_backward_is_not_silently_zero(run, case):
    """pytorch#116350 and others: a backward without its own derivative must not drop the term."""
    x = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, device=run.device, requires_grad=True)
    for function in (case.ours, lambda x: case.ours(x * 1, inplace=True)):
        with run.forced():
            (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(grad.sum(), x)
        (expected,) = torch.autograd.grad(case.truth(x).sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(expected.sum(), x)
        assert_close(second, expected)
        assert second.abs().min() > 1e-3
