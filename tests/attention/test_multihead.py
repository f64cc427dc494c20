"""MultiheadAttention: nn.MultiheadAttention's results for everything it takes."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import nnfast
from nnfast.attention import multihead, op
from nnfast.core import extension, tuning

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")
EMBED, HEADS, N, QUERIES, KEYS = 8, 2, 3, 5, 7
KINDS = ("self", "key is value", "all three", "separate", "unbatched")


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    """Small inputs are nnfast's too."""
    monkeypatch.setattr(tuning, "MULTIHEAD_ELEMENTS", 0)
    monkeypatch.setattr(tuning, "MULTIHEAD_FASTPATH_LENGTH", 0)


def pair(dtype=torch.float32, **options):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, **options).to(dtype)
    ours = nnfast.MultiheadAttention(EMBED, HEADS, **options).to(dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases are zeros
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(kind, batch_first, dtype=torch.float32, queries=QUERIES):
    """Query, key and value, and N and the number of keys."""
    keys = queries if kind == "self" else KEYS
    kdim, vdim = (6, 10) if kind == "separate" else (EMBED, EMBED)

    def make(length, width):
        if kind == "unbatched":
            return torch.randn(length, width).to(dtype)
        return torch.randn(*((N, length) if batch_first else (length, N)), width).to(dtype)

    query = make(queries, EMBED)
    key = query if kind == "self" else make(keys, kdim)
    value = key if kind in ("self", "key is value") else make(keys, vdim)
    return (query, key, value), (1 if kind == "unbatched" else N, keys)


def masks(kind, n, keys):
    """Key padding masks x attention masks, each query with a key to see."""
    padding = torch.rand(n, keys) > 0.6
    padding[:, 0] = False
    padding = padding[0] if kind == "unbatched" else padding
    two, three = torch.rand(QUERIES, keys) > 0.5, torch.rand(n * HEADS, QUERIES, keys) > 0.5
    two[:, 0] = three[..., 0] = False
    infinite = torch.zeros(QUERIES, keys).masked_fill_(two, -torch.inf)
    paddings = (None, padding, torch.randn(padding.shape))
    return itertools.product(paddings, (None, two, three, infinite, torch.randn(three.shape)))


def results(module, given, grad, **options):
    """Output, and gradients of everything."""
    leaves = {id(x): x.detach().clone().requires_grad_(grad) for x in given}
    with torch.set_grad_enabled(grad):
        y, weights = module(*(leaves[id(x)] for x in given), need_weights=False, **options)
    assert weights is None
    if not grad:
        return [y]
    upstream = torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [*leaves.values(), *module.parameters()], upstream)]


@pytest.mark.parametrize(
    "extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True, "bias": False}], ids=str
)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_it_takes(kind, batch_first, extra):
    sizes = {"kdim": 6, "vdim": 10} if kind == "separate" else {}
    theirs, ours = pair(batch_first=batch_first, **sizes, **extra)
    given, (n, keys) = inputs(kind, batch_first)
    for padding, mask in masks(kind, n, keys):
        options = {"key_padding_mask": padding, "attn_mask": mask}
        assert nnfast.explain(ours, *given, need_weights=False, **options).backend is not None
        for training, grad in ((True, True), (False, True), (False, False)):
            expected = results(theirs.train(training), given, grad, **options)
            assert_close(results(ours.train(training), given, grad, **options), expected)
    with nnfast.backend("cuda"), pytest.raises(nnfast.BackendError):  # so nnfast served
        ours(*given, need_weights=False)


