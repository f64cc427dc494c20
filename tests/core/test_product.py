"""Matrix products: errors against float64, layouts, a linear layer's gradients, who makes them, bad input."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnfast
from nnfast.core import extension, product, tuning

pytestmark = pytest.mark.skipif(
    bool(extension.why_not("product_", "CPU")), reason="the library has no CPU kernels"
)

SHAPES = [
    *[(1, 1, 1), (7, 5, 3), (6, 16, 256), (64, 96, 300), (130, 33, 513), (257, 40, 1100)],
    *[(1000, 70, 64), (2, 2100, 300), (33, 700, 1500), (13, 20, 5003)],
]
"""(M, N, K): one element; whole bands, panels and depths and not; several parts of columns and of sums; few
elements of many sums."""

LAYOUTS = {
    "rows": lambda m, n, x: x,
    "columns": lambda m, n, x: x.t().contiguous().t(),
    "strided": lambda m, n, x: F.pad(x, (2, 3, 1, 0))[1:, 2 : 2 + n],
    "steps": lambda m, n, x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda m, n, x: x[:1].expand(m, n),
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check(result: Tensor, torchs: Tensor, truth: Tensor) -> None:
    """At most twice torch's error, and what a correctly rounded result may have."""
    floor = truth.norm() * torch.finfo(result.dtype).eps / 2
    assert (result - truth).norm() <= 2 * (torchs - truth).norm() + floor


@pytest.fixture
def ours(monkeypatch):
    """Every linear layer in float32 is ours, on any processor."""
    monkeypatch.setattr(product, "missing", lambda: "")
    monkeypatch.setattr(tuning, "PRODUCT", 0)
    monkeypatch.setattr(tuning, "PRODUCT_ROWS", 0)


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape, layout, wide):
    m, n, k = shape
    dtype = torch.float64 if wide else torch.float32
    a, b = (
        LAYOUTS[layout](m, k, randn(m, k, dtype=dtype)),
        LAYOUTS[layout](k, n, randn(k, n, seed=1, dtype=dtype)),
    )
    bias, before = randn(n, seed=2, dtype=dtype), randn(m, n, seed=3, dtype=dtype)
    truth = a.double() @ b.double()
    around = torch.full((m, n + 3), torch.nan, dtype=dtype)
    out = around[:, 1 : n + 1].copy_(before)
    torch.ops.nnfast.product_(out, a, b, None, True)
    one = bias[:1].expand(n)
    for found, torchs, true in [
        (product.product(a, b), a @ b, truth),
        (product.product(a, b, bias), torch.addmm(bias, a, b), truth + bias.double()),
        (product.product(a, b, one), torch.addmm(one, a, b), truth + one.double()),
        (out, torch.addmm(before, a, b), truth + before.double()),
    ]:
        if wide:  # torch's are no more exact: a bound of the sum's terms, of which each is rounded once
            terms = a.abs() @ b.abs() + true.abs()
            assert ((found - true).abs() <= 4 * torch.finfo(dtype).eps * terms).all()
        else:
            check(found, torchs, true)
    assert around[:, [0, n + 1, n + 2]].isnan().all()


def test_nothing_to_sum():
    out = torch.full((5, 40), 7.0)
    torch.ops.nnfast.product_(out, torch.empty(5, 0), torch.empty(0, 40), None, True)
    assert (out == 7).all()
    assert (product.product(torch.empty(5, 0), torch.empty(0, 40)) == 0).all()
    assert torch.equal(product.product(torch.empty(5, 0), torch.empty(0, 3), torch.ones(3)), torch.ones(5, 3))
    assert product.product(torch.empty(0, 4), torch.empty(4, 3)).shape == (0, 3)


def test_infinity_and_nan_stay_in_their_rows():
    a, b = randn(40, 300), randn(300, 50, seed=1)
    a[3, 7], a[20, 299], b[5, 9] = torch.inf, torch.nan, -torch.inf
    found, truth = product.product(a, b), a.double() @ b.double()
    finite = truth.isfinite()
    torch.testing.assert_close(found[~finite], truth[~finite].float(), equal_nan=True, rtol=0, atol=0)
    check(found[finite], (a @ b)[finite], truth[finite])


