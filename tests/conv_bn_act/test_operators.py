"""The operators against the formulas: statistics, masks, sums, in both layouts; what breaks when they do."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from nnfast.conv_bn_act import op, reference
from nnfast.core.op import OPS
from tests.conftest import DEVICES, runs
from tests.ops import TABLE

CASE = next(case for case in TABLE if case.name == "batch_norm_act")
SHAPES = [
    (4, 5, 3, 7),
    (3, 70, 2),
    (40, 9),
    (1, 2, 33, 40),
    (64, 2, 1, 1),
    (1, 1, 4099),
    (300, 3, 2),
    (2, 130),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
IDENTITY, RELU, LEAKY_RELU, SILU, MISH = range(5)


RUNS = [run for device in DEVICES for run in runs(CASE, device) if run.backend != "aten"]


@pytest.fixture(params=RUNS, ids=str)
def backend(request):
    with torch.device(request.param.device):
        yield request.param


@pytest.fixture
def kernels(backend):
    """The five operators of a backend."""
    with backend.forced():
        if backend.backend == "reference":
            return op._Formulas
        found = next(b for b in OPS["batch_norm_act"].backends if b.name == backend.backend)
        return found.run.args[0]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layouts(x):
    yield x
    yield x.movedim(1, -1).contiguous().movedim(-1, 1)


def everything(x, act, residual, affine=True):
    """Operands from x to residual_eps, and a gradient."""
    channels = x.shape[1]
    moments = reference.statistics(x)
    weight, bias = (torch.randn_like(moments[0]) if affine else None for _ in range(2))
    own = (x, *moments, weight, bias, 1e-5)
    other = torch.randn(x.shape).to(x)
    if residual == "none":
        return (*own, *[None] * 5, 0.0)
    if residual == "plain":
        return (*own, other, *[None] * 4, 0.0)
    parameters = (torch.randn(channels).to(moments[0]) for _ in range(2))
    return (*own, other, *reference.statistics(other), *parameters, 1e-4)


def close(ours, theirs, dtype):
    loose = dtype == torch.bfloat16
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if loose else {"rtol": 1e-4, "atol": 1e-4}
    assert_close(ours, theirs, **tolerance)
    assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(kernels, shape):
    for dtype in DTYPES:
        for x in layouts((torch.randn(shape) * 2 + 3).to(dtype)):
            truth = torch.var_mean(x.double(), [0, *range(2, x.dim())], correction=0)
            mean, var = kernels.statistics(x)
            eps = torch.finfo(mean.dtype).eps
            assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_close(mean.double(), truth[1], rtol=8 * eps, atol=16 * eps)
            assert_close(var.double(), truth[0], rtol=32 * eps, atol=32 * eps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual", ["none", "plain", "norm"])
def test_forward_sums_and_backward(backend, kernels, residual, shape):
    acts = {"none": (RELU, MISH), "plain": (IDENTITY, RELU, LEAKY_RELU, SILU), "norm": (LEAKY_RELU, MISH)}
    combinations = itertools.product(DTYPES, acts[residual])
    for dtype, act in backend.share(combinations, SHAPES.index(shape) % 5, 5):
        for x in layouts(torch.randn(shape).to(dtype)):
            given = everything(x, act, residual, affine=act != IDENTITY)
            with_mask = residual == "plain" and act in (RELU, LEAKY_RELU)
            y, mask = kernels.forward(*given, act, 0.125, with_mask)
            truth, bits = reference.forward(*given, act, 0.125, with_mask)
            close(y, truth, dtype)
            assert torch.equal(mask, bits)
            grad = torch.randn(shape).to(dtype)
            tail = (bits if with_mask else None, act, 0.125)
            sums = kernels.sums(grad, *given, *tail, residual == "plain")
            true_sums = reference.sums(grad, *given, *tail, residual == "plain")
            for mine, theirs in zip(sums, true_sums, strict=True):
                scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
                close(mine / scale, theirs / scale, torch.float32 if mine.dim() < 2 else dtype)
            for used in ((None,) * 3, true_sums[:3]):
                last = used[2] if residual == "norm" else None
                mine = kernels.backward(grad, *given, *tail, *used[:2], last, 17.0)
                theirs = reference.backward(grad, *given, *tail, *used[:2], last, 17.0)
                for a, b in zip(mine, theirs, strict=True):
                    close(a, b, dtype)


def test_mask_without_its_residual(kernels):
    """What is saved of an identity residual is its bits alone."""
    for x in layouts(torch.randn(3, 13, 2, 5)):
        given = everything(x, RELU, "plain")
        mask = kernels.forward(*given, RELU, 0.0, True)[1]
        grad = torch.randn_like(x)
        without = (*given[:6], *[None] * 5, 0.0)
        for mine, theirs in zip(
            kernels.sums(grad, *without, mask, RELU, 0.0, True),
            reference.sums(grad, *given, None, RELU, 0.0, True),
            strict=True,
        ):
            assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_pad_bits_are_zero(kernels):
    for x in layouts(torch.ones(2, 3, 1, 5)):
        given = (x, torch.zeros(3), torch.ones(3), None, None, 0.0, x, *[None] * 4, 0.0)
        mask = kernels.forward(*given, RELU, 0.0, True)[1]
        assert set(mask.flatten().tolist()) == {7 if mask.shape[0] == 10 else 31}


def test_nan_is_positive_for_relu_alone(kernels):
    x = torch.full((2, 8, 1, 3), torch.nan)
    given = (x, torch.zeros(8), torch.ones(8), None, None, 0.0, x, *[None] * 4, 0.0)
    assert kernels.forward(*given, RELU, 0.0, True)[1].unique().tolist() == [7]
    assert kernels.forward(*given, LEAKY_RELU, 0.1, True)[1].unique().tolist() == [0]


def test_running_statistics(kernels):
    mean, var = torch.randn(300), torch.rand(300)
    for dtype in DTYPES:
        wide = [t.double() if dtype == torch.float64 else t for t in (mean, var)]
        for offset, momentum in ((None, 0.1), (torch.randn(300).to(wide[0]), 1.0), (None, 0.0)):
            running = [torch.randn(300).to(dtype), torch.rand(300).to(dtype)]
            expected = [
                (1 - momentum) * old.double() + momentum * new.double()
                for old, new in zip(
                    running, (wide[0] + (0 if offset is None else offset), wide[1] * 1.25), strict=True
                )
            ]
            kernels.update_(*running, *wide, offset, 1.25, momentum)
            for new, truth in zip(running, expected, strict=True):
                assert new.dtype == dtype
                assert_close(new.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_double_is_double(kernels):
    """A scalar passed as float32 anywhere would show."""
    x = torch.randn(4, 5, 3, 7, dtype=torch.float64) + 1 / 3
    given = everything(x, SILU, "norm")
    given = (*given[:5], 1e-7 / 3, *given[6:11], 1 / 7)
    for code, slope in ((SILU, 0.0), (LEAKY_RELU, 1 / 3)):
        y = kernels.forward(*given, code, slope, False)[0]
        assert_close(y, reference.forward(*given, code, slope, False)[0], rtol=1e-13, atol=1e-13)
        grad = torch.randn_like(x)
        sums = reference.sums(grad, *given, None, code, slope, False)[:3]
        mine = kernels.backward(grad, *given, None, code, slope, *sums, 84.0)
        theirs = reference.backward(grad, *given, None, code, slope, *sums, 84.0)
        assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    running = [torch.zeros(5, dtype=torch.float64) for _ in range(2)]
    mean, var = x[:2, :, 0, 0].clone().unbind()
    kernels.update_(*running, mean, var, None, 4 / 3, 1 / 3)
    assert_close(running, [mean / 3, var * 4 / 9], rtol=1e-15, atol=0)


def test_bits_come_back():
    for x in itertools.chain.from_iterable(layouts(torch.randn(shape)) for shape in SHAPES):
        assert torch.equal(reference.unpack(reference.pack(x > 0), x), x > 0)
