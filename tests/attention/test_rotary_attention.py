"""`attention` with `rotary` is attention of queries and keys that were turned before."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.testing import assert_close

import nnfast
from nnfast.attention import op
from nnfast.core import extension
from tests.attention.calls import CALLS, SMALL, Shape, call, gradients, heads, ours, truth
from tests.attention.test_attention import options_in

SHAPES = [
    Shape(2, 3, 3, 130, 130, 72, 24),
    Shape(2, 4, 2, 65, 140, 16, 16),
    Shape(1, 4, 1, 600, 33, 6, 8),
    SMALL,
]


@pytest.fixture
def turned_as_read():
    """The operator that turns as it reads; it counts its calls."""
    with mock.patch.object(op, "TURNED", wraps=op.TURNED) as operator:
        yield operator


def rotary(head, variant):
    options = {"halves": {}, "neighbours": {"interleaved": True}, "some": {"rotary_dim": head // 4 * 2}}
    return nnfast.RotaryEmbedding(head, max_length=8, **options[variant])


@pytest.mark.parametrize("variant", ["halves", "neighbours", "some"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_bits_are_those_of_turning_before(name, shape, variant, in_compiled, turned_as_read):
    for wide in (torch.float32, torch.float64):
        options = call(name, shape, wide)
        rope = rotary(shape.head, variant)
        q, k, v = heads(shape, wide)
        found = ours(q, k, v, **options, rotary=rope, return_lse=True)
        expected = ours(*rope(q, k), v, **options, return_lse=True)
        assert turned_as_read.call_count == 1
        turned_as_read.reset_mock()
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


def test_positions_and_views(in_compiled, turned_as_read):
    shape = Shape(2, 4, 4, 100, 100, 16, 16)
    rope = nnfast.RotaryEmbedding(16)
    q, k, v = (x.float() for x in heads(shape))
    views = {
        "plain": (q, k, v),
        "turned": [x.mT.contiguous().mT for x in (q, k, v)],
        "rows": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        "expanded": [x[:, :1].expand(x.shape) for x in (q, k, v)],
    }
    given = [
        None,
        torch.arange(7, 107),
        torch.tensor(3.5),
        torch.randint(5000, (2, 1, 100)),
        torch.rand(2, 4, 1) * 100,
        torch.randint(5000, (1, 4, 100)),
    ]
    for what, (a, b, c) in views.items():
        for positions in given:
            found = ours(a, b, c, rotary=rope, positions=positions)
            expected = ours(*rope(a, b, positions), c)
            assert torch.equal(found, expected), what
    assert turned_as_read.call_count == len(views) * len(given)


def test_who_turns(device, turned_as_read):
    """As it reads without gradients in float32 and float64, else before."""
    shape = Shape(2, 4, 4, 128, 128, 16, 16)
    rope = nnfast.RotaryEmbedding(16).to(device)
    kernels = device == "cpu" and not extension.why_not("rotary_attention", "CPU")
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        q, k, v = heads(shape, dtype, device)
        for options in ({}, {"softcap": 2.0}, {"window": 5}, {"is_causal": True, "scale": 0.3}):
            for grad in (False, True):
                for x in (q, k, v):
                    x.requires_grad_(grad)
                served = nnfast.explain("attention", q, k, v, **options, rotary=rope).backend
                assert served == nnfast.explain("attention", *rope(q, k), v, **options).backend
                found = ours(q, k, v, **options, rotary=rope)
                as_read = kernels and not grad and served == "cpu" and dtype.itemsize >= 4
                assert turned_as_read.call_count == as_read, (dtype, options, grad)
                turned_as_read.reset_mock()
                expected = ours(*rope(q, k), v, **options)
                assert torch.equal(found, expected)
                assert found.stride() == expected.stride()
                assert found.requires_grad == grad
    q, k, v = heads(shape, torch.float32, device)
    bias = torch.zeros(128, 128, device=device, requires_grad=True)
    assert ours(q, k, v, bias=bias, rotary=rope).requires_grad
    with torch.no_grad():
        ours(q, k, v, bias=bias, rotary=rope)
    assert turned_as_read.call_count == kernels
    with torch.autocast(device, torch.bfloat16):
        assert ours(q, k, v, rotary=rope).dtype == torch.bfloat16
        assert_close(ours(q, k, v, rotary=rope), ours(*rope(q, k), v))
    assert turned_as_read.call_count == kernels


def test_exact_and_differentiable(device, dtype):
    shape = Shape(2, 4, 2, 70, 90, 8, 8)
    rope = nnfast.RotaryEmbedding(8).to(device)
    q, k, v = heads(shape, dtype, device)
    for name in ("plain", "causal", "padding mask", "bias", "dropout"):
        options = call(name, shape, dtype, device)
        expected, _ = truth(*rope(q, k), v, **options_in(options, torch.float64))
        eps = torch.finfo(dtype).eps
        assert_close(ours(q, k, v, **options, rotary=rope).double(), expected, rtol=0, atol=16 * eps)
    upper = torch.randn_like(ours(q, k, v))
    found = gradients(lambda *x, **o: ours(*x, **o, rotary=rope), q, k, v, {}, upper)
    expected = gradients(lambda q, k, v, **o: ours(*rope(q, k), v, **o), q, k, v, {}, upper)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_derivatives_transforms_compile_and_export():
    rope = nnfast.RotaryEmbedding(4)
    q, k, v = (x.requires_grad_() for x in heads(Shape(1, 2, 1, 3, 4, 4, 4)))

    def run(q, k, v):
        return ours(q, k, v, rotary=rope, is_causal=True)

    torch.autograd.gradcheck(run, (q, k, v))
    torch.autograd.gradgradcheck(run, (q, k, v))
    several = [torch.stack((x, 2 * x)).detach() for x in (q, k, v)]
    assert_close(torch.vmap(run)(*several)[0], run(q, k, v))
    q, k, v = (x.detach() for x in heads(Shape(2, 4, 2, 70, 90, 8, 8), torch.float32))
    rope = nnfast.RotaryEmbedding(8)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, k, v), run(q, k, v))

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rope = nnfast.RotaryEmbedding(8)

        def forward(self, q, k, v):
            return ours(q, k, v, rotary=self.rope, is_causal=True)

    exported = torch.export.export(Module(), (q, k, v)).module()
    assert_close(exported(q, k, v), run(q, k, v))


def test_dropout_takes_its_seed_from_the_generator(in_compiled, turned_as_read):
    shape = Shape(2, 4, 4, 128, 128, 16, 16)
    rope = nnfast.RotaryEmbedding(16)
    q, k, v = heads(shape, torch.float32)
    torch.manual_seed(5)
    found = ours(q, k, v, dropout_p=0.3, rotary=rope)
    torch.manual_seed(5)
    assert torch.equal(found, ours(*rope(q, k), v, dropout_p=0.3))
    assert turned_as_read.call_count == 1


def test_without_kernels(in_compiled):
    """The operator's own implementation, where nothing is compiled, is the same."""
    q, k, v = heads(Shape(2, 4, 2, 70, 90, 8, 8))
    cos, sin = nnfast.RotaryEmbedding(8).angles(q, k)[1]
    args = (q, k, v, cos[None, None], sin[None, None], True, *[None] * 5, True, 0.3, 0.0, -1, -1, 0.0)
    for a, b in zip(op._turned_fallback(*args), op.TURNED(*args), strict=True):
        assert_close(a, b)