@pytest.mark.parametrize("shape", [(500, 300, 700), (64, 48, 9000)], ids=str)
def test_results_repeat_with_any_number_of_threads(shape):
    m, n, k = shape
    a, b = randn(m, k), randn(k, n, seed=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results += [product.product(a, b), product.product(a.t().contiguous().t(), b)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


def test_operator():
    args = (torch.empty(9, 20), randn(9, 30), randn(30, 20, seed=1))
    for bias, add in ((None, False), (randn(20), False), (None, True)):
        torch.library.opcheck(torch.ops.nnfast.product_.default, (*args, bias, add))


@pytest.mark.parametrize("frozen", [None, 0, 1, 2], ids=["all", "x", "weight", "bias"])
def test_gradients(frozen):
    inputs = [randn(3, 5, 40, dtype=torch.float64), randn(20, 40, seed=1, dtype=torch.float64)]
    inputs += [randn(20, seed=2, dtype=torch.float64)]
    for i, x in enumerate(inputs):
        x.requires_grad_(i != frozen)
    assert torch.autograd.gradcheck(product._Linear.apply, inputs)
    assert torch.autograd.gradgradcheck(product._Linear.apply, inputs)


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96, 128), (7, 33, 64), (5, 6, 7, 50)], ids=str)
def test_linear(shape, bias):
    x, w = randn(*shape), randn(72, shape[-1], seed=1)
    inputs = [x, w] + [randn(72, seed=2)] * bias
    grad = randn(*shape[:-1], 72, seed=3)
    assert product.why_not(*inputs) == ""

    def run(function, dtype):
        leaves = [t.to(dtype).detach().requires_grad_() for t in inputs]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad.to(dtype))

    found, torchs, truth = run(product.linear, x.dtype), run(F.linear, x.dtype), run(F.linear, torch.float64)
    assert "_Linear" in found[0].grad_fn.name()
    for one, other, true in zip(found, torchs, truth, strict=True):
        assert (one.shape, one.stride()) == (other.shape, other.stride())
        check(one, other, true)
    with torch.no_grad():
        assert torch.equal(product.linear(*inputs), found[0])


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("shape", [(96, 64), (3, 32, 64)], ids=str)
def test_outputs_can_be_written_to(shape):
    """As by an nn.ReLU(inplace=True) that follows."""
    x, w = randn(*shape), randn(72, 64, seed=1).requires_grad_()
    found, expected = (
        torch.autograd.grad(f(x, w).mul_(2).relu_().square().sum(), w)[0] for f in (product.linear, F.linear)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("asked", [0, 1, 2], ids=["x", "weight", "bias"])
def test_only_what_a_gradient_needs_may_not_be_written_to(asked):
    written = {0: [0], 1: [1], 2: [0, 1]}[asked]
    inputs = [randn(40, 64), randn(72, 64, seed=1), randn(72, seed=2)]
    inputs[asked].requires_grad_()
    expected = torch.autograd.grad(F.linear(*inputs).sum(), inputs[asked])
    y = product.linear(*inputs)
    for i in written:
        inputs[i].detach().zero_()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), inputs[asked]), expected)
    if asked < 2:
        y = product.linear(*inputs)
        inputs[1 - asked].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [((6,), (3, 6), (3,)), ((4, 6), (6,), None), ((4, 6), (3, 6), (1,)), ((4, 6), (3, 6), (1, 3))],
    ids=str,
)
def test_shapes_that_only_torchs_take(x, weight, bias):
    inputs = [randn(*shape, seed=i) for i, shape in enumerate((x, weight, bias)) if shape is not None]
    assert torch.equal(product.linear(*inputs), F.linear(*inputs))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        product.linear(randn(4, 6), randn(3, 5))


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ["SelfAttention", "MultiheadAttention"])
def test_modules(name, batch_first):
    """The same module in float64, and with torch's products, is what it is compared with."""
    torch.manual_seed(0)
    options = {"batch_first": batch_first} if name == "MultiheadAttention" else {}
    m = getattr(nnfast, name)(64, 4, **options)
    x, grad = randn(2, 200, 64), randn(2, 200, 64, seed=1)

    def run(backend, dtype):
        m.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        with nnfast.backend(backend):
            y = m(leaf, leaf, leaf, need_weights=False)[0] if options else m(leaf, leaf, leaf, None)
            return y, *torch.autograd.grad(y, [leaf, *m.parameters()], grad.to(dtype))

    truth = run("reference", torch.float64)
    torchs = run("aten", torch.float32)
    for one, other, true in zip(run("cpu", torch.float32), torchs, truth, strict=True):
        check(one, other, true)


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("training", [True, False])
def test_encoder_layer(training, monkeypatch):
    monkeypatch.setattr(tuning, "MULTIHEAD_ELEMENTS", 0)
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).train(training)
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    nnfast.swap(ours)
    x, grad = randn(3, 40, 32), randn(3, 40, 32, seed=1)
    calls = []
    monkeypatch.setattr(product, "into", lambda *args, into=product.into: calls.append(args) or into(*args))

    def run(m):
        dtype = m.linear1.weight.dtype
        leaf = x.to(dtype).requires_grad_(training)
        with torch.set_grad_enabled(training):
            y = m(leaf)
        return (y, *torch.autograd.grad(y, [leaf, *m.parameters()], grad.to(dtype))) if training else (y,)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found, torchs, truth in zip(run(ours), run(theirs), run(exact), strict=True):
            check(found, torchs, truth)
    assert len(calls) == (12 if training else 4)  # packed and out projection, and both of the feed-forward

    seen = []
    ours.linear1.register_forward_hook(lambda *_: seen.append(1))
    calls.clear()
    run(ours)
    assert seen
    assert len(calls) == (9 if training else 3)


