"""TransformerEncoderLayer against torch's: whichever of the two forwards serves, and who that is."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import nnfast
from nnfast.core import extension, tuning

N, LENGTH, EMBED, HEADS = 2, 48, 16, 4
OURS = not extension.why_not("attention.cpu", "CPU")


@pytest.fixture(autouse=True)
def short_lengths(monkeypatch):
    """The parts serve from few elements on."""
    for name in ("ENCODER_LENGTH", "ENCODER_LENGTH_MASKED", "MULTIHEAD_ELEMENTS"):
        monkeypatch.setattr(tuning, name, 0)


def pair(dtype=torch.float32, **options):
    """torch's and ours, with the same parameters, in eval mode."""
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(EMBED, HEADS, 32, **{"batch_first": True, **options}).to(dtype).eval()
    ours = copy.deepcopy(theirs)
    nnfast.swap(ours)
    assert type(ours) is nnfast.TransformerEncoderLayer
    assert type(ours.self_attn) is nnfast.MultiheadAttention
    assert repr(ours) == repr(theirs)
    return theirs, ours


def masks():
    """src_mask x src_key_padding_mask, each place with one to see."""
    padding = torch.rand(N, LENGTH) > 0.6
    padding[:, 0] = False
    mask = torch.rand(LENGTH, LENGTH) > 0.5
    mask[:, 0] = False
    of_heads = mask.expand(N * HEADS, LENGTH, LENGTH)
    return itertools.product((None, mask, torch.randn(LENGTH, LENGTH), of_heads), (None, padding))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_everything_it_takes(batch_first, norm_first):
    theirs, ours = pair(batch_first=batch_first, norm_first=norm_first, activation="gelu", dropout=0.0)
    x = torch.randn(*((N, LENGTH) if batch_first else (LENGTH, N)), EMBED)
    for mask, padding in masks():
        options = {"src_mask": mask, "src_key_padding_mask": padding}
        with torch.no_grad():
            served = nnfast.explain(ours, x, **options)
            assert served.backend == ("cpu" if OURS and batch_first else "aten"), served
            expected = theirs(x, **options)
            if (
                mask is not None and mask.is_floating_point()
            ):  # which torch's fused operation takes for a bool
                with torch.enable_grad():
                    expected = theirs(x, **options).detach()
            assert_close(ours(x, **options), expected)
        for training in (False, True):
            leaf = x.clone().requires_grad_()
            found, expected = (
                torch.autograd.grad(
                    m.train(training)(leaf, **options).square().mean(), [leaf, *m.parameters()]
                )
                for m in (ours, theirs)
            )
            assert_close(found, expected)
        ours.eval(), theirs.eval()
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    with torch.no_grad():
        assert_close(ours(x, causal, is_causal=True), theirs(x, causal, is_causal=True))
        if batch_first:  # else nn.MultiheadAttention asks for the mask
            assert_close(ours(x, is_causal=True), theirs(x, is_causal=True))
        assert_close(ours(x[0]), theirs(x[0]))


def test_dtypes(dtype):
    theirs, ours = pair(dtype)
    x = torch.randn(N, LENGTH, EMBED).to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(x.double())
        found, expected = ours(x), theirs(x)
    assert found.dtype == expected.dtype
    floor = 8 * torch.finfo(dtype).eps * float(exact.norm())
    assert float((found - exact).norm()) <= 2 * float((expected - exact).norm()) + floor


def test_who_serves(monkeypatch):
    theirs, ours = pair()
    x = torch.randn(N, LENGTH, EMBED)
    with torch.no_grad():
        with nnfast.backend("cuda"), pytest.raises(nnfast.BackendError):
            ours(x)
        with nnfast.backend("aten"):
            assert torch.equal(ours(x), theirs(x))
            assert nnfast.explain(ours, x).backend == "aten"
        with nnfast.backend("reference"):
            assert_close(ours(x), theirs(x))
            assert nnfast.explain(ours, x).backend == "reference"
        with monkeypatch.context() as few:
            few.setattr(tuning, "MULTIHEAD_ELEMENTS", x.numel() + 1)
            few.setattr(ours, "_sa_block", None)  # the fused operation does without
            assert nnfast.explain(ours, x).backend == "aten"
            assert torch.equal(ours(x), theirs(x))
        monkeypatch.setattr(tuning, "ENCODER_LENGTH", LENGTH + 1)
        found = nnfast.explain(ours, x)
        assert found.backend == "aten"
        assert (f"length {LENGTH}; measured" in found.reasons["cpu"][0]) == OURS
        assert torch.equal(ours(x), theirs(x))  # the fused operation itself
        padding = torch.zeros(N, LENGTH, dtype=torch.bool)
        assert (nnfast.explain(ours, x, None, padding).backend == "cpu") == OURS
        theirs_unfused, unfused = pair(activation=nn.SiLU())
        assert (nnfast.explain(unfused, x).backend == "cpu") == OURS
        assert_close(unfused(x), theirs_unfused(x))
        ours.self_attn.__class__ = nn.MultiheadAttention
        assert "self_attn is torch's" in nnfast.explain(ours, x).reasons["cpu"]
        assert torch.equal(ours(x), theirs(x))


def test_in_an_encoder_with_nested_tensors():
    theirs = nn.TransformerEncoder(pair()[0], 2)
    ours = copy.deepcopy(theirs)
    nnfast.swap(ours)
    x = torch.randn(N, LENGTH, EMBED)
    padding = torch.arange(LENGTH).expand(N, LENGTH) >= torch.tensor([[LENGTH], [25]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(ours(x), theirs(x))
        assert_close(ours(x, src_key_padding_mask=padding), theirs(x, src_key_padding_mask=padding))


def test_copies_compile_and_restore():
    theirs, ours = pair()
    x = torch.randn(N, LENGTH, EMBED)
    with torch.no_grad():
        expected = theirs(x)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(twin) is nnfast.TransformerEncoderLayer
            assert_close(twin(x), expected)
        assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), expected)
    nnfast.restore(ours)
    assert type(ours) is nn.TransformerEncoderLayer


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m(x[..., :-1]),
        lambda m, x: m(x, torch.ones(2, 2).bool()),
        lambda m, x: m(x, src_key_padding_mask=torch.ones(N, LENGTH).int()),
        lambda m, x: m(x[0, 0]),
    ],
)
def test_bad_input_raises_torchs_errors(call):
    theirs, ours = pair()
    x = torch.randn(N, LENGTH, EMBED)
    for m in (theirs, ours):
        with torch.no_grad(), pytest.raises((RuntimeError, AssertionError)):
            call(m, x)
