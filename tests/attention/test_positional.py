"""Positional encodings against their formulas in float64, and what they are for: distances."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

import nnfast
from nnfast.core import extension
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
        torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format))
        * torch.polar(torch.ones_like(angle), angle)
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


@pytest.fixture(params=["triton", "cpu", "aten"])
def served(request, device):
    """Rotations are forced there."""
    x = torch.ones(2, 4, device=device)
    try:
        with nnfast.backend(request.param):
            rotary_embedding(x)
            yield request.param
    except nnfast.BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [48, 38])
def test_rotary_of_views(dtype, width, interleaved, served, device):
    """Of (N, L, H, D), innermost elsewhere, steps, expanded, of two and five dimensions; positions broadcast.

    A result is laid out as `torch.empty_like` says, but for torch's own.
    """
    torch.manual_seed(0)
    base = torch.randn(2, 6, 4, 48, device=device).to(dtype)
    views = {
        "length first": base.transpose(1, 2),
        "packed": torch.randn(2, 6, 3, 4, 48, device=device).to(dtype)[:, :, 1].transpose(1, 2),
        "features first": torch.randn(2, 4, 48, 6, device=device).to(dtype).mT,
        "steps": torch.randn(2, 4, 12, 96, device=device).to(dtype)[:, :, ::2, ::2],
        "expanded": base[:1, :1].expand(2, 4, 4, 48),
        "matrix": base[0, 0],
        "five": base.view(2, 3, 2, 4, 48),
        "shifted": torch.randn(2 * 4 * 48 + 1, device=device).to(dtype)[1:].view(2, 4, 48),
    }
    for name, x in views.items():
        shapes = [
            (x.shape[-2],),
            (1,),
            x.shape[:-1],
            (*x.shape[:-2], 1),
            (x.shape[0],) + (1,) * (x.dim() - 2),
        ]
        for positions in (torch.randint(0, 50, shape, device=device) for shape in shapes):
            leaf = x.detach().requires_grad_()
            y = rotary_embedding(leaf, positions, rotary_dim=width, interleaved=interleaved)
            where = positions.expand(x.shape[:-1])
            eps = torch.finfo(dtype).eps
            exact = turned(x, where, width, interleaved)
            assert_close(y.double(), exact, rtol=eps, atol=4 * eps, msg=lambda m, n=name: f"{n}: {m}")
            assert served == "aten" or x.dim() == 5 or y.stride() == torch.empty_like(x).stride(), name
            upstream = torch.randn_like(y)
            (grad,) = torch.autograd.grad(y, leaf, upstream)
            exact = turned(upstream, -where, width, interleaved)
            assert_close(grad.double(), exact, rtol=eps, atol=4 * eps, msg=lambda m, n=name: f"{n}: {m}")


def test_empty_rotary(served, device):
    for shape in ((0, 3, 4, 8), (2, 3, 0, 8), (0, 8)):
        x = torch.ones(shape, device=device, requires_grad=True)
        y = rotary_embedding(x)
        assert y.shape == x.shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_rotary_keeps_its_table():
    """It grows, moves with the module, and serves no type or inputs that it is not for."""
    rope = nnfast.RotaryEmbedding(8, max_length=4)
    assert rope.state_dict() == {}
    assert pickle.loads(pickle.dumps(rope)).table.shape == copy.deepcopy(rope).table.shape == (2, 4, 4)
    with torch.inference_mode():
        long = torch.randn(1, 2, 9, 8)
        assert_close(rope(long, long)[0], rotary_embedding(long))
    assert rope.table.shape == (2, 9, 4)
    x = torch.randn(1, 2, 5, 8, requires_grad=True)  # saves a part of a table made in inference mode
    assert_close(torch.autograd.grad(rope(x, x)[1].square().sum(), x)[0], 2 * x)
    for dtype in (torch.bfloat16, torch.float64):
        assert rope.to(dtype).table.dtype == torch.promote_types(dtype, torch.float32)
        for other in (torch.float16, torch.float64):
            q, k = torch.randn(1, 2, 5, 8).to(other), torch.randn(1, 1, 3, 8)
            for found, given in zip(rope(q, k), (q, k), strict=True):
                assert torch.equal(found, rotary_embedding(given))
    empty = nnfast.RotaryEmbedding(8).to("meta").to_empty(device="cpu")
    assert torch.equal(empty.table, nnfast.RotaryEmbedding(8).table)
    compiled = torch.compile(nnfast.RotaryEmbedding(8, max_length=4), fullgraph=True, backend="aot_eager")
    for q in (x, long):
        assert_close(compiled(q, q)[0], rotary_embedding(q))


def test_explanations_of_rotary():
    x = torch.zeros(2, 8, 4096, 64)
    ours = not extension.why_not("rotary", "CPU")
    for found in (nnfast.explain(rotary_embedding, x), nnfast.explain(nnfast.RotaryEmbedding(64), x, x)):
        assert found.backend == ("cpu" if ours else "aten")
    with nnfast.backend("cuda"), pytest.raises(nnfast.BackendError, match="rotary has no such backend"):
        rotary_embedding(x)


def test_rotary_compiles_to_torchs_operations():
    graphs = []

    def capture(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(rotary_embedding, fullgraph=True, backend=capture)(torch.randn(2, 4, 512, 64))
    assert not [n for n in graphs[0].graph.nodes if "nnfast" in str(n.target)]


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
    assert_close(torch.func.jvp(rotary_embedding, (x,), (x,))[1], rotary_embedding(x))
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