@pytest.mark.usefixtures("ours")
def test_focal_loss_of_a_linear_layer():
    x, w, target = randn(300, 40), randn(70, 40, seed=1), torch.arange(300) % 70

    def run(backend, dtype):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, w)]
        with nnfast.backend(backend):
            loss = nnfast.functional.linear_focal_loss(*leaves, target)
            return loss, *torch.autograd.grad(loss, leaves)

    truth, torchs = run("reference", torch.float64), run("aten", torch.float32)
    for one, other, true in zip(run("cpu", torch.float32), torchs, truth, strict=True):
        check(one, other, true)


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("name", ["linear", "loss"])
def test_batched_gradients(name):
    x, w = randn(6, 40).requires_grad_(), randn(20, 40, seed=1).requires_grad_()
    if name == "linear":
        y = product.linear(x, w)
    else:
        y = nnfast.functional.linear_focal_loss(x, w, torch.arange(6), reduction="none")
    uppers = randn(3, *y.shape, seed=2)
    batched = torch.autograd.grad(y, (x, w), uppers, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, (x, w), upper, retain_graph=True) for upper in uppers]
    for found, expected in zip(batched, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.usefixtures("ours")
def test_who_makes_them(monkeypatch):
    x, w = randn(100, 64), randn(64, 64, seed=1)
    assert product.why_not(x, w) == ""
    assert "float32" in product.why_not(x.double(), w.double())
    assert "plain" in product.why_not(x.as_subclass(_Sub), w)
    assert "CPU" in product.why_not(x, w.to("meta"))
    assert "sparse" in product.why_not(x.to_sparse(), w)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "nested" in product.why_not(torch.nested.nested_tensor([x, x[:5]]), w)
    with nnfast.backend("aten"):
        assert "'aten' is forced" in product.why_not(x, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "cast" in product.why_not(x, w)
        assert product.linear(x, w).dtype == torch.bfloat16
    assert torch.func.vmap(lambda row: product.linear(row, w))(x).shape == (100, 64)
    torch.testing.assert_close(
        torch.compile(product.linear, fullgraph=True, backend="eager")(x, w), F.linear(x, w)
    )
    monkeypatch.setattr(tuning, "PRODUCT", 1 << 40)
    assert "measured to pay" in product.why_not(x, w)
    monkeypatch.setattr(tuning, "PRODUCT", 0)
    monkeypatch.setattr(product, "missing", lambda: "not here")
    assert product.why_not(x, w) == "not here"


class _Sub(torch.Tensor):
    """A tensor that is not plain."""


def test_where_they_pay():
    """As the processor says of itself; a narrower instruction set, chosen by hand, is torch's."""
    about = Path("/proc/cpuinfo")
    flags = about.read_text() if about.exists() else ""
    pay = "AuthenticAMD" in flags and " avx2 " in flags and " fma " in flags and "avx512f" not in flags
    code = "from nnfast.core import product; print(product.missing())"
    for isa, expected in (("avx512", pay), ("generic", False), ("mmx", False)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "NNFAST_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert (done.stdout.strip() == "") == expected, done.stderr


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_instruction_sets(isa):
    if os.environ.get("NNFAST_CPU_ISA"):
        pytest.skip("run by this test itself")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "products or modules",
        __file__,
    ]
    environment = {**os.environ, "NNFAST_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(4)}, r"a has shape \(4,\); it needs two dimensions"),
        ({"b": torch.ones(6, 3)}, r"a has shape \(4, 5\), b \(6, 3\), out \(4, 3\); they need"),
        ({"b": torch.ones(5, 3).double()}, "b has dtype Double; a has Float"),
        ({"out": torch.ones(3, 4).t()}, "out needs rows without gaps"),
        ({"bias": torch.ones(4)}, r"bias has shape \(4,\); it needs \(3,\)"),
        ({"bias": torch.ones(3), "add": True}, "it takes one of them"),
        (dict.fromkeys("a", torch.ones(4, 5).half()), "b has dtype Float; a has Half"),
        (
            {n: torch.ones(3, 3).half() for n in ("a", "b", "out")},
            "a has dtype Half; it takes Float or Double",
        ),
    ],
)
def test_bad_input(change, message):
    given = {
        "out": torch.ones(4, 3),
        "a": torch.ones(4, 5),
        "b": torch.ones(5, 3),
        "bias": None,
        "add": False,
    }
    given |= change
    before = given["out"].clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nnfast.product_(*given.values())
    assert torch.equal(given["out"], before)