@pytest.mark.parametrize("kind", ["self", "unbatched"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_biases_are_added_by_our_kernels(kind, batch_first, monkeypatch):
    if missing := extension.why_not("attention.cpu", "CPU"):
        pytest.skip(missing)
    monkeypatch.setattr(tuning, "ATTENTION_QUERIES", 1)
    monkeypatch.setattr(tuning, "ATTENTION_SCORES", 0)
    calls, run = [], op.PROJECTED
    monkeypatch.setattr(op, "PROJECTED", lambda *args: calls.append(1) or run(*args))
    for dtype in (torch.float32, torch.float64):
        theirs, ours = pair(dtype, batch_first=batch_first)
        (x, *_), (n, _) = inputs(kind, batch_first, dtype)
        for both in masks(kind, n, QUERIES):
            padding, mask = (x.to(dtype) if x is not None and x.dtype != torch.bool else x for x in both)
            options = {"key_padding_mask": padding, "attn_mask": mask}
            expected = results(theirs, (x, x, x), False, **options)
            before = len(calls)
            assert_close(results(ours, (x, x, x), False, **options), expected)
            assert len(calls) == before + 1
            results(ours, (x, x, x), True, **options)
            assert len(calls) == before + 1
    ours.in_proj_bias = nn.Parameter(torch.stack((ours.in_proj_bias.detach(),) * 2, 1)[:, 0])  # with gaps
    assert_close(results(ours, (x, x, x), False, **options), expected)
    assert len(calls) == before + 2
    ours.train().dropout = 0.5
    results(ours, (x, x, x), False)
    assert len(calls) == before + 2


@pytest.mark.parametrize("batch_first", [False, True])
def test_no_keys_but_one_of_zeros(batch_first):
    theirs, ours = pair(batch_first=batch_first, add_zero_attn=True)
    (query, *_), (n, _) = inputs("key is value", batch_first)
    keys = torch.empty((n, 0, theirs.embed_dim) if batch_first else (0, n, theirs.embed_dim))
    expected = theirs(query, keys, keys, need_weights=False)[0]
    assert_close(ours(query, keys, keys, need_weights=False)[0], expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_causal(batch_first, padded):
    theirs, ours = pair(batch_first=batch_first)
    given, (n, keys) = inputs("key is value", batch_first)
    padding = (torch.arange(keys) > 4).expand(n, keys) if padded else None
    for mask in (
        torch.ones(QUERIES, keys).triu(1).bool(),
        torch.zeros(QUERIES, keys).fill_(-torch.inf).triu(1),
    ):
        options = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": True}
        assert_close(results(ours, given, True, **options), results(theirs, given, True, **options))
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        ours(*given, need_weights=False, is_causal=True)


@pytest.mark.parametrize("average", [False, True])
def test_the_weights(average):
    theirs, ours = pair()
    given, _ = inputs("all three", False)
    expected = theirs(*given, average_attn_weights=average)
    assert_close(ours(*given, average_attn_weights=average), expected)
    assert_close(ours(*given, need_weights=False)[0], expected[0])
    assert "need_weights is True" in nnfast.explain(ours, *given).reasons["triton"][0]
    with nnfast.backend("triton"), pytest.raises(nnfast.BackendError, match="need_weights is True"):
        ours(*given)


def test_gradient_of_the_mask():
    theirs, ours = pair()
    given, (n, keys) = inputs("all three", False)
    found = []
    for m in (theirs, ours):
        mask = torch.linspace(-1, 1, n * HEADS * QUERIES * keys).view(-1, QUERIES, keys).requires_grad_()
        found.append(
            torch.autograd.grad(m(*given, attn_mask=mask, need_weights=False)[0].square().sum(), mask)
        )
    assert_close(*found)


def test_queries_that_see_nothing():
    """torch gives NaN on some paths; here it is out_proj's bias, and gradients are finite."""
    theirs, ours = pair(batch_first=True)
    given, (n, keys) = inputs("self", True)
    padding = torch.zeros(n, keys, dtype=torch.bool)
    padding[1] = True
    for grad in (True, False):
        found = results(ours, given, grad, key_padding_mask=padding)
        assert all(x.isfinite().all() for x in found)
        assert_close(found[0][1], ours.out_proj.bias.expand(keys, -1))
        expected = theirs(*given, key_padding_mask=padding, need_weights=True)[0]
        assert expected[1].isnan().all()
        assert_close(found[0][0], expected[0])


def exactly(module, x):
    """`results` of self-attention with a gradient, in long double: of float64 torch's own is no truth."""
    wide = [p.detach().double().numpy().astype(np.longdouble) for p in (x, *module.parameters())]
    x, w, b, w_out, b_out = wide
    x = x if module.batch_first else x.swapaxes(0, 1)
    n, length, _ = x.shape
    scale = np.longdouble(module.head_dim) ** -0.5

    def heads(t):
        return t.reshape(n, length, HEADS, -1).swapaxes(1, 2)

    def rows(t):
        return t.swapaxes(1, 2).reshape(n, length, -1)

    q, k, v = map(heads, np.split(x @ w.T + b, 3, axis=-1))
    s = scale * q @ k.swapaxes(-1, -2)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = rows(p @ v)
    y = o @ w_out.T + b_out
    shape = y.shape if module.batch_first else y.swapaxes(0, 1).shape
    upstream = torch.linspace(-1, 2, y.size).reshape(shape).to(module.in_proj_weight.dtype)
    g = upstream.double().numpy().astype(np.longdouble)
    g = g if module.batch_first else g.swapaxes(0, 1)
    of_o = heads(g @ w_out)
    of_p = of_o @ v.swapaxes(-1, -2)
    of_s = p * (of_p - (of_p * p).sum(-1, keepdims=True)) * scale
    parts = (of_s @ k, of_s.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ of_o)
    of_qkv = np.concatenate([rows(t) for t in parts], axis=-1)
    of_x = of_qkv @ w

    def products(a, b):
        return np.tensordot(a, b, ((0, 1), (0, 1)))

    y, of_x = (t if module.batch_first else t.swapaxes(0, 1) for t in (y, of_x))
    return [y, of_x, products(of_qkv, x), of_qkv.sum((0, 1)), products(g, o), g.sum((0, 1))]


@pytest.mark.parametrize("length", [QUERIES, 200])  # more keys than backward on the CPU takes at once
def test_dtypes(length, dtype):
    for batch_first in (False, True):
        theirs, ours = pair(dtype, batch_first=batch_first)
        given, _ = inputs("self", batch_first, dtype, length)
        exact = exactly(theirs, given[0])
        found = results(ours, given, True), results(theirs, given, True)
        for mine, other, value in zip(*found, exact, strict=True):
            assert mine.dtype == other.dtype == dtype
            norm = np.sqrt((value**2).sum())
            error, torchs = (np.sqrt(((x.double().numpy() - value) ** 2).sum()) for x in (mine, other))
            assert error <= 2 * torchs + torch.finfo(dtype).eps * max(1, norm)


@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}], ids=str)
def test_autocast(extra):
    theirs, ours = pair(**extra)
    given, (n, keys) = inputs("self", False)
    mask = torch.randn(n * HEADS, QUERIES, keys)
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = (results(m, given, True, attn_mask=mask) for m in (ours, theirs))
    exact = results(theirs, given, True, attn_mask=mask)
    for a, b, value in zip(mine, other, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - value).norm() <= 2 * (b - value).norm() + 1e-2 * value.norm()


