"""Softmax focal loss by the emulated CUDA kernels, at a row length for each way they are launched."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from nnfast.focal_loss import reference
from tests.emulation.emulated import emulated_backend, load_emulated

CASES = {
    "8 threads a row": ((67, 10), torch.float32),
    "8 threads a row, in vectors": ((67, 16), torch.bfloat16),
    "a warp a row": ((19, 333), torch.float32),
    "a warp a row, in vectors": ((19, 2048), torch.float16),
    "a block a row": ((3, 4001), torch.float64),
    "a block a row, in vectors": ((3, 5000), torch.float32),
    "1024 threads a row": ((2, 32001), torch.float32),
    "1024 threads a row, in vectors": ((2, 65536), torch.bfloat16),
    "1024 threads a long row, unaligned": ((2, 131071), torch.bfloat16),
}


@pytest.mark.parametrize("kind", CASES)
def test_rows(kind):
    shape, dtype = CASES[kind]
    torch.manual_seed(0)
    x = (torch.randn(shape) * 4).to(dtype).unsqueeze(2)
    target = torch.randint(shape[1], (shape[0], 1))
    target[1] = -100
    emulated_backend("softmax_focal_loss")  # defines the operators
    ops = load_emulated()
    loss, slopes = ops.softmax_focal_loss(x, target, None, 1.5, -100)
    grad = torch.linspace(-1, 2, shape[0], dtype=loss.dtype).reshape(loss.shape)
    result = ops.softmax_focal_loss_backward(grad, x, target, slopes, -100)

    truth = reference.softmax_focal_loss(x.double(), target, None, 1.5, -100)
    assert_close(loss.double(), truth, rtol=2e-6, atol=1e-7)
    expected = reference.softmax_focal_loss_backward(grad.double(), x.double(), target, None, 1.5, -100)
    # that of one rounding to dtype, and of the arithmetic
    assert_close(result.double(), expected, rtol=torch.finfo(dtype).eps + 5e-6, atol=1e-7)
    assert not result[1].any()
