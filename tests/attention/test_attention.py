"""The function against the truth in float64; differentiation, dropout, what surrounds it, bad input."""

from __future__ import annotations

import contextlib
import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.testing import assert_close

import nnfast
from nnfast.attention import chunked, op, reference
from nnfast.core import tuning
from tests.attention.calls import (
    CALLS,
    SMALL,
    Shape,
    call,
    differentiable,
    gradients,
    heads,
    ours,
    randn,
    torchs,
    truth,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LENGTHS = (1, 7, 64, 127, 128, 129, 192, 1000)
SHAPES = (
    SMALL,
    *(Shape(1, 2, 2, n, n, 16, 16) for n in LENGTHS),
    Shape(2, 6, 2, 1, 129, 32, 32),
    Shape(2, 6, 1, 64, 7, 80, 80),
    Shape(1, 3, 3, 127, 192, 5, 24),
    Shape(1, 2, 1, 192, 128, 96, 64),
    Shape(1, 2, 2, 7, 1000, 256, 256),
    Shape(3, 1, 1, 129, 127, 1, 3),
)
COVERING = {"plain", "causal", "padding causal", "bias", "window", "all"}
LONG = {"plain", "padding causal", "window causal"}
"""What the long ones, and the longest go through."""
TABLE = [
    (shape, name)
    for shape, name in itertools.product(SHAPES, CALLS)
    if shape.queries * shape.keys < 10_000 or (name in COVERING and max(shape) < 1000) or name in LONG
]


@pytest.fixture(params=["aten", "reference"])
def backend(request):
    with nnfast.backend(request.param):
        yield request.param


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest magnitude."""
    result, expected = result.detach().double(), expected.detach().double()
    if not torch.equal(result.isnan(), expected.isnan()):
        return math.inf
    return float((result - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def assert_as_exact(result, torchs_result, expected, what: str) -> None:
    """At most twice torch's own error, and a floor."""
    eps = torch.finfo(result.dtype).eps
    floor = eps * (32 if result.dtype == torch.float64 else 1)
    assert error(result, expected) <= 2 * error(torchs_result, expected) + floor, what


@pytest.mark.parametrize(("shape", "name"), TABLE, ids=str)
def test_forward_and_gradients_are_as_exact_as_torchs(shape, name, device):
    """On torch's operations; what ours give is in test_kernels.py."""
    dtypes = DTYPES if shape.queries * shape.keys < 40_000 else DTYPES[:2]
    for dtype in dtypes:
        q, k, v = heads(shape, dtype, device)
        options = call(name, shape, dtype, device)
        out, lse = ours(q, k, v, **options, return_lse=True)
        expected, true_lse = truth(q, k, v, **options)
        assert out.dtype == dtype
        assert out.shape == expected.shape
        assert_as_exact(out, torchs(q, k, v, **options), expected, f"out, {dtype}")
        assert lse.dtype == true_lse.dtype if dtype == torch.float64 else lse.dtype == torch.float32
        close = 1e-5 if q.itemsize >= 4 else 3e-4  # in half types torch's own takes a quicker exp
        assert_close(lse.double(), true_lse, rtol=close, atol=close)
        upper = randn(*expected.shape, seed=9).to(q)
        true = gradients(truth, q.double(), k.double(), v.double(), options_in(options, torch.float64), upper)
        mine = gradients(ours, q, k, v, options, upper)
        theirs = gradients(torchs, q, k, v, options, upper)
        for which, of_ours, of_torch, of_truth in zip("qkvb", mine, theirs, true, strict=False):
            assert of_ours.dtype == dtype
            assert_as_exact(of_ours, of_torch, of_truth, f"gradient of {which}, {dtype}")


def options_in(options: dict, dtype: torch.dtype) -> dict:
    return {
        key: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in options.items()
    }


@pytest.fixture
def small_blocks(monkeypatch):
    """The chunked formulation in blocks of 16 rows."""
    monkeypatch.setattr(chunked, "_BLOCK", 1)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "shape", [SMALL, Shape(1, 2, 2, 100, 70, 4, 6), Shape(1, 2, 1, 70, 100, 4, 4)], ids=str
)
def test_chunked_is_the_formula(name, shape, small_blocks):
    """Its operators, given any call, with gradients through out and log-sum-exp."""
    q, k, v = heads(shape)
    options = call(name, shape)
    uppers = (randn(*q.shape[:3], shape.values, seed=9), randn(*q.shape[:3], seed=10))

    def by_blocks(q, k, v, **options):
        q, k, v, terms, _ = op.arguments(q, k, v, **options)
        return op.CHUNKED(q, k, v, terms, True)

    assert_close(by_blocks(q, k, v, **options), truth(q, k, v, **options))
    assert_close(gradients(by_blocks, q, k, v, options, *uppers), gradients(truth, q, k, v, options, *uppers))