def test_dropout(monkeypatch):
    theirs, ours = pair(dropout=0.4)
    given, _ = inputs("self", False)
    assert "dropout on the CPU" in nnfast.explain(ours, *given, need_weights=False).reasons["triton"][0]
    monkeypatch.setattr(tuning, "MULTIHEAD_DROPOUT_WEIGHTS", 0)
    torch.manual_seed(1)
    first = ours(*given, need_weights=False)[0]
    second = ours(*given, need_weights=False)[0]
    torch.manual_seed(1)
    assert torch.equal(ours(*given, need_weights=False)[0], first)
    assert not torch.equal(first, second)
    with torch.no_grad():
        mean = torch.stack([ours(*given, need_weights=False)[0] for _ in range(400)]).mean(0)
        expected = theirs.eval()(*given, need_weights=False)[0]
        assert (mean - expected).abs().max() < 0.1
        assert_close(ours.eval()(*given, need_weights=False)[0], expected)


def test_nested_tensors():
    theirs, ours = (m.eval() for m in pair(batch_first=True))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([torch.randn(3, EMBED), torch.randn(5, EMBED)])
        expected = theirs(x, x, x, need_weights=False)[0]
        found = ours(x, x, x, need_weights=False)[0]
    for mine, other in zip(found.unbind(), expected.unbind(), strict=True):
        assert_close(mine, other)


