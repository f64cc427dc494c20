"""Random shapes, strides and values (hypothesis), and float64 against forty digits."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.ops import DTYPES

mpmath = pytest.importorskip("mpmath")
hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.only("activation")


@st.composite
def tensors(draw) -> torch.Tensor:
    """A view of a random tensor: permuted, sliced, stepped, expanded."""
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from([1e-3, 1.0, 20.0, 1e3]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)
    if shape:
        x = x.permute(draw(st.permutations(range(len(shape)))))
        dim = draw(st.integers(0, len(shape) - 1))
        start = draw(st.integers(0, 3))
        x = x[(slice(None),) * dim + (slice(start, None, draw(st.integers(1, 3))),)]
        if draw(st.booleans()):
            x = x.unsqueeze(draw(st.integers(0, x.dim()))).expand(*[-1] * (x.dim() + 1))
        if draw(st.booleans()):
            x = x.unsqueeze(0).expand(draw(st.integers(0, 4)), *x.shape)
    return x


def layout(x: torch.Tensor) -> list[int]:
    """The strides that address something: not those of dimensions of one element, or of an empty tensor."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(x=tensors(), data=st.data())
def test_any_view(case, run, x, data):
    x = x.to(run.device)
    expected = case.torchs(x)
    result = run(case.ours, x)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert layout(result) == layout(expected)
    assert_close(
        result, expected, atol=1e-5 if x.itemsize < 8 else 1e-12, rtol=1.6e-2 if x.itemsize < 4 else 1e-5
    )
    grad = torch.randn_like(expected)
    if data.draw(st.booleans()) and grad.dim() > 1:
        grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    leaf = x.detach().requires_grad_()
    with run.forced():
        (ours,) = torch.autograd.grad(case.ours(leaf), leaf, grad)
    (torchs,) = torch.autograd.grad(case.torchs(leaf), leaf, grad)
    assert_close(ours, torchs, atol=1e-4 if x.itemsize == 4 else None, rtol=1e-4 if x.itemsize == 4 else None)


EXACT = {
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "mish": lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))),
}


@pytest.mark.parametrize(("low", "high"), [(-700, -20), (-20, -1e-3), (1e-3, 20), (20, 700)])
def test_float64_against_forty_digits(case, run, low, high):
    x = torch.linspace(low, high, 60, dtype=torch.float64)
    with mpmath.workdps(40):
        function = EXACT[case.name]
        truth = [function(mpmath.mpf(v)) for v in x.tolist()]
        slope = [mpmath.diff(function, mpmath.mpf(v)) for v in x.tolist()]

        def error(result: torch.Tensor, exact: list) -> float:
            return float(
                max(
                    abs(mpmath.mpf(r) - e) / max(abs(e), 1e-290)
                    for r, e in zip(result.tolist(), exact, strict=True)
                )
            )

        ours, torchs = run(case.ours, x.to(run.device)), case.torchs(x.to(run.device))
        assert error(ours, truth) <= 2 * error(torchs, truth) + 1e-16
        leaf = x.to(run.device).requires_grad_()
        with run.forced():
            (ours,) = torch.autograd.grad(case.ours(leaf).sum(), leaf)
        (torchs,) = torch.autograd.grad(case.torchs(leaf).sum(), leaf)
        assert error(ours, slope) <= 2 * error(torchs, slope) + 1e-16
