"""`attention` with `rotary` is attention of queries and keys that were turned before."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.testing import assert_close

import nnfast
from nnfast.attention import kernels, op, reference
from nnfast.core import extension
from tests.attention.calls import CALLS, SMALL, Shape, call, gradients, heads, ours, randn, truth
from tests.attention.conftest import SQUARE
from tests.attention.test_attention import error, options_in
from tests.attention.test_kernels import with_lse

SHAPES = [
    Shape(2, 3, 3, 130, 130, 72, 24),
    Shape(2, 4, 2, 65, 140, 16, 16),
    Shape(1, 4, 1, 600, 33, 6, 8),
    SMALL,
]


@pytest.fixture
def turned_before():
    """The operation that turns queries or keys before attention; it counts its calls."""
    with mock.patch.object(op, "ROTARY", wraps=op.ROTARY) as operation:
        yield operation


def rotary(head, variant):
    options = {"halves": {}, "neighbours": {"interleaved": True}, "some": {"rotary_dim": head // 4 * 2}}
    return nnfast.RotaryEmbedding(head, max_length=8, **options[variant])


def assert_same(a, b):
    """To the bit, but for a GPU's fused multiply-adds and other tiles."""
    assert_close(a, b, rtol=0, atol=0) if a.device.type == "cpu" else assert_close(a, b)


def results(rope, q, k, v, options, before):
    """Out, log-sum-exp and all gradients, q and k turned by the function tested or before."""

    def attend(q, k, v, **options):
        return with_lse(*rope(q, k), v, **options) if before else with_lse(q, k, v, **options, rotary=rope)

    of_lse = torch.promote_types(q.dtype, torch.float32)
    uppers = randn(*q.shape[:3], v.shape[3], seed=9).to(q), randn(*q.shape[:3], seed=10).to(q.device, of_lse)
    return [*attend(q, k, v, **options), *gradients(attend, q, k, v, options, *uppers)]


