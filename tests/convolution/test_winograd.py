"""Winograd's convolution on the CPU: errors, what is not finite, instruction sets, who is asked."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import nnfast
from nnfast.convolution import op, reference, winograd
from nnfast.core import extension, tuning

pytestmark = pytest.mark.skipif(
    bool(extension.why_not(winograd.NAME, "CPU")), reason=extension.why_not(winograd.NAME, "CPU") or "built"
)

LAST = torch.channels_last
PLAIN = (None, None, None, 0, 0.0)


def image(*size):
    return torch.randn(size).contiguous(memory_format=LAST)


def all_three(kernels, x, weight, grad, padding=(1, 1), **options):
    """y, dx, dweight, dbias."""
    tail = ([1, 1], list(padding), 0, 0.0)
    y = kernels.forward(x, weight, None, None, *PLAIN, *tail, False)[0]
    dx = kernels.input_gradient(grad, None, weight, None, None, *PLAIN, list(x.shape), *tail, True)[0]
    return y, dx, *kernels.weight_gradient(grad, None, x, *PLAIN, [3, 3], *tail, True)


SIZES = [
    (8, 64, 64, 28, 28),
    (4, 150, 130, 13, 14),
    (3, 256, 96, 7, 7),
    (2, 32, 320, 9, 30),
    (1, 3, 10, 5, 6),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_as_exact_as_torch(size):
    torch.manual_seed(0)
    images, channels, made, height, width = size
    x, grad = image(images, channels, height, width), image(images, made, height, width)
    weight = torch.randn(made, channels, 3, 3)
    truth = all_three(reference, x.double(), weight.double(), grad.double())
    torchs = all_three(reference, x, weight, grad)
    for t, a, b in zip(truth, all_three(op.CONV2D_ACT.on_cpu, x, weight, grad), torchs, strict=True):
        scale, floor = float(t.abs().max()), 2**-23
        ours, theirs = (float((found - t).abs().max()) / scale for found in (a, b))
        assert ours <= 2 * theirs + floor


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("where", ["x", "weight", "grad"])
def test_what_is_not_finite_is_torchs(value, where):
    """One such value must reach what it reaches by the definition, and nothing beside it."""
    torch.manual_seed(0)
    x, grad, weight = image(2, 20, 12, 11), image(2, 18, 12, 11), torch.randn(18, 20, 3, 3)
    {"x": x, "weight": weight, "grad": grad}[where][1, 7, 1, 2] = value
    found, expected = (all_three(k, x, weight, grad) for k in (op.CONV2D_ACT.on_cpu, reference))
    assert not all(t.isfinite().all() for t in expected)
    assert any(t.isfinite().any() and not t.isfinite().all() for t in expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_same_result_every_time():
    torch.manual_seed(0)
    x, grad, weight = image(4, 64, 20, 20), image(4, 64, 20, 20), torch.randn(64, 64, 3, 3)
    first, second = (all_three(op.CONV2D_ACT.on_cpu, x, weight, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
def test_other_numbers_of_threads(threads):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, grad, weight = image(2, 40, 18, 19), image(2, 300, 18, 19), torch.randn(300, 40, 3, 3)
        found = all_three(op.CONV2D_ACT.on_cpu, x, weight, grad)
        for a, b in zip(found, all_three(reference, x, weight, grad), strict=True):
            assert_close(a, b, rtol=1e-3, atol=1e-3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_instruction_sets(isa):
    if os.environ.get("NNFAST_CPU_ISA"):
        pytest.skip("run by this test itself")
    here = ["tests/convolution/test_winograd.py", "tests/convolution/test_convolution.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *here]
    chosen = "exact or finite or (cpu and (shape or gradients))"
    done = subprocess.run(
        [*command, "-k", chosen], env={**os.environ, "NNFAST_CPU_ISA": isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_refuses_what_it_has_not():
    kernels = op.CONV2D_ACT.on_cpu
    for x, weight, stride, words in (
        (image(1, 4, 5, 5), torch.randn(4, 4, 3, 3), [2, 2], "stride is"),
        (image(1, 4, 5, 5), torch.randn(4, 4, 1, 1), [1, 1], "the kernel is 1x1"),
        (image(1, 4, 5, 5).double(), torch.randn(4, 4, 3, 3).double(), [1, 1], "x has dtype"),
        (image(1, 4, 5, 5), torch.randn(4, 5, 3, 3), [1, 1], "weights have shape"),
    ):
        with pytest.raises(RuntimeError, match=words):
            kernels.forward(x, weight, None, None, *PLAIN, stride, [1, 1], 0, 0.0, False)


def test_who_serves():
    x, weight = image(8, 64, 28, 28), torch.randn(64, 64, 3, 3)
    assert nnfast.explain("conv2d_act", x, weight, None, 1, 1).backend == "cpu"
    small = nnfast.explain("conv2d_act", image(1, 64, 4, 4), weight, None, 1, 1)
    assert small.backend == "aten"
    assert "tiles of 2x2 pixels" in small.reasons["cpu"][0]
    few = nnfast.explain("conv2d_act", image(8, 3, 28, 28), torch.randn(64, 3, 3, 3), None, 1, 1)
    assert few.backend == "aten"
    assert f"3 channels; measured to pay from {tuning.WINOGRAD.channels} on" in few.reasons["cpu"]


@pytest.fixture
def calls(monkeypatch):
    """What of the kernels is called, by a block."""
    seen = []
    for name in ("forward", "input_gradient", "weight_gradient", "transform"):
        if name != "transform":
            original = getattr(op.CONV2D_ACT.on_cpu, name)

            def call(*args, name=name, original=original):
                seen.append(name)
                return original(*args)

            monkeypatch.setattr(op.CONV2D_ACT.on_cpu, name, call)
    transform = winograd.transform

    def transformed(*args):
        seen.append("transform")
        return transform(*args)

    monkeypatch.setattr(winograd, "transform", transformed)
    return seen


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
def test_blocks_train_and_infer_by_it(layout, calls):
    torch.manual_seed(0)
    block = nnfast.ResidualBlock(64, 64).to(memory_format=layout)
    x = torch.randn(4, 64, 28, 28).contiguous(memory_format=layout).requires_grad_()
    leaves = [x, *block.parameters()]
    results = []
    for backend in (None, "aten"):
        if backend:
            with nnfast.backend(backend):
                y = block(x)
        else:
            y = block(x)
        results.append([y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view(y.shape))])
    assert [calls.count(n) for n in ("forward", "input_gradient", "weight_gradient")] == [2, 2, 2]
    for a, b in zip(*results, strict=True):
        assert a.stride() == b.stride()
        assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-5)
    block.eval()
    calls.clear()
    with torch.no_grad():
        first = block(x)
        assert calls == ["transform"] * 2
        assert torch.equal(block(x), first)
        assert calls == ["transform"] * 2
        block.conv2.weight.mul_(2)
        changed = block(x)
        assert calls == ["transform"] * 3
        with nnfast.backend("aten"):
            assert_close(changed, block(x), rtol=1e-4, atol=1e-4)
        assert not torch.equal(changed, first)


def test_backward_twice_through_a_block():
    torch.manual_seed(0)
    block = nnfast.ResidualBlock(64, 64).to(memory_format=LAST)
    x = image(2, 64, 28, 28).requires_grad_()
    found = []
    for backend in ("cpu", "aten"):
        with nnfast.backend(backend):
            y = block(x)
        (first,) = torch.autograd.grad(y.square().mean(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum() * 1e6, [x, block.conv1.weight]))
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-3


def test_a_chain_of_plain_modules():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(48, 96, 3, padding=1, bias=False), nn.BatchNorm2d(96), nn.ReLU())
    ours = nnfast.ConvBNAct(48, 96, 3, padding=1)
    ours.conv, ours.bn = model[0], model[1]
    x = image(4, 48, 28, 28)
    for _ in range(2):
        assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
