"""Sigmoid focal loss against torchvision's formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import nnfast
from tests.ops import seed_sigmoid_focal, soft_targets

pytestmark = pytest.mark.only("sigmoid_focal_loss")
focal = nnfast.functional.sigmoid_focal_loss
GAMMAS = (0, 0.5, 1, 1.3, 2, 5)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [0.25, 0, 1, -1])
def test_torchvisions(forced, alpha, gamma):
    torch.manual_seed(0)
    x = (torch.randn(5, 33) * 3).requires_grad_()
    targets = soft_targets(x)
    exact = x.detach().double().requires_grad_()
    for reduction in ("none", "mean", "sum"):
        result = focal(x, targets, alpha, gamma, reduction)
        truth = seed_sigmoid_focal(exact, targets.double(), alpha, gamma)
        truth = truth if reduction == "none" else getattr(truth, reduction)()
        assert_close(result.double(), truth, rtol=2e-6, atol=2e-6)
        upstream = torch.linspace(-1, 2, result.numel()).reshape(result.shape)
        (grad,) = torch.autograd.grad(result, x, upstream)
        (true_grad,) = torch.autograd.grad(truth, exact, upstream.double())
        assert_close(grad.double(), true_grad, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_extremes(forced, gamma):
    x = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0, torch.nan], requires_grad=True)
    targets = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    loss = focal(x, targets, -1, gamma)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert_close(loss[:4], torch.tensor([0.0, 0.0, 1e4, 1e4]))
    assert_close(grad[:4], torch.tensor([0.0, 0.0, 1.0, -1.0]))
    assert grad[:5].isfinite().all()
    assert loss[5].isnan()
    assert grad[5].isnan()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradcheck(forced, gamma):
    x = torch.tensor([-2.0, -0.3, 0.4, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0.0, 1.0, 0.3, 0.0, 1.0], dtype=torch.float64)
    assert gradcheck(
        lambda x: focal(x, targets, 0.25, gamma), x, check_forward_ad=True, check_batched_grad=True
    )
    assert gradgradcheck(lambda x: focal(x, targets, 0.25, gamma), x)


def test_targets_of_other_dtypes():
    x = torch.randn(4, 3, requires_grad=True)
    hard = torch.randint(2, (4, 3))
    for dtype in (torch.int64, torch.bool, torch.uint8):
        assert_close(focal(x, hard.to(dtype)), focal(x, hard.float()))
    soft = torch.rand(4, 3, requires_grad=True)
    assert torch.autograd.grad(focal(x, soft).sum(), soft)[0].abs().min() > 0
    reasons = nnfast.explain("sigmoid_focal_loss", x, soft.double()).reasons["triton"]
    assert any("targets has dtype torch.float64" in r for r in reasons)
    assert any("targets requires grad" in r for r in reasons)


def test_autocast(forced):
    x = torch.randn(4, dtype=torch.bfloat16)
    assert focal(x, x.sigmoid()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert focal(x, x.sigmoid()).dtype == torch.float32


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (
            (torch.ones(3), torch.ones(4)),
            ValueError,
            r"targets has shape \[4\]; it needs that of inputs, \[3\]",
        ),
        ((torch.ones(3), torch.ones(3), 2), ValueError, "alpha is 2"),
        ((torch.ones(3), torch.ones(3), 0.25, -1), ValueError, "gamma is -1"),
        ((torch.ones(3), torch.ones(3), 0.25, 2, "all"), ValueError, "reduction is 'all'"),
        ((torch.ones(3).int(), torch.ones(3)), TypeError, r"inputs has dtype torch\.int32"),
    ],
    ids=["shape", "alpha", "gamma", "reduction", "dtype"],
)
def test_bad_input(args, error, words):
    with pytest.raises(error, match=r"nnfast\.sigmoid_focal_loss: " + words):
        focal(*args)
