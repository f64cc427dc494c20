"""What users of other attention implementations reported, with sources: none of it happens here."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import nnfast
from nnfast.attention import sdpa
from tests.attention.calls import SMALL, Shape, call, gradients, heads, ours, randn, truth


@pytest.fixture(params=["triton", "aten", "reference"])
def backend(request, device):
    with nnfast.backend(request.param):
        if nnfast.explain("attention", *heads(SMALL, torch.float32, device)).backend is None:
            pytest.skip("triton cannot run here")
        yield request.param


def out(*args, **options):
    return truth(*args, **options)[0]


def test_padding_of_a_whole_sequence_is_no_nan(dtype, backend, device):
    """pytorch#41508, #160064: softmax over nothing."""
    s = Shape(2, 2, 2, 9, 9, 8, 8)
    q, k, v = heads(s, dtype, device)
    padding = torch.zeros(2, 9, dtype=torch.bool, device=device)
    padding[1] = True
    for options in ({"key_padding_mask": padding}, {"key_padding_mask": padding, "is_causal": True}):
        assert not ours(q, k, v, **options)[1].any()
        for grad in gradients(ours, q, k, v, options, torch.ones_like(q)):
            assert grad.isfinite().all()
            assert not grad[1].any()


def test_very_negative_scores_at_an_odd_block(backend, device):
    """pytorch#196678, trl#7181: NaN in cuDNN's gradient of q: a mask, 192 keys, log-sum-exp below -88.7."""
    s = Shape(1, 2, 2, 64, 192, 8, 8)
    q, k, v = heads(s, torch.float32, device)
    k = k - 150 * q.mean(2, keepdim=True).sign()
    q = q.abs() * q.mean(2, keepdim=True).sign()
    q, k = ((16 * x).round() / 16 for x in (q, k))  # scores are exact then, in whatever order they are summed
    options = {"mask": call("mask", s, device=device)["mask"], "scale": 0.5}
    _, lse = ours(q, k, v, **options, return_lse=True)
    assert lse.max() < -88.7
    upper = torch.ones_like(q)
    wide = gradients(out, q.double(), k.double(), v.double(), options, upper.double())
    for grad, expected in zip(gradients(ours, q, k, v, options, upper), wide, strict=True):
        assert grad.isfinite().all()
        assert (grad.double() - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_cudnn_is_not_chosen_where_it_is_wrong():
    """The same, and cudnn-frontend#1072: one query. Deterministic algorithms: cudnn-frontend#398."""
    with FakeTensorMode():
        for queries, keys, masked, avoids in (
            (128, 192, True, True),
            (64, 128, True, True),
            (128, 128, True, False),
            (128, 192, False, False),
            (1, 128, False, True),
        ):
            q, k = (torch.empty(1, 1, n, 64, dtype=torch.bfloat16, device="cuda") for n in (queries, keys))
            mask = torch.empty(1, 1, 1, keys, device="cuda") if masked else None
            assert sdpa._avoids_cudnn(q, k, mask) == avoids
            with torch.no_grad():
                assert not sdpa._avoids_cudnn(q, k, mask)
            torch.use_deterministic_algorithms(True)
            try:
                assert sdpa._avoids_cudnn(q, k, mask)
            finally:
                torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("head", [1, 3, 33, 80, 255])
def test_every_head_dim_is_served(head, backend, device):
    """xformers#1263: "No operator found" for head dims that are not multiples of 8."""
    s = Shape(1, 1, 1, 17, 19, head, head)
    q, k, v = heads(s, torch.float32, device)
    assert_close(ours(q, k, v), out(q, k, v).float(), rtol=1e-4, atol=1e-5)


def test_dropout_is_not_left_out(backend, device):
    """flash-attention#1377: an argument that was taken and not used."""
    q, k, v = heads(SMALL, torch.float32, device)
    assert not torch.allclose(ours(q, k, v, dropout_p=0.5, seed=1), ours(q, k, v), atol=1e-2)


def test_second_derivatives(backend, device):
    """pytorch#116350: the fused kernels' gradients had none; of a gradient penalty."""
    q, k, v = (x.requires_grad_() for x in heads(SMALL, torch.float64, device))
    seconds = []
    for function in (ours, out):
        (grad,) = torch.autograd.grad(function(q, k, v).square().sum(), q, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), (q, k, v)))
    assert_close(*seconds)


def test_masks_of_any_strides(backend, device):
    """xformers#500: a bias had to be aligned to 8 elements, and its slices were refused."""
    q, k, v = heads(SMALL, torch.float32, device)
    whole = randn(3, 5, 21, 23, seed=8).to(device, torch.float32)
    for bias in (
        whole[:2, :4, 3:16, 1:20],
        whole.mT[1:2, 4:5, 1:20, 2:21][:, :, :13],
        whole[2:, 1:2, :1, 4:23],
    ):
        mask = bias > -1
        mask[..., 0] = True
        expected = out(q, k, v, bias=bias, mask=mask).float()
        assert_close(ours(q, k, v, bias=bias, mask=mask), expected, rtol=1e-4, atol=1e-5)


def test_no_graph_break():
    """SageAttention#73: operators that torch.compile could not see through."""
    torch._dynamo.reset()
    q, k, v = heads(SMALL, torch.float32)
    padding = call("padding", SMALL)["key_padding_mask"]
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert_close(
        compiled(q, k, v, key_padding_mask=padding, window=4),
        ours(q, k, v, key_padding_mask=padding, window=4),
    )


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_that_are_not_positive(scale, backend, device):
    """torch's flash kernels hide keys before they scale, so that -inf comes out as inf or NaN."""
    for name in ("plain", "causal", "padding causal", "bias"):
        for shape in (SMALL, Shape(2, 2, 2, 64, 64, 16, 16)):
            q, k, v = heads(shape, torch.float32, device)
            options = call(name, shape, torch.float32, device) | {"scale": scale}
            assert_close(ours(q, k, v, **options).double(), truth(q, k, v, **options)[0], rtol=0, atol=1e-5)


def test_scores_far_apart_keep_their_order(backend, device):
    """flash-attention's float16 kernels overflowed where scores pass 65504."""
    q, k, v = heads(SMALL, torch.float16, device)
    q, k = q * 200, k * 200
    result = ours(q, k, v)
    assert result.isfinite().all()
    assert (result.double() - out(q, k, v)).abs().max() < 0.05
    assert math.isfinite(float(ours(q, k, v, softcap=50.0).sum()))