def test_wrong_shapes(in_compiled):
    q = torch.randn(1, 2, 64, 8)
    row = torch.ones(1, 1, 64, 4)
    for k, cos, sin, message in (
        (q, row[..., :3], row, "cos has 3 angles, sin 4"),
        (q, row.double(), row, "cos has dtype Double; it needs Float"),
        (q, row, row[:, :, 1:], r"sin has shape \(1, 1, 63, 4\); it needs \(1, 2, 64, up to 4\), or 1"),
        (q, row.expand(2, 1, 64, 4), row, r"cos has shape \(2, 1, 64, 4\)"),
        (q, torch.ones(1, 1, 64, 5), row, r"cos has shape \(1, 1, 64, 5\)"),
        (q, row[0], row, r"cos has shape \(1, 64, 4\)"),
        (q[:, :1], row.expand(1, 2, 64, 4), row, "cos has 2 heads, q 2, k 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op.TURNED(q, k, k, cos, sin, False, *[None] * 5, False, 1.0, 0.0, -1, -1, 0.0)


def test_bad_input():
    q = torch.ones(1, 2, 3, 8)
    rope = nnfast.RotaryEmbedding(8)
    for options, error, words in (
        ({"positions": torch.arange(3)}, ValueError, "positions are given; they need rotary"),
        ({"rotary": rope.forward}, TypeError, "rotary is a method; it needs an nnfast.RotaryEmbedding"),
        ({"rotary": nnfast.RotaryEmbedding(6)}, ValueError, "q has shape .*; head_dim is 6"),
        ({"rotary": rope, "positions": torch.arange(4)}, ValueError, r"positions has shape \[4\]"),
    ):
        for function in (ours, lambda *x, **o: nnfast.explain("attention", *x, **o)):
            with pytest.raises(error, match=words):
                function(q, q, q, **options)
    with pytest.raises(ValueError, match="the same N, heads and length"):
        ours(q, q, q[:, :, 1:], rotary=rope)