@pytest.mark.parametrize("variant", ["halves", "neighbours", "some"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_bits_are_those_of_turning_before(name, shape, variant, in_compiled, turned_before):
    for wide in (torch.float32, torch.float64):
        options = call(name, shape, wide)
        rope = rotary(shape.head, variant)
        q, k, v = heads(shape, wide)
        found, expected = (results(rope, q, k, v, options, before) for before in (False, True))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    assert not turned_before.called


FEW_QUERIES = Shape(1, 2, 1, 33, 40, 16, 24)
MANY_QUERIES = Shape(1, 2, 1, 65, 20, 16, 8)
NO_POWER = Shape(1, 2, 2, 20, 33, 24, 8)


@pytest.mark.parametrize("variant", ["halves", "neighbours", "some"])
@pytest.mark.parametrize("shape", [FEW_QUERIES, MANY_QUERIES, NO_POWER], ids=str)
@pytest.mark.parametrize("name", ["plain", "padding mask", "all"])
def test_tiles_turn_in_triton(name, shape, variant, device, in_triton, turned_before):
    """Queries, and keys of few of them, as read; bits of turning before where none fuses multiply-adds."""
    rope = rotary(shape.head, variant).to(device)
    in_tiles = shape is not NO_POWER or variant == "neighbours"
    few = shape is not MANY_QUERIES
    for wide in (torch.float32, torch.float64):
        options = call(name, shape, wide, device)
        q, k, v = heads(shape, wide, device)
        expected = results(rope, q, k, v, options, before=True)
        with mock.patch.object(kernels, "rotary", wraps=kernels.rotary) as whole:
            ours(q, k, v, **options, rotary=rope)
            assert whole.call_count == (2 if not in_tiles else 0 if few else 1)
            whole.reset_mock()
            found = results(rope, q, k, v, options, before=False)
            assert whole.call_count == (2 * 2 + 2 + 2 if not in_tiles else 2 if few else 4)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
            assert a.stride() == b.stride()
    assert not turned_before.called


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
@pytest.mark.parametrize("variant", ["halves", "neighbours", "some"])
@pytest.mark.parametrize("shape", [FEW_QUERIES, MANY_QUERIES], ids=str)
def test_half_types_in_triton(shape, variant, arch, device, in_triton):
    """Turned they are rounded once, their gradients not before they have turned back."""
    in_triton(SQUARE, arch)
    rope = rotary(shape.head, variant).to(device)
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = heads(shape, dtype, device)
        found, before = (results(rope, q, k, v, {"is_causal": True}, x) for x in (False, True))
        assert_close(found[:2], before[:2], rtol=0, atol=0 if device == "cpu" else 4 * torch.finfo(dtype).eps)
        wide = [x.double() for x in (q, k, v)]
        with nnfast.backend("reference"):
            true = results(rope.double(), *wide, {"is_causal": True}, True)
        rope.float()
        for a, b, exact in zip(found[2:], before[2:], true[2:], strict=True):
            assert error(a, exact) <= error(b, exact) + torch.finfo(dtype).eps / 2


def positions_and_views(shape, device):
    """Queries, keys and values at strides of every kind, and with positions of every shape."""
    q, k, v = heads(shape, torch.float32, device)
    length = shape.queries
    yield q, k, v, None
    for positions in (
        torch.arange(7, 7 + length),
        torch.tensor(3.5),
        torch.randint(5000, (2, 1, length)),
        torch.rand(2, 2, 1) * 100,
        torch.randint(5000, (1, 2, length)),
    ):
        yield q, k, v, positions.to(device)
    each = torch.randint(5000, (2, 2, length), device=device)
    yield *(x.mT.contiguous().mT for x in (q, k, v)), each
    yield *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), each.mT.contiguous().mT
    yield *(x[:, :1].expand(x.shape) for x in (q, k, v)), None


@pytest.mark.parametrize("length", [20, 100])
def test_positions_and_views(length, device, in_kernels, turned_before, request):
    if length == 100 and "triton" in request.node.callspec.id and device == "cpu":
        pytest.skip("slow in the interpreter; 20 are several tiles there")
    rope = nnfast.RotaryEmbedding(16).to(device)
    upper = randn(2, 2, length, 16, seed=9).to(device, torch.float32)
    for q, k, v, positions in positions_and_views(Shape(2, 2, 2, length, length, 16, 16), device):

        def attend(q, k, v, positions=positions):
            return ours(q, k, v, rotary=rope, positions=positions)

        def before(q, k, v, positions=positions):
            return ours(*rope(q, k, positions), v)

        for a, b in zip(
            [attend(q, k, v), *gradients(attend, q, k, v, {}, upper)],
            [before(q, k, v), *gradients(before, q, k, v, {}, upper)],
            strict=True,
        ):
            assert_same(a, b)
    assert not turned_before.called


def test_who_turns(device, turned_before):
    """Our kernels as they read, torch's before."""
    shape = Shape(2, 4, 4, 128, 128, 16, 16)
    rope = nnfast.RotaryEmbedding(16).to(device)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        q, k, v = heads(shape, dtype, device)
        for options in ({}, {"softcap": 2.0}, {"window": 5}, {"is_causal": True, "scale": 0.3}):
            for grad in (False, True):
                for x in (q, k, v):
                    x.requires_grad_(grad)
                served = nnfast.explain("attention", q, k, v, **options, rotary=rope).backend
                assert served == nnfast.explain("attention", *rope(q, k), v, **options).backend
                found = ours(q, k, v, **options, rotary=rope)
                as_read = served in ("cpu", "triton")
                assert turned_before.call_count == (0 if as_read else 2), (dtype, options, grad)
                assert as_read == (dtype.itemsize >= 4) or device != "cpu" or not compiled()
                turned_before.reset_mock()
                expected = ours(*rope(q, k), v, **options)
                assert_same(found, expected)
                assert found.stride() == expected.stride()
                assert found.requires_grad == grad
    q, k, v = heads(shape, torch.float32, device)
    bias = torch.zeros(128, 128, device=device, requires_grad=True)
    assert ours(q, k, v, bias=bias, rotary=rope).requires_grad
    turned_before.reset_mock()
    with torch.autocast(device, torch.bfloat16):
        assert ours(q, k, v, rotary=rope).dtype == torch.bfloat16
        assert turned_before.call_count == 2
        assert_close(ours(q, k, v, rotary=rope), ours(*rope(q, k), v))


def compiled():
    return not extension.why_not("attention.cpu", "CPU")


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
        assert_same(a, b)


def test_derivatives(device, in_kernels):
    rope = nnfast.RotaryEmbedding(4).to(device)
    q, k, v = (x.requires_grad_() for x in heads(Shape(1, 2, 1, 3, 4, 4, 4), device=device))

    def run(q, k, v):
        return ours(q, k, v, rotary=rope, is_causal=True)

    torch.autograd.gradcheck(run, (q, k, v))
    torch.autograd.gradgradcheck(run, (q, k, v))


def test_positions_have_gradients(device):
    """Of torch's formula: our kernels give none."""
    q, k, v = heads(Shape(2, 4, 4, 64, 64, 16, 16), torch.float32, device)
    rope = nnfast.RotaryEmbedding(16).to(device)
    positions = (torch.rand(64, device=device) * 100).requires_grad_()
    with nnfast.backend("reference"):
        (expected,) = torch.autograd.grad(ours(*rope(q, k, positions), v).sum(), positions)
    (found,) = torch.autograd.grad(ours(q, k, v, rotary=rope, positions=positions).sum(), positions)
    assert_close(found, expected)
    turned = nnfast.functional.rotary_embedding(q, positions)
    assert torch.autograd.grad(turned.sum(), positions)[0].any()
    assert "positions require grad" in str(nnfast.explain(rope, q, k, positions))


def test_transforms_compile_and_export():
    rope = nnfast.RotaryEmbedding(4)
    q, k, v = heads(Shape(1, 2, 1, 3, 4, 4, 4))

    def run(q, k, v):
        return ours(q, k, v, rotary=rope, is_causal=True)

    several = [torch.stack((x, 2 * x)) for x in (q, k, v)]
    assert_close(torch.vmap(run)(*several)[0], run(q, k, v))
    q, k, v = heads(Shape(2, 4, 2, 70, 90, 8, 8), torch.float32)
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


def test_dropout_takes_its_seed_from_the_generator(in_compiled, turned_before):
    shape = Shape(2, 4, 4, 128, 128, 16, 16)
    rope = nnfast.RotaryEmbedding(16)
    q, k, v = heads(shape, torch.float32)
    torch.manual_seed(5)
    found = ours(q, k, v, dropout_p=0.3, rotary=rope)
    torch.manual_seed(5)
    assert torch.equal(found, ours(*rope(q, k), v, dropout_p=0.3))
    assert not turned_before.called


def operands(q, k, v, cos, sin):
    """The operator's arguments."""
    return q, k, v, *reference.Terms(cos=cos, sin=sin, is_causal=True, scale=0.3, interleaved=True)


def test_without_kernels(in_compiled):
    """The operators' own implementation, where nothing is compiled, is the same."""
    q, k, v = heads(Shape(2, 4, 2, 70, 90, 8, 8))
    cos, sin = (x[None, None] for x in nnfast.RotaryEmbedding(8).angles(q, k)[1])
    args = operands(q, k, v, cos, sin)
    found = op.CPU.forward(*args)
    assert_close(op.CHUNKED.forward(*args), found)
    saved = (q, k, v, *reference.Terms(*args[3:]).for_backward(*found, bias_grad=False))
    uppers = (randn(2, 4, 70, 8, seed=9), randn(2, 4, 70, seed=10))
    assert_close(op.CHUNKED.backward(*uppers, *saved), op.CPU.backward(*uppers, *saved))


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
        args = operands(q, k, k, cos, sin)
        with pytest.raises(RuntimeError, match=message):
            op.CPU.forward(*args)
        saved = (q, k, k, *reference.Terms(*args[3:]).for_backward(q, q[..., 0], bias_grad=False))
        with pytest.raises(RuntimeError, match=message):
            op.CPU.backward(q, None, *saved)


def test_bad_input():
    q = torch.ones(1, 2, 3, 8)
    rope = nnfast.RotaryEmbedding(8)
    for options, kind, words in (
        ({"positions": torch.arange(3)}, ValueError, "positions are given; they need rotary"),
        ({"rotary": rope.forward}, TypeError, "rotary is a method; it needs an nnfast.RotaryEmbedding"),
        ({"rotary": nnfast.RotaryEmbedding(6)}, ValueError, "q has shape .*; head_dim is 6"),
        ({"rotary": rope, "positions": torch.arange(4)}, ValueError, r"positions has shape \[4\]"),
    ):
        for function in (ours, lambda *x, **o: nnfast.explain("attention", *x, **o)):
            with pytest.raises(kind, match=words):
                function(q, q, q, **options)
    with pytest.raises(ValueError, match="the same N, heads and length"):
        ours(q, q, q[:, :, 1:], rotary=rope)