@pytest.mark.parametrize("name", CALLS)
def test_reference_is_the_definition(name):
    """Element by element, in Python."""
    s = Shape(2, 4, 2, 5, 7, 3, 2)
    q, k, v = heads(s)
    o = call(name, s)
    _, _, _, terms, _ = op.arguments(q, k, v, **o)
    out, lse = reference.attention(q, k, v, terms)
    left, right = op._window(o.get("window"))
    for n, h, i in itertools.product(range(s.n), range(s.heads), range(s.queries)):
        scores = {}
        for j in range(s.keys):
            score = float(q[n, h, i] @ k[n, h // 2, j]) * o.get("scale", s.head**-0.5)
            if "softcap" in o:
                score = o["softcap"] * math.tanh(score / o["softcap"])
            if "alibi_slopes" in o:
                slope = float(o["alibi_slopes"].expand(s.n, s.heads)[n, h])
                score -= slope * abs(i + s.keys - s.queries - j)
            if "bias" in o:
                score += float(o["bias"].expand(s.n, s.heads, s.queries, s.keys)[n, h, i, j])
            seen = not o.get("is_causal") or j <= i
            seen &= left < 0 or i - left <= j
            seen &= right < 0 or j <= i + right
            seen &= "key_padding_mask" not in o or not o["key_padding_mask"][n, j]
            seen &= "mask" not in o or bool(o["mask"].expand(s.n, s.heads, -1, -1)[n, h, i, j])
            if seen:
                scores[j] = score
        total = sum(math.exp(score) for score in scores.values())
        assert float(lse[n, h, i]) == pytest.approx(math.log(total) if scores else -math.inf)
        expected = torch.zeros(s.values, dtype=torch.float64)
        for j, score in scores.items():
            p = math.exp(score) / total
            if "dropout_p" in o:
                counter = [torch.tensor([c]) for c in (j // 4, i, n * s.heads + h)]
                word = int(reference.philox(torch.tensor(o["seed"]), counter)[j % 4])
                p = p / (1 - o["dropout_p"]) if word >= int(o["dropout_p"] * 2**32) else 0.0
            expected += p * v[n, h // 2, j]
        assert_close(out[n, h, i], expected)


def test_philox_is_salmons():
    """Known answers of Random123's kat_vectors: philox 4x32, 10 rounds, whose fourth counter is 0."""
    zero = torch.zeros((), dtype=torch.int64)
    words = [int(x) for x in reference.philox(zero, (zero, zero, zero))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck_and_gradgradcheck(name, backend, small_blocks):
    s = Shape(1, 2, 1, 3, 4, 2, 2)
    options = call(name, s)
    inputs = [x.requires_grad_() for x in (*heads(s), *differentiable(options))]

    def function(q, k, v, *bias):
        given = {**options, "bias": bias[0]} if bias else options
        out, lse = ours(q, k, v, **given, return_lse=True)
        return out, lse.masked_fill(lse.isinf(), 0)

    def out_alone(*inputs):
        return ours(*inputs[:3], **({**options, "bias": inputs[3]} if len(inputs) > 3 else options))

    for f in (function, out_alone):
        assert torch.autograd.gradcheck(f, inputs, check_batched_grad=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("inputs", [(0,), (1,), (2,), (1, 2)])
@pytest.mark.parametrize("name", ["plain", "padding causal", "window"])
def test_gradients_of_some(name, inputs):
    q, k, v = tensors = heads(SMALL)
    options = call(name, SMALL)
    some = [tensors[i].requires_grad_() for i in inputs]
    upper = randn(*q.shape, seed=9)
    true = torch.autograd.grad(truth(q, k, v, **options)[0], some, upper)
    assert_close(torch.autograd.grad(ours(q, k, v, **options), some, upper), true)
    first = torch.autograd.grad(ours(q, k, v, **options), some, upper, create_graph=True)
    assert_close(first, true)


def test_gradient_of_lse_alone():
    q, k, v = (x.requires_grad_() for x in heads(SMALL))
    for name in ("plain", "window"):
        (_, lse), (_, expected) = (
            f(q, k, v, **call(name, SMALL), **more) for f, more in ((ours, {"return_lse": True}), (truth, {}))
        )
        upper = randn(*lse.shape, seed=9)
        grads = torch.autograd.grad(lse, (q, k, v), upper, allow_unused=True)
        assert_close(grads[:2], torch.autograd.grad(expected, (q, k), upper))
        assert grads[2] is None or not grads[2].any()


def test_gradient_of_alibi_slopes():
    q, k, v = heads(SMALL)
    slopes = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(ours(q, k, v, alibi_slopes=slopes).sum(), slopes)
    assert grad.abs().min() > 0
    with nnfast.backend("triton"), pytest.raises(nnfast.BackendError):
        ours(q, k, v, alibi_slopes=slopes)


def test_transforms(backend):
    from torch.func import grad, hessian, jvp, vmap

    s = Shape(2, 2, 1, 3, 5, 2, 2)
    q, k, v = heads(s)
    for name in ("plain", "padding causal", "window", "softcap"):
        options = call(name, s)

        def true(q, options=options):
            return truth(q, k, v, **options)[0]

        def mine(q, options=options):
            return ours(q, k, v, **options)

        many = torch.stack([q, q * 2, -q])
        assert_close(vmap(mine)(many), vmap(true)(many))
        sums = [lambda q, f=f: f(q).square().sum() for f in (mine, true)]
        assert_close(*(vmap(grad(f))(many) for f in sums))
        assert_close(*(hessian(f)(q) for f in sums))
        assert_close(*(jvp(f, (q,), (q,))[1] for f in sums))


@pytest.mark.parametrize("name", ["blind", "blind causal", "all"])
def test_queries_that_see_nothing(name, backend, device):
    """0, and gradients 0, even where the values are infinite."""
    q, k, v = (x.requires_grad_() for x in heads(SMALL, torch.float32, device))
    options = call(name, SMALL, torch.float32, device)
    out, lse = ours(q, k, v, **options, return_lse=True)
    blind = lse.isinf()
    assert blind.any()
    assert (~blind).any()
    assert not out[blind].any()
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.isfinite().all()
    assert not grad[blind].any()
    nothing = torch.zeros(2, 19, dtype=torch.bool, device=device)
    out, lse = ours(q, k, v, key_padding_mask=~nothing, return_lse=True)
    assert not out.any()
    assert (lse == -math.inf).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not grad.any()


def test_infinite_bias_hides_as_a_mask_does(backend, device):
    q, k, v = heads(SMALL, torch.float32, device)
    mask = call("blind", SMALL, device=device)["mask"]
    bias = torch.zeros(mask.shape, device=device).masked_fill(~mask, -math.inf)
    upper = torch.ones_like(q)
    expected = gradients(ours, q, k, v, {"mask": mask}, upper)
    grads = gradients(ours, q, k, v, {"bias": bias}, upper)
    assert_close(grads[:3], expected)
    assert grads[3].isfinite().all()
    assert_close(ours(q, k, v, bias=bias), ours(q, k, v, mask=mask))


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (2, 0, 3, 4)], ids=str)
def test_empty(sizes, backend, dtype):
    n, h, queries, keys = sizes
    q, k, v = heads(Shape(n, h, h or 1, queries, keys, 8, 8), dtype)
    for options in ({}, {"is_causal": True}, {"window": 3}, {"key_padding_mask": torch.ones(n, keys) > 0}):
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out, lse = ours(*inputs, **options, return_lse=True)
        assert (out.shape, lse.shape, out.dtype) == ((n, h, queries, 8), (n, h, queries), dtype)
        assert not out.any()
        assert (lse == -math.inf).all()
        for x, grad in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
            assert grad.shape == x.shape
            assert not grad.any()


STRIDES = {
    "packed qkv": lambda s: randn(s.n, s.queries, 3, s.heads, s.head).permute(2, 0, 3, 1, 4).unbind(0),
    "length innermost": lambda s: [x.mT.contiguous().mT for x in heads(s)],
    "steps": lambda s: [x[:, ::2, ::2, ::2] for x in heads(s)],
    "flipped": lambda s: [x.flip(2)[:, :, 1:] for x in heads(s)],
    "expanded": lambda s: [x[:1, :1].expand(s.n, s.heads, -1, -1) for x in heads(s)],
}


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("name", ["plain", "padding causal", "window"])
def test_strides(layout, name, backend):
    q, k, v = STRIDES[layout](Shape(2, 4, 4, 14, 14, 8, 8))
    options = call(name, Shape(*q.shape[:2], 0, q.shape[2], k.shape[2], 0, 0))
    before = [x.clone() for x in (q, k, v)]
    assert_close(ours(q, k, v, **options), truth(q, k, v, **options)[0])
    upper = randn(1, 1, *q.shape[2:]).expand(q.shape)
    assert_close(
        gradients(ours, q, k, v, options, upper),
        gradients(lambda *a, **o: truth(*a, **o)[0], q, k, v, options, upper),
    )
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


@pytest.mark.parametrize("name", ["mask", "bias of keys"])
def test_expanded_masks(name):
    """Stride 0 is told from memory: nothing is made of the expanded size."""
    s = Shape(2, 4, 2, 13, 19, 8, 8)
    q, k, v = heads(s)
    options = call(name, s)
    key = "mask" if "mask" in options else "bias"
    expanded = {**options, key: options[key][:, :, :1].expand(2, 4, 13, 19)}
    _, _, _, terms, _ = op.arguments(q, k, v, **expanded)
    assert getattr(terms, key).shape == (2, 1, 1, 19)
    assert_close(ours(q, k, v, **expanded), truth(q, k, v, **expanded)[0])
    if key == "bias":
        bias = options[key].requires_grad_()
        (grad,) = torch.autograd.grad(ours(q, k, v, bias=bias.expand(2, 4, 13, 19)).sum(), bias)
        (expected,) = torch.autograd.grad(truth(q, k, v, bias=bias)[0].sum(), bias)
        assert_close(grad, expected)


# dropout


def test_dropout_repeats_with_its_seed(backend):
    q, k, v = heads(SMALL)
    first, again, other = (ours(q, k, v, dropout_p=0.5, seed=seed) for seed in (3, torch.tensor(3), 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    drawn = []
    for manual in (0, 0, 1):
        torch.manual_seed(manual)
        drawn.append((ours(q, k, v, dropout_p=0.5), ours(q, k, v, dropout_p=0.5)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    assert not torch.equal(drawn[0][0], drawn[2][0])


def dropped(seed: int, p: float, s: Shape, **options) -> torch.Tensor:
    """Dropout's factors, read from the function: p * (values = the identity) / p."""
    q, k, _ = heads(s)
    v = torch.eye(s.keys, dtype=q.dtype).expand(s.n, s.key_heads, -1, -1)
    return ours(q, k, v, dropout_p=p, seed=seed, **options) / ours(q, k, v, **options)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_and_scale(p, backend, small_blocks):
    factors = dropped(11, p, Shape(2, 3, 3, 120, 100, 4, 4))
    kept = factors > 0
    assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - p)))
    deviation = math.sqrt(p * (1 - p))  # of one draw
    for over in ((0, 1, 2, 3), (2, 3), (0, 1, 3), (0, 1, 2)):
        rate = kept.double().mean(over)
        draws = kept.numel() / rate.numel()
        assert ((rate - (1 - p)).abs() < 5 * deviation / math.sqrt(draws)).all()
    flat = kept.double().flatten() - (1 - p)
    for shift in (1, 2, 3, 4, 100, 12000):  # neighbours along each axis are independent
        correlation = float((flat[shift:] * flat[:-shift]).mean()) / deviation**2
        assert abs(correlation) < 5 / math.sqrt(flat.numel())


def test_every_backend_drops_the_same(small_blocks):
    results = {}
    for name in ("triton", "cpu", "aten", "reference"):
        try:
            with nnfast.backend(name):
                results[name] = dropped(1 << 40, 0.4, Shape(1, 2, 1, 35, 37, 4, 4), window=(30, None)) > 0
        except nnfast.BackendError:
            continue
    for kept in results.values():
        assert torch.equal(kept, results["reference"])
    assert 0.5 < results["reference"].double().mean() < 0.7


def test_gradient_is_under_the_same_dropout(backend, small_blocks):
    s = Shape(1, 2, 2, 40, 30, 4, 4)
    q, k, v = (x.requires_grad_() for x in heads(s))
    out = ours(q, k, v, dropout_p=0.4, seed=5)
    upper = randn(*out.shape, seed=9)
    factor = dropped(5, 0.4, s).detach()
    p = torch.softmax(q @ k.mT / 2, -1) * factor
    assert_close(out, p @ v)
    assert_close(torch.autograd.grad(out, (q, k, v), upper), torch.autograd.grad(p @ v, (q, k, v), upper))


# what surrounds it


@pytest.mark.parametrize(
    "name", ["plain", "causal", "mask", "padding causal", "bias", "window", "dropout", "all"]
)
def test_compile_in_one_graph(name):
    torch._dynamo.reset()
    q, k, v = (x.requires_grad_() for x in heads(SMALL, torch.float32))
    options = call(name, SMALL, torch.float32)

    def f(q, k, v):
        return ours(q * 2, k, v, **options) + 1

    expected = truth(q * 2, k, v, **options)[0].float() + 1
    upper = torch.ones_like(expected)
    true = torch.autograd.grad(expected, (q, k, v), upper)
    for forced in (None, "reference"):
        context = nnfast.backend(forced) if forced else torch.enable_grad()
        with context:
            out = torch.compile(f, fullgraph=True, backend="aot_eager")(q, k, v)
        assert_close(out, expected)
        assert_close(torch.autograd.grad(out, (q, k, v), upper), true, rtol=1e-4, atol=1e-5)


def test_compile_by_inductor_with_lse():
    torch._dynamo.reset()
    q, k, v = (x.requires_grad_() for x in heads(SMALL, torch.float32))
    for options in ({"is_causal": True}, {"window": 4}):
        compiled = torch.compile(lambda *a, o=options: ours(*a, **o, return_lse=True), fullgraph=True)
        result, expected = compiled(q, k, v), truth(q, k, v, **options)
        assert_close(result, tuple(x.float() for x in expected))
        loss, true = (x[0].sum() + x[1].sum() for x in (result, expected))
        assert_close(*(torch.autograd.grad(x, (q, k, v)) for x in (loss, true)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", ["plain", "causal", "mask", "padding", "bias"])
def test_export_needs_no_nnfast(name, strict):
    options = call(name, SMALL, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return ours(q, k, v, **options)

    inputs = tuple(heads(SMALL, torch.float32))
    program = torch.export.export(Module(), inputs, strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.scaled_dot_product_attention.default" in called
    assert not [name for name in called if "nnfast" in name]
    assert_close(program.module()(*inputs), ours(*inputs, **options))


@pytest.mark.parametrize("name", ["plain", "causal", "padding causal", "window", "all"])
def test_opcheck(name):
    q, k, v = heads(SMALL, torch.float32)
    for transposed in (False, True):
        q, k, v = (x.mT.contiguous().mT if transposed else x for x in (q, k, v))
        _, _, _, terms, _ = op.arguments(q, k, v, **call(name, SMALL, torch.float32))
        if terms.mask is not None:
            terms = terms._replace(mask=terms.mask.expand(2, 4, 13, 19))
        torch.library.opcheck(torch.ops.nnfast.attention.default, (q, k, v, *terms))
        out, lse = torch.ops.nnfast.attention(q, k, v, *terms)
        for bias_grad in {False, terms.bias is not None}:
            saved = (q, k, v, *terms.for_backward(out, lse, bias_grad))
            torch.library.opcheck(
                torch.ops.nnfast.attention_backward.default, (out * 2, lse.nan_to_num(0, 0, 0), *saved)
            )


def test_autocast(device):
    q, k, v = heads(SMALL, torch.float32, device)
    for name in ("plain", "padding causal", "window", "bias"):
        options = call(name, SMALL, torch.float32, device)
        with torch.autocast(device, dtype=torch.bfloat16):
            result = ours(q.requires_grad_(), k.bfloat16(), v, **options)
        assert result.dtype == torch.bfloat16
        assert_close(result.double(), truth(q, k, v, **options)[0], rtol=0.05, atol=0.03)
        assert torch.autograd.grad(result.sum(), q)[0].dtype == torch.float32
        with torch.autocast(device, dtype=torch.bfloat16):
            assert ours(q.double(), k.double(), v.double()).dtype == torch.float64


def test_fake_and_meta_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for options in ({}, {"window": 3}, {"dropout_p": 0.5}):
        with FakeTensorMode():
            q = torch.empty(2, 3, 8192, 64, dtype=torch.bfloat16)
            out, lse = ours(q, q, q, **options, return_lse=True)
        assert (out.shape, lse.shape, lse.dtype) == ((2, 3, 8192, 64), (2, 3, 8192), torch.float32)
    q = torch.empty(2, 3, 1 << 20, 64, device="meta")
    assert ours(q, q, q, window=3).shape == q.shape


def test_explain():
    q, k, v = heads(SMALL, torch.float32)
    explanation = nnfast.explain(nnfast.functional.attention, q, k, v, is_causal=True, dropout_p=0.5)
    assert explanation.backend == "aten"
    assert "is_causal=True" in str(explanation)
    assert explanation.reasons["triton"]
    before = torch.random.get_rng_state()
    nnfast.explain("attention", q, k, v, dropout_p=0.5)
    assert torch.equal(before, torch.random.get_rng_state())


# memory


_PEAK = """
import resource, sys, torch
import nnfast
length, name = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
from tests.attention.calls import Shape, call, heads, gradients, ours
def go(length):
    s = Shape(1, 2, 2, length, length, 16, 16)
    options = {"padding causal": lambda: call("padding causal", s), "window": lambda: {"window": 64},
        "dropout": lambda: {"dropout_p": 0.5}, "alibi": lambda: call("alibi", s), "plain": dict}[name]()
    q, k, v = heads(s, torch.float32)
    gradients(ours, q, k, v, options, torch.ones_like(q))
go(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
go(length)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("name", ["plain", "padding causal", "window", "dropout", "alibi"])
def test_memory_is_linear_in_length(name):
    """MiB beyond what a short call takes: one matrix of scores would be 512."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, "8192", name], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 128


# bad input


def test_bad_input_is_named():
    q, k, v = heads(SMALL, torch.float32)
    name = r"nnfast\.attention: "
    for error_type, message, args, options in (
        (TypeError, "q is a list", ([1.0], k, v), {}),
        (TypeError, "v is a NoneType", (q, k, None), {}),
        (TypeError, "k has dtype torch.float64; q has torch.float32", (q, k.double(), v), {}),
        (TypeError, "q has dtype torch.int64", (q.long(), k.long(), v.long()), {}),
        (ValueError, r"q has shape \[4, 13, 8\]; it needs \(N, heads", (q[0], k[0], v[0]), {}),
        (ValueError, r"q and k need the same N and head dim", (q, k[..., :7], v), {}),
        (ValueError, r"q has shape \[1, 4, 13, 8\], k \[2, 2, 19, 8\]", (q[:1], k, v), {}),
        (ValueError, r"k and v need the same N, heads and length", (q, k, v[:, :, 1:]), {}),
        (ValueError, r"k's heads need to divide q's", (q[:, :3], k, v), {}),
        (ValueError, r"k's heads need to divide q's", (q, k[:, :0], v[:, :0]), {}),
        (ValueError, r"within \[1, 256\]", (q.repeat(1, 1, 1, 33), k.repeat(1, 1, 1, 33), v), {}),
        (ValueError, r"within \[1, 256\]", (q, k, v[..., :0]), {}),
        (ValueError, "k is on meta; q is on cpu", (q, k.to("meta"), v), {}),
        (
            TypeError,
            "mask has dtype torch.float32; it needs torch.bool",
            (q, k, v),
            {"mask": torch.ones(13, 19)},
        ),
        (ValueError, r"mask has shape \[13, 18\]", (q, k, v), {"mask": torch.ones(13, 18) > 0}),
        (ValueError, r"bias has shape \[1, 1, 1, 1, 1\]", (q, k, v), {"bias": torch.ones(1, 1, 1, 1, 1)}),
        (TypeError, "bias has dtype torch.bool", (q, k, v), {"bias": torch.ones(13, 19) > 0}),
        (TypeError, "mask is a list", (q, k, v), {"mask": [True]}),
        (ValueError, r"needs \[2, 19\]", (q, k, v), {"key_padding_mask": torch.ones(2, 13) > 0}),
        (TypeError, "True = padding", (q, k, v), {"key_padding_mask": torch.ones(2, 19)}),
        (ValueError, r"needs \[4\] or \[2, 4\]", (q, k, v), {"alibi_slopes": torch.ones(2)}),
        (ValueError, r"dropout_p is 1.0; it needs to be within \[0, 1\)", (q, k, v), {"dropout_p": 1.0}),
        (ValueError, "dropout_p is -0.1", (q, k, v), {"dropout_p": -0.1}),
        (ValueError, "dropout_p is nan", (q, k, v), {"dropout_p": math.nan}),
        (ValueError, "softcap is -1", (q, k, v), {"softcap": -1.0}),
        (ValueError, r"window is \(1, 2, 3\)", (q, k, v), {"window": (1, 2, 3)}),
        (ValueError, "window is -1", (q, k, v), {"window": -1}),
        (ValueError, "window is 0.5", (q, k, v), {"window": 0.5}),
        (ValueError, r"seed has shape \[1\]", (q, k, v), {"dropout_p": 0.1, "seed": torch.tensor([1])}),
        (TypeError, "seed is a float", (q, k, v), {"dropout_p": 0.1, "seed": 0.5}),
    ):
        with pytest.raises(error_type, match=name + ".*" + message):
            ours(*args, **options)


# torch's own database


def test_opinfo(backend):
    """Few numbers each, and scores of 100: the largest errors of all samples are compared."""
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [entry for entry in op_db if entry.name == "nn.functional.scaled_dot_product_attention"]
    errors = []
    for sample in info.sample_inputs("cpu", torch.float32, requires_grad=True):
        inputs = q, k, v = sample.input, *sample.args
        options = dict(sample.kwargs)
        if options.get("dropout_p"):
            continue  # torch draws others
        expected = F.scaled_dot_product_attention(q, k, v, **options)
        mask = options.pop("attn_mask", None)
        grouped = options.pop("enable_gqa", False)
        wide = [
            x if x.dim() == 4 else x.unsqueeze(0) for x in inputs
        ]  # torch broadcasts the first dimensions
        n, most = (max(x.shape[dim] for x in wide) for dim in (0, 1))
        q, k, v = (x.expand(n, x.shape[1] if grouped else most, -1, -1) for x in wide)
        expected = expected.reshape(*q.shape[:3], v.shape[3])
        given = {} if mask is None else {"mask" if mask.dtype == torch.bool else "bias": mask}
        result = ours(q, k, v, **given, **options)
        true, _ = truth(q, k, v, **given, **options)
        upper = torch.ones_like(result)
        found = [(x, *torch.autograd.grad(x, inputs, upper.to(x.dtype))) for x in (result, expected, true)]
        errors.append([(error(mine, t), error(torchs, t)) for mine, torchs, t in zip(*found, strict=True)])
    assert len(errors) >= 8
    for of_one in zip(*errors, strict=True):
        mine, theirs = (max(some) for some in zip(*of_one, strict=True))
        assert mine <= 2 * theirs + torch.finfo(torch.float32).eps


class Marked(torch.Tensor):
    """A subclass."""


TURNS = {
    "as it is": lambda x: x,
    "double": torch.Tensor.double,
    "bfloat16": torch.Tensor.bfloat16,
    "int": torch.Tensor.int,
    "meta": lambda x: x.to("meta"),
    "parameter": torch.nn.Parameter,
    "subclass": lambda x: x.as_subclass(Marked),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "turned": lambda x: x.mT.contiguous().mT,
    "one head": lambda x: x[:, :1],
    "shorter": lambda x: x[:, :, :-1],
    "narrower": lambda x: x[..., :-1],
    "matrices": lambda x: x[0],
    "none": lambda x: x[:0],
}
AROUND = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "forced": lambda: nnfast.backend("reference"),
    "dual level": forward_ad.dual_level,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("turn", TURNS)
def test_what_is_decided_at_once_is_what_the_reasons_say(turn, around):
    """Quick answers of the hot path are those of `why_not` and `not_worth`, on both sides of each limit."""
    decided = set()
    for n, h, length, head in itertools.product((1, 2), (1, 4), (1, 31, 32, 33, 64, 128), (8, 256, 257)):
        x = torch.zeros(n, h, length, head)
        for places in ((0, 1, 2), (0,), (1,), (2,)):
            q, k, v = (TURNS[turn](x) if i in places else x for i in range(3))
            with AROUND[around]():
                quick = None
                if type(q) is type(k) is type(v) is torch.Tensor and op._is_plain(q, k, v):
                    quick = "cpu" if op._is_plain_for_cpu(q, k, v) else "aten"
                decided.add(quick)
                try:
                    arguments = op.arguments(q, k, v)
                except (TypeError, ValueError, AttributeError):
                    assert quick != "cpu", (x.shape, places)  # torch refuses it
                    continue
                served = op.ATTENTION.explain(*arguments).backend
            assert quick in (None, served), (x.shape, places)
            if around != "forced" and arguments[0].is_cpu and length < tuning.ATTENTION_QUERIES:
                assert served == "aten", (x.shape, places)
            if type(q) is type(k) is type(v) is torch.Tensor:  # a parameter is checked one reason at a time
                op.check_heads(*(torch.nn.Parameter(x.detach(), requires_grad=False) for x in arguments[:3]))
    if turn == "as it is":
        ours_serve = op._IN_CPU and around in ("nothing", "no_grad")
        assert ("cpu" in decided) == ours_serve
