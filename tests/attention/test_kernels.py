"""Attention's kernels against the truth in float64: every kind of call, in Triton in tiles far smaller."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import nnfast
from nnfast.attention import kernels, op
from tests.attention.calls import CALLS, SMALL, Shape, call, gradients, heads, ours, randn, torchs, truth
from tests.attention.conftest import FLAT, SQUARE, TALL
from tests.attention.test_attention import assert_as_exact, error, options_in

ODD = Shape(2, 3, 3, 33, 64, 5, 24)
GROUPED = Shape(2, 4, 2, 65, 33, 16, 16)
MULTI_QUERY = Shape(1, 4, 1, 40, 70, 8, 16)
ONE_QUERY = Shape(4, 8, 8, 1, 129, 16, 8)  # enough numbers that torch's largest error is not luck
ONE_KEY = Shape(1, 2, 1, 33, 1, 1, 3)


def with_lse(*args: torch.Tensor, **options: object) -> object:
    """The function tested, with what it returns on demand."""
    return ours(*args, **options, return_lse=True)


def check(shape: Shape, name: str, dtype: torch.dtype, device: str) -> None:
    """Out, log-sum-exp and all gradients are as exact as torch's at that dtype.

    Gradients start from probabilities made again from lse, whose half ulp is a relative error of theirs.
    """
    q, k, v = heads(shape, dtype, device)
    options = call(name, shape, dtype, device)
    out, lse = ours(q, k, v, **options, return_lse=True)
    expected, true_lse = truth(q, k, v, **options)
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    assert_as_exact(out, torchs(q, k, v, **options), expected, f"out, {dtype}")
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(lse.double(), true_lse, rtol=exact, atol=exact)
    upper = randn(*expected.shape, seed=9).to(q)
    true = gradients(truth, q.double(), k.double(), v.double(), options_in(options, torch.float64), upper)
    mine = gradients(ours, q, k, v, options, upper)
    theirs = gradients(torchs, q, k, v, options, upper)
    floor = torch.finfo(dtype).eps * (32 if dtype == torch.float64 else 1)
    assert len(mine) == len(true) == 3 + ("bias" in options)
    rounded = torch.finfo(lse.dtype).eps / 2 * float(true_lse.where(true_lse.isfinite(), 0).abs().max())
    eps, largest = torch.finfo(dtype).eps, max(float(x.abs().max()) for x in true)
    for which, of_ours, of_torch, of_truth in zip("qkvb", mine, theirs, true, strict=False):
        assert of_ours.dtype == dtype
        if float(of_truth.abs().max()) < eps / 16 * largest:  # zero, as of a query that sees a single key
            assert float(of_ours.abs().max()) <= 4 * eps * largest, which
        else:
            assert error(of_ours, of_truth) <= 2 * error(of_torch, of_truth) + floor + rounded, which


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [ODD, GROUPED], ids=str)
def test_every_call(shape, name, device, in_kernels):
    in_kernels(TALL if shape is ODD else FLAT)
    check(shape, name, torch.float32, device)


@pytest.mark.parametrize("name", ["plain", "padding causal", "window", "alibi", "bias of keys", "all"])
@pytest.mark.parametrize("shape", [SMALL, MULTI_QUERY, ONE_QUERY, ONE_KEY], ids=str)
def test_shapes(shape, name, device, in_kernels):
    check(shape, name, torch.float32, device)


@pytest.mark.parametrize("name", ["plain", "blind causal", "softcap", "dropout", "all"])
def test_dtypes(dtype, name, device, in_kernels):
    check(SMALL._replace(queries=33, keys=40), name, dtype, device)


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
@pytest.mark.parametrize("name", ["plain", "window causal", "padding mask", "all"])
def test_descriptors(name, arch, device, in_triton, monkeypatch):
    """The copy engine loads where it can, 24 columns of a tile's 32 too, and gives what pointers give."""
    in_triton(SQUARE, arch)
    made = []
    make = kernels.TensorDescriptor
    monkeypatch.setattr(kernels, "TensorDescriptor", lambda *args: made.append(args) or make(*args))
    check(Shape(2, 4, 2, 33, 40, 24, 16), name, torch.float16, device)
    assert device != "cpu" or len(made) == {"sm_90": 4 * 2, "sm_80": 0}[arch]


