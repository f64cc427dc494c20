"""CUDA kernels on small inputs, without a GPU: the same sources, run by the host emulation."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from emulated import ACTIVATIONS, load_emulated

# Relative to the largest value: the arithmetic of the type, plus a few roundings.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)
SPECIAL = [0.0, -0.0, 1e-7, 22.5, 50.0, -50.0, 1e4, -1e4, float("inf"), -float("inf"), float("nan")]


def silu(x):
    return x / (1 + torch.exp(-x))


def mish(x):
    return x * torch.tanh(torch.nn.functional.softplus(x))


FORMULA = {"silu": silu, "mish": mish}


def gradient(name, grad, x):
    x = x.double().requires_grad_()
    return torch.autograd.grad(FORMULA[name](x), x, grad.double())[0]


def sample(n, dtype, offset=0):
    generator = torch.Generator().manual_seed(n)
    return (4 * torch.randn(n + offset, generator=generator)).to(dtype)[offset:]


def assert_close(actual, expected):
    expected = expected.to(actual.dtype).double()
    tolerance = TOLERANCE[actual.dtype] * max(1.0, expected[expected.isfinite()].abs().max().item())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance, equal_nan=True)


# One thread, a tail, one block exactly, several blocks and a tail; offset 1 forbids vectors.
SIZES = [(n, offset) for n in (1, 7, 513, 4096, 8195) for offset in (0, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("n", "offset"), SIZES)
def test_activation(name, dtype, n, offset):
    ops, x, grad = load_emulated(), sample(n, dtype, offset), sample(n, dtype)
    given = x.clone()
    assert_close(getattr(ops, name)(x), FORMULA[name](x.double()))
    assert_close(getattr(ops, name + "_backward")(grad, x), gradient(name, grad, x))
    torch.testing.assert_close(x, given, rtol=0, atol=0)
    getattr(ops, name + "_")(x)
    assert_close(x, FORMULA[name](given.double()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_special_values(name, dtype):
    ops, x = load_emulated(), torch.tensor(SPECIAL, dtype=dtype)
    grad, leaf = torch.ones_like(x), x.clone().requires_grad_()
    theirs = getattr(torch.nn.functional, name)(leaf)
    assert_close(getattr(ops, name)(x), theirs.detach())
    assert_close(getattr(ops, name + "_backward")(grad, x), torch.autograd.grad(theirs, leaf, grad)[0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_strides(name):
    ops, forward = load_emulated(), FORMULA[name]
    images = sample(2 * 3 * 4 * 5, torch.float64).reshape(2, 3, 4, 5)
    for x in (images.contiguous(memory_format=torch.channels_last), images[:, ::2], images.transpose(0, 3)):
        grad = torch.ones((), dtype=x.dtype).expand_as(x)
        y, dx = getattr(ops, name)(x), getattr(ops, name + "_backward")(grad, x)
        assert y.stride() == dx.stride() == torch.empty_like(x).stride()
        assert_close(y, forward(x))
        assert_close(dx, gradient(name, grad, x))
        getattr(ops, name + "_")(x)
        assert_close(x, y)


def test_empty():
    assert load_emulated().silu(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_block_reduction(dynamic):
    x = sample(3 * 256, torch.float64).reshape(3, 256)
    torch.testing.assert_close(load_emulated().sum_blocks(x, dynamic), x.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("leave", "message"),
    [
        (True, "of 64 threads 32 wait at __syncthreads, 0 at a warp barrier or shuffle, 32 have finished"),
        (False, "of 64 threads 32 wait at __syncthreads, 32 at a warp barrier or shuffle, 0 have finished"),
    ],
)
def test_divergent_barrier_is_an_error(leave, message):
    with pytest.raises(RuntimeError, match=f"divergent_barrier: divergent barrier in block 0: {message}"):
        load_emulated().diverge(torch.zeros(1), leave)
