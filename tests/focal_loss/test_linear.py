"""A linear layer with its focal loss in chunks: the same as in one piece, and the logits never in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import nnfast
from nnfast.core import tuning
from tests.ops import seed_focal

pytestmark = pytest.mark.only("linear_focal_loss")
linear = nnfast.functional.linear_focal_loss


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that few rows are many chunks, the last one not full."""
    monkeypatch.setattr(tuning, "linear_chunk", lambda rows, classes: max(3, -(-rows // 16)))


def tensors(rows=17, features=6, classes=11, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    x, weight, bias = torch.randn(rows, features), torch.randn(classes, features) / 2, torch.randn(classes)
    x, weight, bias = (t.to(dtype).requires_grad_() for t in (x, weight, bias))
    return x, weight, bias, torch.arange(rows, device=x.device) * 5 % classes


def unfused(x, weight, target, bias=None, **options):
    return nnfast.functional.softmax_focal_loss(F.linear(x, weight, bias), target, **options)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "options", [{}, {"gamma": 0.5, "ignore_index": 5}, {"alpha": 0.25, "gamma": 0}], ids=str
)
@pytest.mark.parametrize("biased", [False, True])
def test_one_piece(forced, reduction, options, biased):
    x, weight, bias, target = tensors()
    bias = bias if biased else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    loss = linear(x, weight, target, bias, reduction=reduction, **options)
    upstream = torch.linspace(-1, 2, loss.numel()).reshape(loss.shape)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = unfused(exact[0], exact[1], target, *exact[2:], reduction=reduction, **options)
    assert_close(loss.double(), truth, rtol=2e-6, atol=2e-6)
    for ours, torchs in zip(
        torch.autograd.grad(loss, inputs, upstream),
        torch.autograd.grad(truth, exact, upstream.double()),
        strict=True,
    ):
        assert ours.dtype == torch.float32
        assert_close(ours.double(), torchs, rtol=0, atol=4e-6 * max(1.0, float(torchs.abs().max())))


def test_factors(forced):
    x, weight, bias, target = tensors()
    alpha, class_weight = torch.rand(11), torch.rand(11)
    loss = linear(x, weight, target, bias, alpha=alpha, class_weight=class_weight)
    logits = F.linear(x, weight, bias)
    assert_close(loss, nnfast.functional.softmax_focal_loss(logits, target, alpha, weight=class_weight))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half(forced, half):
    """Sums over rows are kept in float32; a small p keeps its digits in float16."""
    x, weight, bias, target = tensors(rows=64, classes=400, dtype=half)
    inputs = x, weight, bias
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = torch.autograd.grad(unfused(*exact[:2], target, exact[2]), exact)
    ours = torch.autograd.grad(linear(*inputs[:2], target, inputs[2]), inputs)
    torchs = torch.autograd.grad(seed_focal(F.linear(*inputs), target).mean(), inputs)
    for a, b, t in zip(ours, torchs, truth, strict=True):
        assert a.dtype == half
        error, own = ((g.double() - t).abs().max() for g in (a, b))
        assert error <= 2 * own + torch.finfo(half).eps / 8 * t.abs().max()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_asked_for(forced, reduction):
    x, weight, bias, target = tensors()
    for asked in ([x], [weight], [bias], [x, bias]):
        given = [t if any(t is a for a in asked) else t.detach() for t in (x, weight, bias)]
        loss = linear(given[0], given[1], target, given[2], reduction=reduction).sum()
        expected = torch.autograd.grad(unfused(x, weight, target, bias, reduction=reduction).sum(), asked)
        assert_close(torch.autograd.grad(loss, asked), expected, rtol=1e-5, atol=1e-6)


def test_the_graph_can_be_used_twice(forced):
    """The forward's gradients are scaled into new tensors."""
    x, weight, bias, target = tensors()
    loss = linear(x, weight, target, bias)
    first = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    second = torch.autograd.grad(loss * 2, (x, weight, bias), retain_graph=True)
    third = torch.autograd.grad(loss, (x, weight, bias))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, c)
        assert_close(b, 2 * a)


def test_same_result_every_time(forced):
    x, weight, bias, target = tensors(rows=50)
    runs = [torch.autograd.grad(linear(x, weight, target, bias), (x, weight, bias)) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("gamma", [0.5, 2])
def test_gradcheck(forced, reduction, gamma):
    x, weight, bias, target = tensors(rows=4, features=2, classes=3, dtype=torch.float64)

    def f(x, weight, bias):
        return linear(x, weight, target % 3, bias, gamma=gamma, reduction=reduction)

    assert gradcheck(f, (x, weight, bias), check_forward_ad=True)
    assert gradgradcheck(f, (x, weight, bias))


def test_other_shapes_and_targets(forced):
    x, weight, bias, target = tensors(rows=12)
    expected = linear(x, weight, target, bias, reduction="none")
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(linear(x, weight, target.to(dtype), bias, reduction="none"), expected)
    cube = linear(x.reshape(3, 4, 6), weight, target.reshape(3, 4), bias, reduction="none")
    assert_close(cube, expected.reshape(3, 4))
    assert_close(linear(x[0], weight, target[0], bias), expected[0])
    assert linear(x[:0], weight, target[:0], bias, reduction="sum") == 0
    assert linear(x[:0], weight, target[:0], bias).isnan()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_all_ignored(reduction, forced):
    x, weight, bias, target = tensors()
    loss = linear(x, weight, torch.full_like(target, -100), bias, reduction=reduction)
    assert loss == 0 if reduction == "sum" else loss.isnan()  # as F.cross_entropy
    assert not any(g.any() for g in torch.autograd.grad(loss, (x, weight, bias)))


def test_label_smoothing_and_learned_alpha():
    """No kernel of ours has them: torch's operations serve, in chunks or in one piece."""
    x, weight, bias, target = tensors()
    options = {"label_smoothing": 0.1, "gamma": 1.5}
    both = [f(x, weight, target, bias, **options) for f in (linear, unfused)]
    assert_close(*both)
    assert_close(*(torch.autograd.grad(loss, (x, weight, bias)) for loss in both))
    alpha = torch.rand(11, requires_grad=True)
    assert_close(*(torch.autograd.grad(f(x, weight, target, alpha=alpha), alpha) for f in (linear, unfused)))


def test_autocast(forced):
    x, weight, bias, target = tensors(rows=40)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        results = [f(x, weight, target, bias) for f in (linear, unfused)]
    assert results[0].dtype == results[1].dtype == torch.float32
    assert_close(*results, rtol=2e-2, atol=1e-2)
    for ours, torchs in zip(*(torch.autograd.grad(r, (x, weight, bias)) for r in results), strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, torchs, rtol=5e-2, atol=2e-2)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_are_never_whole(forced, reduction):
    """Neither as an operation's result nor as what is saved."""
    x, weight, bias, target = tensors(rows=320, features=4, classes=100)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
    with Largest() as seen, hooks:
        linear(x, weight, target, bias, reduction=reduction).sum().backward()
    assert max(saved) <= 320 * 100 / 16
    assert seen.elements <= 320 * 100 / 16
    with Largest() as seen:
        unfused(x, weight, target, bias).backward()
    assert seen.elements >= 320 * 100


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(forced, reduction):
    torch._dynamo.reset()
    x, weight, bias, target = tensors()
    inputs = x, weight, bias

    def f(x, weight, bias):
        return linear(x, weight, target, bias, reduction=reduction, ignore_index=5)

    results = torch.compile(f, fullgraph=True)(*inputs), f(*inputs)
    assert_close(*results)
    assert_close(*(torch.autograd.grad(r.sum(), inputs) for r in results), rtol=1e-5, atol=1e-6)


def test_module():
    alpha = torch.rand(11)
    loss = nnfast.LinearFocalLoss(6, 11, alpha=alpha, gamma=1.5)
    assert set(loss.state_dict()) == {"weight", "bias"}
    assert repr(loss) == (
        "LinearFocalLoss(in_features=6, out_features=11, bias=True, alpha=(C=11), gamma=1.5)"
    )
    x, _, _, target = tensors()
    assert_close(loss(x, target), unfused(x, loss.weight, target, loss.bias, alpha=alpha, gamma=1.5))
    assert_close(loss(x), F.linear(x, loss.weight, loss.bias))
    with pytest.raises(ValueError, match=r"nnfast\.LinearFocalLoss: gamma is -1"):
        nnfast.LinearFocalLoss(6, 11, gamma=-1)


X, WEIGHT, TARGET = torch.randn(4, 6), torch.randn(5, 6), torch.tensor([0, 1, 2, 7])
BAD = {
    "class": ((X, WEIGHT, TARGET), {}, IndexError, "target has class 7 at index 3; weight has 5 classes"),
    "list": (([1.0], WEIGHT, TARGET), {}, TypeError, "x is a list; it needs a torch.Tensor"),
    "integers": ((X.int(), WEIGHT, TARGET), {}, TypeError, r"x is torch\.int32\[4, 6\]"),
    "features": ((X, WEIGHT[:, 1:], TARGET), {}, ValueError, r"weight has shape \[5, 5\]; x \[4, 6\] needs"),
    "bias": ((X, WEIGHT, TARGET, X[0]), {}, ValueError, r"bias has shape \[6\]; weight \[5, 6\] needs \[5\]"),
    "probabilities": ((X, WEIGHT, X), {}, TypeError, r"target has dtype torch\.float32; it needs classes in"),
    "rows": ((X, WEIGHT, TARGET[1:]), {}, ValueError, r"target has shape \[3\]; x \[4, 6\] needs \[4\]"),
    "dtype": ((X, WEIGHT.double(), TARGET), {}, TypeError, r"weight has dtype torch\.float64; x has"),
    "alpha": ((X, WEIGHT, TARGET), {"alpha": torch.ones(6)}, ValueError, r"alpha has shape \[6\]"),
    "gamma": ((X, WEIGHT, TARGET), {"gamma": -1}, ValueError, "gamma is -1"),
    "reduction": ((X, WEIGHT, TARGET), {"reduction": "all"}, ValueError, "reduction is 'all'"),
    "device": ((X, WEIGHT, TARGET.to("meta")), {}, ValueError, "target is on meta; it needs to be on cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    args, options, error, words = BAD[name]
    with pytest.raises(error, match=r"nnfast\.linear_focal_loss: " + words):
        linear(*args, **options)