@pytest.mark.parametrize("mask", ["none", "padding", "added padding", "2-D", "3-D", "3-D added", "causal"])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_large_batches_go_in_slices(mask, extra, monkeypatch):
    """5 sequences, at most 2 at once: each attends as in one, and a mask goes with its sequence."""
    monkeypatch.setattr(tuning, "ATTENTION_QUERIES", 0)
    theirs, ours = (m.eval() for m in pair(batch_first=True, **extra))
    x = torch.randn(5, KEYS, EMBED)
    options = {}
    if "padding" in mask:
        padding = torch.rand(5, KEYS) < 0.3
        options["key_padding_mask"] = torch.randn(5, KEYS) if "added" in mask else padding
    elif mask == "2-D":
        options["attn_mask"] = torch.rand(KEYS, KEYS).fill_diagonal_(1) < 0.4
    elif "3-D" in mask:
        added = torch.randn(5 * HEADS, KEYS, KEYS)
        options["attn_mask"] = added if "added" in mask else (added > 1).triu(1)
    elif mask == "causal":
        options |= {"attn_mask": torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1), "is_causal": True}
    seen = []
    original = multihead.attention

    def attention(q, k, v, **options):
        seen.append(q.shape[0])
        return original(q, k, v, **options)

    monkeypatch.setattr(multihead, "attention", attention)
    monkeypatch.setattr(tuning, "MULTIHEAD_SLICE", 3 * 2 * x[0].numel() * x.element_size())
    with torch.no_grad():
        expected = theirs(x, x, x, need_weights=False, **options)[0]
        out = ours(x, x, x, need_weights=False, **options)[0]
        assert seen == ([2, 2, 1] if op.is_for_cpu(x, KEYS) else [5])
        assert_close(out, expected)
        assert out.stride() == (KEYS * EMBED, EMBED, 1)
        seen.clear()
        y = x.clone()
        ours(x, y, x, need_weights=False, **options)
        ours(x[:2].clone(), *(x[:2].clone(),) * 2, need_weights=False)
        assert seen == [5, 2]
        seen.clear()
        frozen = copy.deepcopy(ours).requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(lambda x: frozen(x, x, x, need_weights=False, **options)[0], x, check_trace=False)
        assert seen == [5]
    seen.clear()
    ours(x, x, x, need_weights=False, **options)[0].sum().backward()  # the parameters ask for gradients
    assert seen == [5]


@pytest.mark.parametrize("batch_first", [False, True])
def test_compile_and_export(batch_first):
    theirs, ours = pair(batch_first=batch_first)
    given, (n, keys) = inputs("self", batch_first)
    padding = torch.zeros(n, keys, dtype=torch.bool)
    padding[:, -2:] = True
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = results(theirs, given, True, key_padding_mask=padding)
    assert_close(results(compiled, given, True, key_padding_mask=padding), expected)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ours

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    exported = torch.export.export(Block().eval(), given[:1])
    assert_close(exported.module()(given[0]), theirs.eval()(*given, need_weights=False)[0])


def test_copies_pickles_and_hooks():
    _, ours = pair()
    given, _ = inputs("self", False)
    expected = ours(*given, need_weights=False)[0]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is nnfast.MultiheadAttention
        assert_close(twin(*given, need_weights=False)[0], expected)
    calls = []
    ours.register_forward_hook(lambda *_: calls.append(1))
    ours(*given, need_weights=False)
    assert calls == [1]


def test_second_derivatives_and_transforms():
    _, ours = pair(torch.float64)
    x = torch.randn(3, 2, EMBED, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x: ours(x, x, x, need_weights=False)[0], x)
    many = torch.randn(4, 3, 2, EMBED, dtype=torch.float64)
    found = torch.vmap(lambda x: ours(x, x, x, need_weights=False)[0])(many)
    assert_close(found, torch.stack([ours(x, x, x, need_weights=False)[0] for x in many]))


def test_small_inputs_are_torchs(monkeypatch):
    monkeypatch.undo()
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 5, EMBED)
    with torch.no_grad():
        found = nnfast.explain(ours.eval(), x, x, x, need_weights=False)
        assert found.backend == "aten"
        assert "80 elements" in found.reasons["triton"][0]
        large = nnfast.MultiheadAttention(512, 8, batch_first=True).eval()
        x = torch.randn(8, 128, 512)
        ours_serve = not extension.why_not("attention.cpu", "CPU")
        assert (nnfast.explain(large, x, x, x, need_weights=False).backend == "cpu") == ours_serve
        large, x = large.bfloat16(), x.bfloat16()
        reasons = nnfast.explain(large, x, x, x, need_weights=False).reasons
        assert "fused inference path" in reasons["triton"][0]
        with nnfast.backend("reference"):
            assert nnfast.explain(large, x, x, x, need_weights=False).backend == "reference"