def test_descriptors_need_16_byte_strides(device, in_triton):
    in_triton(SQUARE, "sm_90")
    check(Shape(1, 2, 1, 20, 33, 5, 8), "causal", torch.float16, device)


@pytest.mark.parametrize(
    "shape",
    [(1, 4, 65, 33), (2, 1, 65, 33), (2, 4, 1, 33), (2, 4, 65, 1), (1, 4, 65, 1), (1, 1, 1, 1)],
    ids=str,
)
@pytest.mark.parametrize("programs", [1, 3, 1024])
def test_gradient_of_a_broadcast_bias(shape, programs, device, in_kernels, monkeypatch):
    """Tiles that share an element are added up in one part, in uneven parts, and each in its own."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    q, k, v = heads(GROUPED, torch.float64, device)
    options = {"bias": randn(*shape, seed=6).to(q), "softcap": 2.0, "window": 20}
    uppers = randn(2, 4, 65, 16, seed=9).to(q), randn(2, 4, 65, seed=10).to(q)
    mine = gradients(with_lse, q, k, v, options, *uppers)[3]
    assert mine.shape == shape
    assert_close(mine, gradients(truth, q, k, v, options, *uppers)[3])


@pytest.mark.parametrize("name", ["plain", "all"])
def test_gradient_through_log_sum_exp(name, device, in_kernels):
    q, k, v = heads(GROUPED, torch.float64, device)
    options = call(name, GROUPED, torch.float64, device)
    uppers = randn(2, 4, 65, 16, seed=9).to(q), randn(2, 4, 65, seed=10).to(q)

    assert_close(gradients(with_lse, q, k, v, options, *uppers), gradients(truth, q, k, v, options, *uppers))


def test_queries_that_see_nothing_are_zero(device, in_kernels):
    """Out and gradients exactly 0 and lse -inf, whichever way keys are hidden, and whatever is in them."""
    q, k, v = heads(Shape(2, 2, 2, 40, 40, 8, 8), torch.float32, device)
    padding = torch.zeros(2, 40, dtype=torch.bool, device=device)
    padding[1] = True
    mask = torch.ones(40, 40, dtype=torch.bool, device=device)
    mask[[0, 17, 39]] = False
    bias = torch.zeros(2, 1, 40, 1, device=device)
    bias[0, :, 20] = -torch.inf
    options = {"key_padding_mask": padding, "mask": mask, "bias": bias, "softcap": 5.0}
    blind = torch.zeros(2, 40, dtype=torch.bool, device=device)
    blind[1] = blind[0, [0, 17, 20, 39]] = True
    blind = blind[:, None].expand(2, 2, 40)
    out, lse = ours(q, k, v, **options, return_lse=True)
    assert torch.equal(lse == -torch.inf, blind)
    assert out[blind].eq(0).all()
    upper = torch.ones_like(out)
    grads = gradients(ours, q, k, v, options, upper)
    assert grads[0][blind].eq(0).all()
    assert all(g[1].eq(0).all() for g in grads)
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][~blind].ne(0).any()


def test_padded_keys_are_not_read_into_the_result(device, in_kernels):
    """Blocks that are padding altogether are skipped: not even a NaN in them is seen."""
    shape = Shape(2, 2, 1, 20, 100, 8, 8)
    q, k, v = heads(shape, torch.float32, device)
    padding = torch.zeros(2, 100, dtype=torch.bool, device=device)
    padding[0, 35:] = True
    padding[1, :50] = True
    options = {"key_padding_mask": padding}
    upper = randn(2, 2, 20, 8, seed=9).to(q)
    expected = [ours(q, k, v, **options), *gradients(ours, q, k, v, options, upper)]
    k[0, :, 48:] = v[0, :, 48:] = k[1, :, :48] = v[1, :, :48] = torch.nan
    found = [ours(q, k, v, **options), *gradients(ours, q, k, v, options, upper)]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_runs_repeat_bit_by_bit(name, device, in_kernels):
    q, k, v = heads(GROUPED, torch.float32, device)
    options = call(name, GROUPED, torch.float32, device)
    upper = randn(2, 4, 65, 16, seed=9).to(q)
    first, again = ([ours(q, k, v, **options), *gradients(ours, q, k, v, options, upper)] for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_views(device, in_kernels):
    """Packed, transposed, shifted by an element, innermost not last, expanded: the result of a plain copy."""
    upper = randn(2, 4, 20, 8, seed=9).to(device, torch.float32)
    packed = randn(2, 20, 3, 4, 8).to(device, torch.float32)
    shifted = randn(2 * 4 * 20 * 8 + 1).to(device, torch.float32)[1:].view(2, 4, 20, 8)
    turned = randn(2, 4, 8, 20).to(device, torch.float32).mT
    expanded = randn(2, 1, 20, 8).to(device, torch.float32).expand(2, 4, 20, 8)
    mask = (randn(20, 1, seed=3) > -1).to(device).expand(20, 20).mT
    padding = (randn(20, 2, seed=4) > 1).to(device).mT
    cases = {
        "packed": packed.permute(2, 0, 3, 1, 4).unbind(),
        "shifted": (shifted, shifted, shifted),
        "turned": (turned, turned, turned),
        "expanded": (shifted, expanded, expanded),
    }
    options = {"mask": mask, "key_padding_mask": padding}
    for what, (q, k, v) in cases.items():
        plain = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
        strange = (upper.mT.contiguous().mT, upper[:1, :1, :1, :1].expand_as(upper))
        for g in strange if what == "packed" else (upper,):
            found = [ours(q, k, v, **options), *gradients(ours, q, k, v, options, g)]
            expected = [ours(*plain, **options), *gradients(ours, *plain, options, g)]
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b), what


@pytest.mark.parametrize("name", ["plain", "padding causal", "blind causal", "padding mask", "bias of keys"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("head", [5, 16, 72])
def test_projections(head, wide, name, in_compiled):
    """Biases added as kernels read give the bits of those added before; of packed projections (N, L, 3, H, D)
    and (L, N, 3, H, D). A product made there is as exact as torch's."""
    shape = Shape(2, 3, 3, 130, 130, head, head)
    options = call(name, shape, wide, "cpu")
    in_bias = randn(3, 3, head, seed=3).to(wide)
    weight = randn(head, head, seed=4).to(wide) * head**-0.5
    for first, sizes in enumerate(((2, 130), (130, 2))):
        q, k, v = randn(*sizes, 3, 3, head, seed=5).to(wide).permute(2, first, 3, 1 - first, 4)
        sums = [x + b for x, b in zip((q, k, v), in_bias.unsqueeze(2), strict=True)]
        for projections, q2, k2, v2 in (
            ({"in_bias": in_bias}, *sums),
            ({"query_weight": weight}, q @ weight, k, v),
            ({"in_bias": in_bias, "query_weight": weight}, sums[0] @ weight, *sums[1:]),
        ):
            out = op.projected_attention(q, k, v, **projections, **options)
            before = ours(q2, k2, v2, **options)
            if "query_weight" not in projections:
                assert torch.equal(out, before)
                assert out.stride() == before.stride()
            exact = op._projected(q.double(), k.double(), v.double(), *projected(projections, torch.float64))
            expected, _ = truth(*exact, **options)
            assert_as_exact(out, torchs(q2, k2, v2, **options), expected, f"{projections.keys()}, {wide}")
            given = op.arguments(q, k, v, **options)[3]
            plain = (given.mask, given.key_padding, given.bias, given.is_causal, given.scale)
            assert_close(op._projected_fallback(q, k, v, *projected(projections), *plain), before)
            with nnfast.backend("reference"):
                assert_close(op.projected_attention(q, k, v, **projections, **options), before)


