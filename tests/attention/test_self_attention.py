"""SelfAttention: the numbers of the formula as users write it, folded or not, in every mode and type."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import nnfast
from nnfast.attention import self_attention
from nnfast.attention.self_attention import _fold
from nnfast.cli._tasks import SelfAttention as Seed  # as users write it


def pair(embed_size=32, heads=4, dtype=torch.float32):
    """The seed's module in float64, and in dtype, and ours, of the same weights."""
    seed, ours = Seed(embed_size, heads).to(dtype), nnfast.SelfAttention(embed_size, heads).to(dtype)
    assert list(seed.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(seed.state_dict())
    return copy.deepcopy(seed).double(), seed, ours


def masks(n, heads, queries, keys):
    """Every way to mask, one with queries that see nothing."""
    full = torch.ones(n, 1, queries, keys)
    full[0, :, 1] = 0
    return {
        "none": None,
        "keys": torch.rand(n, 1, 1, keys) > 0.3,
        "queries": (torch.rand(n, 1, queries, keys) > 0.3).int(),
        "heads": torch.rand(n, heads, queries, keys) > 0.3,
        "causal": torch.ones(queries, keys).tril(),
        "all hidden": torch.zeros(1, 1, 1, keys),
        "rows hidden": full,
    }


MASKS = list(masks(1, 1, 2, 2))


def results(module, inputs, mask, dtype):
    """Output and every gradient."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y = module(*inputs, mask)
    upstream = torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *module.parameters()], upstream)]


def assert_exact(ours, theirs, truth, floor=1e-6):
    """The promise, for all tensors; of very few numbers each, for their relative errors together.

    Scores of one key have no gradient: there only what cancels is rounded.
    """
    if truth[0].shape[-1] < 8:
        norms = [exact.norm().clamp_min(1e-12) for exact in truth]
        ours, theirs, truth = (
            [torch.cat([(t.double() / n).flatten() for t, n in zip(ts, norms, strict=True) if n > 1e-9])]
            for ts in (ours, theirs, truth)
        )
    largest = max(exact.norm() for exact in truth)
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        error, allowed = (mine.double() - exact).norm(), 2 * (other.double() - exact).norm()
        cancelled = exact.norm() < 1e-12 * largest
        rest = torch.finfo(other.dtype).eps * largest if cancelled else floor * exact.norm()
        assert error <= allowed + rest


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(7, 7), (3, 40), (40, 3), (40, 200), (1, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(32, 4), (24, 1), (6, 3)], ids=str)
def test_the_seeds_numbers(sizes, lengths, mask, dtype):
    torch.manual_seed(0)
    truth, seed, ours = pair(*sizes, dtype)
    queries, keys = lengths
    inputs = [torch.randn(3, length, sizes[0]).to(dtype) for length in (keys, keys, queries)]
    hidden = masks(3, sizes[1], max(queries, 2), keys)[mask]
    if hidden is not None and hidden.shape[-2] not in (1, queries):
        hidden = hidden[..., :queries, :]
    exact = results(truth, inputs, hidden, torch.float64)
    if dtype == torch.float16 and hidden is not None:  # -1e20 is none of its numbers: the seed raises
        largest = max(value.norm() for value in exact)
        for mine, value in zip(results(ours, inputs, hidden, dtype), exact, strict=True):
            assert (mine.double() - value).norm() <= 3e-3 * value.norm() + 1e-3 * largest * (
                value.norm() == 0
            )
        return
    assert_exact(results(ours, inputs, hidden, dtype), results(seed, inputs, hidden, dtype), exact)
    with torch.no_grad():
        theirs = seed(*inputs, hidden)
        assert ours(*inputs, hidden).dtype == dtype
        assert_exact([ours.eval()(*inputs, hidden)], [theirs], exact[:1])


def test_every_way_to_fold_is_taken_and_right():
    m = nnfast.SelfAttention(32, 2)
    found = {}
    for n, queries, keys in ((1, 2, 2), (1, 3, 40), (1, 40, 3), (1, 40, 40), (1, 1, 9)):
        k, q = torch.randn(n, keys, 32), torch.randn(n, queries, 32)
        for kept in (True, False):
            found[_fold(m, k, k, q, kept)] = True
    assert {(f.scores, f.values) for f in found} >= {
        ("", False),
        ("query", True),
        ("keys", False),
        ("keys", True),
        ("query", False),
    }


@pytest.mark.parametrize("write", ["step", "in place", "data", "load", "new parameter"])
def test_kept_weights_follow_the_parameters(write):
    _, seed, ours = pair()
    x = torch.randn(2, 5, 32)
    ours.eval()
    with torch.no_grad():
        assert_close(ours(x, x, x), seed(x, x, x, None))
        kept = self_attention._KEPT[ours]
        assert len(kept) == 1
        (before,) = kept.values()
        ours(x, x, x)
        assert next(iter(kept.values())) is before  # not made again
    weight = ours.keys.weight
    if write == "step":
        ours(x, x, x).sum().backward()
        torch.optim.SGD(ours.parameters(), 0.1).step()
    elif write == "in place":
        with torch.no_grad():
            weight.mul_(2)
    elif write == "data":
        weight.data.mul_(2)
    elif write == "load":
        ours.load_state_dict(Seed(32, 4).state_dict())
    else:
        ours.keys.weight = nn.Parameter(torch.randn(8, 8))
    seed.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert_close(ours(x, x, x), seed(x, x, x, None))


def test_alternating_train_and_eval():
    _, seed, ours = pair()
    x = torch.randn(2, 5, 32)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (seed, ours)]
    for _ in range(3):
        for m, optimizer in zip((seed, ours), optimizers, strict=True):
            m.train()(x, x, x, None).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        seed.eval(), ours.eval()
        with torch.no_grad():
            assert_close(ours(x, x, x, None), seed(x, x, x, None), rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_carry_no_kept_weights():
    _, _, ours = pair()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = ours.eval()(x, x, x)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert twin not in self_attention._KEPT
            assert_close(twin(x, x, x), expected)
            twin.values.weight.mul_(3)
            assert not torch.allclose(twin(x, x, x), expected)
        assert_close(ours(x, x, x), expected)


def test_hooks_and_replaced_children_are_called():
    _, seed, ours = pair()
    x = torch.randn(2, 5, 32)
    calls = []
    handle = ours.keys.register_forward_hook(lambda *_: calls.append("keys"))
    assert_close(ours(x, x, x), seed(x, x, x, None))
    assert calls == ["keys"]
    assert any("keys has hooks" in r for r in nnfast.explain(ours, x, x, x).reasons["triton"])
    with nnfast.backend("triton"), pytest.raises(nnfast.BackendError, match="keys has hooks"):
        ours(x, x, x)
    handle.remove()
    ours(x, x, x)
    assert calls == ["keys"]

    class Adapted(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    ours.values.__class__ = seed.values.__class__ = Adapted
    assert_close(ours(x, x, x), seed(x, x, x, None))
    nn.utils.parametrizations.weight_norm(ours.fc_out)
    assert_close(ours(x, x, x), seed(x, x, x, None))


@pytest.mark.parametrize("hidden", [False, True])
def test_autocast(hidden):
    truth, seed, ours = pair(64, 4)
    inputs = [torch.randn(2, 9, 64) for _ in range(3)]
    mask = masks(2, 4, 9, 9)["rows hidden"] if hidden else None
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = (results(m, inputs, mask, torch.float32) for m in (seed, ours))
    assert mine[0].dtype == torch.bfloat16
    assert mine[1].dtype == torch.float32
    assert_exact(mine, theirs, results(truth, inputs, mask, torch.float64))


@pytest.mark.parametrize("hidden", [False, True])
def test_compile_and_export(hidden):
    _, seed, ours = pair()
    inputs = [torch.randn(2, 9, 32) for _ in range(3)]
    mask = masks(2, 4, 9, 9)["rows hidden"] if hidden else None
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        results(compiled, inputs, mask, torch.float32),
        results(seed, inputs, mask, torch.float32),
        strict=True,
    ):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert_close(compiled.eval()(*inputs, mask), seed(*inputs, mask))
    exported = torch.export.export(ours.eval(), (*inputs, mask))
    assert_close(exported.module()(*inputs, mask), seed(*inputs, mask))


def test_second_derivatives_and_transforms():
    _, seed, ours = (m.double() for m in pair(8, 2))
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: ours(x, x, x), x)
    torch.autograd.gradgradcheck(lambda x: ours(x, x, x), x)
    many = torch.randn(3, 2, 3, 8, dtype=torch.float64)
    mask = torch.ones(3, 3).tril()
    mask[1] = 0
    assert_close(
        torch.vmap(lambda x: ours(x, x, x, mask))(many), torch.stack([seed(x, x, x, mask) for x in many])
    )


def test_what_is_not_for_the_kernels():
    _, seed, ours = pair(300, 1)
    x = torch.randn(2, 5, 300)
    assert_close(ours(x, x, x), seed(x, x, x, None))
    assert nnfast.explain(ours, x, x, x).backend == "aten"
    assert any("head_dim is 300" in r for r in nnfast.explain(ours, x, x, x).reasons["reference"])
    assert nnfast.explain(nnfast.SelfAttention(32, 4), *[torch.randn(2, 5, 32)] * 3).backend == "aten"


def test_no_lengths():
    _, seed, ours = pair()
    for n, queries, keys in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        v, k, q = (torch.randn(n, length, 32) for length in (keys, keys, queries))
        assert_close(ours(v, k, q), seed(v, k, q, None))


def test_memory_is_linear_in_the_length():
    from torch.profiler import ProfilerActivity, profile

    m = nnfast.SelfAttention(64, 1).eval()

    def largest(length):
        x = torch.randn(1, length, 64)
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            m(x, x, x)
        return max(event.cpu_memory_usage for event in found.events())

    largest(64)
    assert largest(8192) <= 1.2 * 4 * largest(2048)
    assert largest(8192) < 8192 * 8192  # bytes; the weights alone would take four times that


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nnfast.SelfAttention(10, 3), ["embed_size is 10", "heads is 3", "divide"]),
        (lambda: nnfast.SelfAttention(8, 0), ["heads is 0"]),
        (lambda: call((2, 5, 8), (2, 5, 8), (2, 5, 9)), ["query has shape", "embed_size=8"]),
        (lambda: call((2, 5, 8), (2, 6, 8), (2, 5, 8)), ["values has shape [2, 5, 8]", "same length"]),
        (lambda: call((3, 5, 8), (3, 5, 8), (2, 5, 8)), ["all the same N"]),
        (lambda: call((5, 8), (5, 8), (5, 8)), ["(N, length, embed_size=8)"]),
        (lambda: call((2, 5, 8), (2, 5, 8), (2, 4, 8), (4, 4)), ["mask has shape [4, 4]", "[2, 2, 4, 5]"]),
        (lambda: call((2, 5, 8), (2, 5, 8), (2, 4, 8), (1, 1, 1, 4, 5)), ["needs to broadcast to"]),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=r"nnfast\.SelfAttention") as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


def call(values, keys, query, mask=None):
    m = nnfast.SelfAttention(8, 2)
    return m(*(torch.randn(s) for s in (values, keys, query)), None if mask is None else torch.ones(mask))
