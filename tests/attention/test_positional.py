"""Positional encodings against their formulas in float64, and what they are for: distances."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

import nnfast
from nnfast.functional import rotary_embedding


def sinusoids(length, width, base=10000.0):
    p = torch.arange(length, dtype=torch.float64)
    columns = []
    for i in range(width // 2):
        columns += [torch.sin(p / base ** (2 * i / width)), torch.cos(p / base ** (2 * i / width))]
    return torch.stack(columns, 1)


def turned(x, positions, width, interleaved, base=10000.0):
    """Complex numbers times e^(i angle)."""
    angle = positions[..., None].double() * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    x = x.double()
    first, rest = x[..., :width], x[..., width:]
    pairs = first.unflatten(-1, (-1, 2)) if interleaved else first.unflatten(-1, (2, -1)).transpose(-1, -2)
    z = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)
    )
    z = z if interleaved else z.transpose(-1, -2)
    return torch.cat((z.flatten(-2), rest), -1)


def test_sinusoids(dtype):
    m = nnfast.SinusoidalPositionalEncoding(16, max_length=8).to(dtype)
    assert m.state_dict() == {}
    x = torch.zeros(2, 8, 16, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert_close(m(x)[1].double(), sinusoids(8, 16), rtol=0, atol=eps)
    assert m(x).dtype == dtype
    assert_close(m(x[0]), m(x)[0])
    # longer than the table
    long = nnfast.SinusoidalPositionalEncoding(16, max_length=8)(torch.zeros(1, 5000, 16))
    assert_close(long[0].double(), sinusoids(5000, 16), rtol=0, atol=1e-7)
    last = nnfast.SinusoidalPositionalEncoding(16, batch_first=False).to(dtype)
    assert_close(last(x.transpose(0, 1)), m(x).transpose(0, 1))


def test_sinusoids_of_distances():
    """PE[p + k] is the same rotation of PE[p] for every p."""
    table = nnfast.SinusoidalPositionalEncoding(8).double().table
    products = table[:100] @ table[:100].T
    for k in (1, 7, 50):
        assert_close(products.diagonal(k), products[0, k].expand(100 - k), rtol=0, atol=1e-6)


def test_sinusoids_dropout_and_compile():
    m = nnfast.SinusoidalPositionalEncoding(8, 4, dropout=0.5)
    x = torch.randn(2, 9, 8, requires_grad=True)
    assert (m(x) == 0).any()
    m.eval()
    expected = copy.deepcopy(m)(x)
    assert_close(torch.compile(m, fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.autograd.grad(m(x).sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [None, 4])
def test_rotary(dtype, width, interleaved):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64).to(dtype).requires_grad_()
    for positions in (None, torch.tensor([4000, 1, 2, 3, 100]), torch.arange(10).view(2, 1, 5)):
        y = rotary_embedding(x, positions, rotary_dim=width, interleaved=interleaved)
        where = torch.arange(5) if positions is None else positions
        exact = turned(x, where, width or 8, interleaved)
        assert y.dtype == dtype
        eps = torch.finfo(dtype).eps
        assert_close(y.double(), exact, rtol=eps, atol=eps)
        upstream = torch.randn_like(x)
        (grad,) = torch.autograd.grad(y, x, upstream)
        assert_close(grad.double(), turned(upstream, -where, width or 8, interleaved), rtol=eps, atol=eps)


def test_rotary_scores_depend_on_distances():
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    rope = nnfast.RotaryEmbedding(8)
    many, others = rope(q.expand(1, 1, 50, 8), k.expand(1, 1, 50, 8))
    scores = (many @ others.transpose(-1, -2))[0, 0]
    for distance in (-20, 0, 3):
        diagonal = scores.diagonal(distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(scores[0, 0], scores[0, 1])


def test_rotary_derivatives_transforms_and_compile():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(rotary_embedding, x)
    torch.autograd.gradgradcheck(rotary_embedding, x)
    assert_close(torch.vmap(rotary_embedding)(x), rotary_embedding(x))
    compiled = torch.compile(rotary_embedding, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), rotary_embedding(x))
    assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], 2 * x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nnfast.SinusoidalPositionalEncoding(7), ValueError, "embed_size is 7"),
        (
            lambda: nnfast.SinusoidalPositionalEncoding(8)(torch.ones(2, 3, 6)),
            ValueError,
            r"shape \[2, 3, 6\]",
        ),
        (lambda: nnfast.RotaryEmbedding(7), ValueError, "rotary_dim is 7"),
        (lambda: nnfast.RotaryEmbedding(8, rotary_dim=10), ValueError, "rotary_dim is 10"),
        (
            lambda: nnfast.RotaryEmbedding(8)(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 6)),
            ValueError,
            "k has",
        ),
        (lambda: rotary_embedding(torch.ones(2, 4).int()), TypeError, "dtype torch.int32"),
        (lambda: rotary_embedding(torch.ones(4)), ValueError, r"shape \[4\]"),
        (
            lambda: rotary_embedding(torch.ones(2, 4), torch.arange(3)),
            ValueError,
            r"positions has shape \[3\]",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