def projected(projections: dict, dtype: torch.dtype | None = None) -> list:
    """in_bias and query_weight, in a dtype."""
    found = (projections.get("in_bias"), projections.get("query_weight"))
    return [x if x is None else x.to(dtype or x.dtype) for x in found]


def test_projections_of_wrong_shapes(in_compiled):
    q = torch.randn(1, 2, 64, 8)
    for k, in_bias, weight, message in (
        (q, torch.randn(3, 2, 7), None, "in_bias has 42 elements; it needs 48"),
        (q, torch.randn(3, 8, 2).mT, None, "without gaps"),
        (q, torch.randn(3, 2, 8).double(), None, "in_bias has dtype Double"),
        (q[:, :1], torch.randn(3, 2, 8), None, "the same heads and head dim"),
        (q, None, torch.randn(8, 7), "query_weight has 56 elements; it needs 64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op.PROJECTED(q, k, k, in_bias, weight, None, None, None, False, 1.0)


def test_out_lies_as_the_queries_do(device, in_kernels):
    """Rows of all heads have no gaps: (N, Lq, H, Dv), or (Lq, N, H, Dv) for queries of that order."""
    q, k, v = (x.to(torch.float32) for x in heads(Shape(2, 4, 4, 20, 20, 8, 8), torch.float32, device))
    expected = ours(q, k, v)
    assert expected.transpose(1, 2).is_contiguous()
    first = [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (q, k, v)]
    out = ours(*first)
    assert out.permute(2, 0, 1, 3).is_contiguous()
    assert torch.equal(out, expected)
    upper = randn(*out.shape, seed=9).to(q)
    for a, b in zip(gradients(ours, *first, {}, upper), gradients(ours, q, k, v, {}, upper), strict=True):
        assert torch.equal(a, b)


def test_empty(device, in_kernels):
    """No image, no query, no key: shapes as ever, zeros, and nothing launched."""
    for shape in (Shape(0, 2, 2, 4, 4, 8, 8), Shape(1, 2, 2, 0, 4, 8, 8), Shape(1, 2, 2, 4, 0, 8, 8)):
        q, k, v = heads(shape, torch.float32, device)
        bias = torch.zeros(1, 2, 1, shape.keys, device=device)
        padding = torch.zeros(shape.n, shape.keys, dtype=torch.bool, device=device)
        out, lse = ours(q, k, v, bias=bias, key_padding_mask=padding, return_lse=True)
        assert out.shape == (shape.n, 2, shape.queries, 8)
        assert out.eq(0).all()
        assert lse.eq(-torch.inf).all()
        for grad, x in zip(gradients(ours, q, k, v, {"bias": bias}, out), (q, k, v, bias), strict=True):
            assert grad.shape == x.shape
            assert grad.eq(0).all()


def test_infinite_and_nan_values_propagate(device, in_kernels):
    """A NaN in a key reaches every query that sees it, and no other; nor does one in another head."""
    q, k, v = heads(Shape(1, 2, 2, 40, 40, 8, 8), torch.float32, device)
    k[0, 0, 20, 3] = torch.nan
    out = ours(q, k, v, is_causal=True)
    assert out[0, 0, 20:].isnan().all()
    assert not out[0, 0, :20].isnan().any()
    assert not out[0, 1].isnan().any()


def test_scores_far_apart(device, in_kernels):
    """Largest scores of 1e4, and log-sum-exps below -88, where e**-lse overflows float32.

    Gradients may be off by lse's half ulp, as in `check`.
    """
    q, k, v = heads(Shape(1, 2, 2, 33, 50, 8, 8), torch.float32, device)
    for options in ({"scale": 1e4}, {"bias": torch.full((1, 1, 33, 50), -3e4, device=device)}):
        upper = randn(1, 2, 33, 8, seed=9).to(q)
        wide = options_in(options, torch.float64)
        out, lse = truth(q, k, v, **wide)
        rounded = torch.finfo(torch.float32).eps / 2 * float(lse.abs().max())
        expected = [out]
        expected += gradients(truth, q.double(), k.double(), v.double(), wide, upper)
        theirs = [torchs(q, k, v, **options), *gradients(torchs, q, k, v, options, upper)]
        found = [ours(q, k, v, **options), *gradients(ours, q, k, v, options, upper)]
        assert_as_exact(found[0], theirs[0], expected[0], str(options))
        for a, b, c in zip(found[1:], theirs[1:], expected[1:], strict=True):
            assert error(a, c) <= 2 * error(b, c) + rounded, str(options)


def test_negative_scale(device, in_kernels):
    q, k, v = heads(SMALL, torch.float32, device)
    assert_close(ours(q, k, v, scale=-0.5), truth(q, k, v, scale=-0.5)[0].float())