@pytest.mark.parametrize(
    "break_it",
    [
        lambda q: ((q, q[..., :-1], q), {}),
        lambda q: ((q, q[:, :-1], q), {}),
        lambda q: ((q, q, q[:-1]), {}),
        lambda q: ((q[0], q, q), {}),
        lambda q: ((q, q, q), {"attn_mask": torch.ones(2, 2).bool()}),
        lambda q: ((q, q, q), {"attn_mask": torch.ones(q.shape[0], q.shape[0]).int()}),
        lambda q: ((q, q, q), {"key_padding_mask": torch.ones(1, 1, 1).bool()}),
        lambda q: ((q.double(), q.double(), q.double()), {}),
    ],
)
def test_bad_input_raises_torchs_errors(break_it):
    theirs, ours = pair()
    given, options = break_it(torch.randn(5, 3, EMBED))
    with pytest.raises(Exception) as expected:
        theirs(*given, need_weights=False, **options)
    with pytest.raises(type(expected.value)) as found:
        ours(*given, need_weights=False, **options)
    assert str(found.value) == str(expected.value)


MODULEINFO = next(info for info in module_db if info.module_cls is nn.MultiheadAttention)
OPINFO = next(op for op in op_db if op.name == "nn.functional.multi_head_attention_forward")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_moduleinfo(training, batch_first):
    """torch's own inputs, as they are and with need_weights=False."""
    count = 0
    torch.manual_seed(0)
    for entry in MODULEINFO.module_inputs_func(
        MODULEINFO, "cpu", torch.float32, requires_grad=True, training=training
    ):
        made, given = entry.constructor_input, entry.forward_input
        options = {**made.kwargs, "dropout": 0.0}
        if options.get("batch_first", False) is not batch_first:
            continue
        theirs = nn.MultiheadAttention(*made.args, **options).train(training)
        ours = nnfast.MultiheadAttention(*made.args, **options).train(training)
        ours.load_state_dict(theirs.state_dict())
        for weights in ({}, {"need_weights": False}):
            call = {**given.kwargs, **weights}
            found, expected = ours(*given.args, **call), theirs(*given.args, **call)
            blind = expected[0].isnan()  # a query that sees nothing, see above
            assert_close(found[0].masked_fill(blind, 0), expected[0].masked_fill(blind, 0))
            if expected[1] is not None:
                assert_close(found[1], expected[1], equal_nan=True)
        count += 1
    assert count >= 8


def test_opinfo():
    """The samples of F.multi_head_attention_forward without dropout, given to both modules."""
    count = 0
    torch.manual_seed(0)
    for sample in OPINFO.sample_inputs("cpu", torch.float32, requires_grad=False):
        query, (key, value, embed, heads, *rest), options = sample.input, sample.args, sample.kwargs
        weight, bias, bias_k, bias_v, zero, dropout, out_weight, out_bias = rest
        if (options.get("training", True) and dropout) or options.get("use_separate_proj_weight"):
            continue
        made = {"add_bias_kv": bias_k is not None, "add_zero_attn": zero}
        both = [
            kind(embed, heads, **made).eval() for kind in (nn.MultiheadAttention, nnfast.MultiheadAttention)
        ]
        state = {"in_proj_weight": weight, "in_proj_bias": bias, "out_proj.weight": out_weight}
        state |= {"out_proj.bias": out_bias}
        state |= (
            {"bias_k": bias_k.view(1, 1, -1), "bias_v": bias_v.view(1, 1, -1)} if bias_k is not None else {}
        )
        call = {k: options.get(k) for k in ("key_padding_mask", "attn_mask")}
        found = []
        for m in both:
            m.load_state_dict({k: v for k, v in state.items() if v is not None}, strict=False)
            found.append(m(query, key, value, need_weights=False, **call)[0])
        found[1].masked_fill_(found[0].isnan(), torch.nan)
        assert_close(found[1], found[0], equal_nan=True)
        count += 1
    assert count
