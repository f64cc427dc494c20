"""Bugs that others had in this operation, each with where it was found."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import nnfast
from tests.conftest import DEVICES, runs
from tests.ops import TABLE

CASE = next(case for case in TABLE if case.name == "batch_norm_act")


@pytest.fixture(params=[run for device in DEVICES for run in runs(CASE, device)], ids=str)
def backend(request):
    torch.manual_seed(0)
    with torch.device(request.param.device), request.param.forced():
        yield request.param


def compare(ours, torchs, x, residual=None, **tolerance):
    """Outputs, gradients and states of two modules; the second is nn.BatchNorm2d."""
    results = []
    for module in (ours, torchs):
        inputs = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
        if module is ours:
            y = module(*inputs)
        else:
            y = F.relu(module(inputs[0]) + (inputs[1] if residual is not None else 0))
        grad = torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(y)
        results.append([y, *torch.autograd.grad(y, [*inputs, *module.parameters()], grad)])
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs, **tolerance)
    assert_close(ours.state_dict(), torchs.state_dict())


def test_gradients_in_eval_mode(backend):
    """pytorch#586 and BobMcDear/attorch: the backward of training was run in eval mode too."""
    ours, torchs = nnfast.BatchNormAct2d(5).eval(), nn.BatchNorm2d(5).eval()
    ours.running_mean.normal_()
    torchs.load_state_dict(ours.state_dict())
    compare(ours, torchs, torch.randn(4, 5, 3, 3), torch.randn(4, 5, 3, 3), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("channels", [1, 3, 7, 13, 65])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_channels_that_no_vector_divides(backend, channels, memory_format):
    """NVIDIA/apex#1556, cudnn-frontend#133: channels_last only, channels in multiples of 8 only."""
    ours, torchs = nnfast.BatchNormAct2d(channels), nn.BatchNorm2d(channels)
    x = torch.randn(3, channels, 5, 3).contiguous(memory_format=memory_format)
    compare(ours, torchs, x, x.flip(0), atol=2e-5, rtol=2e-5)


def test_layout_is_kept(backend):
    """cudnn-frontend#134: a hidden transpose."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 5, 3).contiguous(memory_format=memory_format).requires_grad_()
        y = nnfast.BatchNormAct2d(8)(x)
        assert y.is_contiguous(memory_format=memory_format)
        assert torch.autograd.grad(y, x, y.detach())[0].is_contiguous(memory_format=memory_format)


def test_residual_that_is_the_input(backend):
    """pytorch#62926: cudnn_convolution_add_relu fails where the residual aliases the input."""
    for mode in (True, False):
        ours, torchs = nnfast.BatchNormAct2d(4).train(mode), nn.BatchNorm2d(4).train(mode)
        x = torch.randn(3, 4, 5, 5)
        before = x.clone()
        assert_close(ours(x, x), F.relu(torchs(x) + x))
        assert torch.equal(x, before)


def test_output_may_be_changed_in_place(backend):
    """mapillary/inplace_abn#145, #148: errors of version counters when the output is changed."""
    module = nnfast.BatchNormAct2d(4)
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    y = module(x, x)
    if backend.backend == "aten":
        pytest.skip("torch's relu keeps its output")
    expected = torch.autograd.grad((module(x, x) * 2).sum(), x)[0]
    y.mul_(2)
    assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


def test_half_gradients_are_finite(backend):
    """pytorch#147303: NaN in the gradients of channels_last float16 on the cpu."""
    module = nnfast.BatchNormAct2d(16)
    x = torch.randn(4, 16, 7, 7).half().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = module(x)
    y.backward(torch.randn_like(y))
    for gradient in (x.grad, module.weight.grad, module.bias.grad):
        assert gradient.isfinite().all()


def test_module_called_twice_before_backward(backend):
    """Siamese networks: what the first call saved must outlive the second's running statistics."""
    ours, torchs = nnfast.BatchNormAct2d(4), nn.BatchNorm2d(4)
    x = torch.randn(2, 3, 4, 5, 5)
    results = []
    for module in (ours, torchs):
        first, second = (module(part) if module is ours else F.relu(module(part)) for part in x)
        (first.square().sum() + second.sum()).backward()
        results.append(module.weight.grad)
    assert_close(*results, atol=1e-4, rtol=1e-5)
    assert_close(ours.state_dict(), torchs.state_dict())


def test_copies_share_nothing(backend):
    """mapillary/inplace_abn#228: state behind the module's back."""
    module = nnfast.BatchNormAct2d(4)
    twin = copy.deepcopy(module)
    before = copy.deepcopy(twin.state_dict())
    module(torch.randn(3, 4, 5, 5))
    assert_close(twin.state_dict(), before, rtol=0, atol=0)
