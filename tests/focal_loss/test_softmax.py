"""Softmax focal loss against the seed's formula in float64: targets, weights, shapes, extremes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import nnfast
from nnfast.core.op import triton_why_not
from tests.ops import class_targets, seed_focal

pytestmark = pytest.mark.only("softmax_focal_loss")
focal = nnfast.functional.softmax_focal_loss
GAMMAS = (0, 0.5, 1, 1.3, 2, 5)


def both(function, x, grad):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, grad.to(y.dtype))[0]


def check(ours, seeds, x, grad=None):
    """Values and gradients in float32 against the seed's in float64, by the largest magnitude of each.

    Up to 2e-6, or twice the seed's own error in float32. `test_every_op.py` is stricter, on many numbers.
    """
    y = seeds(x.double())
    grad = torch.linspace(-1, 2, y.numel()).reshape(y.shape) if grad is None else grad
    truths = both(seeds, x.double(), grad)
    for result, seed, truth in zip(both(ours, x, grad), both(seeds, x, grad), truths, strict=True):
        assert result.dtype == x.dtype
        scale = max(float(truth.abs().max()), 1e-30) if truth.numel() else 1
        own = (seed.double() - truth).abs().nan_to_num(0).max() if truth.numel() else 0
        assert_close(result.double(), truth, rtol=0, atol=max(2e-6 * scale, 2 * float(own)))


SHAPES = [(5, 2), (7, 3), (6, 10), (10,), (3, 1000), (70, 17), (150, 64), (9, 65), (2, 2049)]
SHAPES += [(4, 7, 5), (2, 3, 4, 5), (2, 40, 33), (2, 100, 70)]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_seed(forced, shape, gamma):
    torch.manual_seed(0)
    x = torch.randn(shape) * 3
    targets = class_targets(x)
    check(
        lambda x: focal(x, targets, gamma=gamma, reduction="none"),
        lambda x: seed_focal(x, targets, 1, gamma),
        x,
    )


@pytest.mark.parametrize("classes", [16385, 50257, 131072])
def test_many_classes(forced, classes):
    x = torch.linspace(-8, 8, 2 * classes).reshape(2, classes).sin() * 5
    targets = torch.tensor([classes - 1, 16384])
    check(lambda x: focal(x, targets, reduction="none"), lambda x: seed_focal(x, targets), x)


@pytest.mark.parametrize("start", [float("-inf"), -1e4])
def test_long_rows_that_begin_with_nothing(forced, start):
    x = torch.randn(2, 20000)
    x[:, :17000] = start
    targets = torch.tensor([18000, 19999])
    check(lambda x: focal(x, targets, reduction="none"), lambda x: seed_focal(x, targets), x)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_class_is_certain(forced, gamma):
    loss, grad = both(
        lambda x: focal(x, torch.zeros(4).long(), gamma=gamma, reduction="none"),
        torch.randn(4, 1),
        torch.ones(4),
    )
    assert not loss.any()
    assert not grad.any()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_extremes(forced, gamma):
    """kornia#918, optax#1267, sam3#575: NaN at gamma below 1, or 0, where the model is certain."""
    rows = [
        [1e4, -1e4, 0.0],
        [0.0, 0.0, 0.0],
        [-1e4, 1e4, 0.0],
        [60.0, 0.0, 0.0],
        [3.0, -torch.inf, -torch.inf],
    ]
    x = torch.tensor(rows)
    targets = torch.tensor([0, 1, 0, 0, 0])
    loss, grad = both(lambda x: focal(x, targets, gamma=gamma, reduction="none"), x, torch.ones(5))
    third = torch.log(torch.tensor(3.0))
    assert_close(
        loss, torch.stack([0 * third, (2 / 3) ** gamma * third, torch.tensor(2e4), 0 * third, 0 * third])
    )
    assert grad.isfinite().all()
    assert_close(grad[2], torch.tensor([-1.0, 1.0, 0.0]))
    assert not grad[[0, 4]].any()
    assert grad[3].abs().max() < 1e-20 or gamma < 1


def test_true_class_at_minus_infinity(forced):
    x = torch.tensor([[-torch.inf, 1.0, 2.0]])
    assert focal(x, torch.tensor([0]), reduction="sum") == torch.inf
    assert focal(torch.full((1, 3), -torch.inf), torch.tensor([0])).isnan()


def test_nan_stays_in_its_row(forced):
    x = torch.randn(3, 4)
    x[1, 2] = torch.nan
    loss, grad = both(lambda x: focal(x, torch.tensor([0, 1, 2]), reduction="none"), x, torch.ones(3))
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(9, 5), (3, 5, 4)], ids=str)
@pytest.mark.parametrize("mode", ["plain", "alpha", "weight", "both", "number"])
def test_weights_ignored_rows_and_reductions(forced, mode, shape, reduction):
    """mmcv#1488, #2892, #3061: the label is read before it is known not to be ignored."""
    torch.manual_seed(1)
    x = torch.randn(shape) * 2
    targets = class_targets(x)
    targets[::2] = 255
    alpha = {"alpha": torch.rand(5), "both": torch.rand(5), "number": 0.25}.get(mode, 1)
    weight = torch.rand(5) if mode in ("weight", "both") else None

    def seeds(x):
        ce = F.cross_entropy(x, targets, reduction="none", ignore_index=255)
        index = targets.where(targets != 255, 0)
        loss = (1 - torch.exp(-ce)) ** 2 * ce * (alpha[index] if isinstance(alpha, torch.Tensor) else alpha)
        weights = (torch.ones(5) if weight is None else weight)[index] * (targets != 255)
        loss = loss * weights
        return loss if reduction == "none" else loss.sum() / (weights.sum() if reduction == "mean" else 1)

    def ours(x):
        return focal(x, targets.byte(), alpha, weight=weight, ignore_index=255, reduction=reduction)

    check(ours, seeds, x)
    assert not both(ours, x, torch.ones_like(ours(x)))[1][::2].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_gamma_0_is_cross_entropy(reduction, weighted, smoothing, soft):
    torch.manual_seed(2)
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    targets = torch.randn(6, 5, 3).double().softmax(1) if soft else class_targets(x)
    if not soft:
        targets[0, 1] = -100
    options = {"label_smoothing": smoothing, "reduction": reduction}
    options["weight"] = torch.rand(5).double() if weighted else None
    grad = torch.tensor(1.7)
    ours = both(lambda x: focal(x, targets, gamma=0, **options), x, grad)
    torchs = both(lambda x: F.cross_entropy(x, targets, **options), x, grad)
    assert_close(ours, torchs)


@pytest.mark.parametrize("name", ["aten", "reference"])
def test_probabilities_and_smoothing(name):
    torch.manual_seed(3)
    x = torch.randn(6, 5) * 2
    probabilities = torch.randn(6, 5).softmax(1)
    with nnfast.backend(name):
        check(
            lambda x: focal(x, probabilities, gamma=1.3),
            lambda x: seed_focal(x, probabilities, 1, 1.3).mean(),
            x,
        )
        one_hot = F.one_hot(class_targets(x), 5).float()
        alpha = torch.rand(5)
        for smoothing in (0.0, 0.2):
            options = {"alpha": alpha, "label_smoothing": smoothing}
            assert_close(focal(x, one_hot, **options), focal(x, class_targets(x), **options))
        p = x.softmax(1).gather(1, class_targets(x)[:, None])[:, 0]
        ce = F.cross_entropy(x, class_targets(x), label_smoothing=0.2, reduction="none")
        assert_close(focal(x, class_targets(x), label_smoothing=0.2), ((1 - p) ** 2 * ce).mean())
    reasons = nnfast.explain("softmax_focal_loss", x, probabilities, label_smoothing=0.2).reasons["triton"]
    assert any("class probabilities" in r for r in reasons)
    assert any("label_smoothing is 0.2" in r for r in reasons)


@pytest.mark.parametrize("gap", [5.0, 8.0, 16.0])
def test_smoothing_with_a_steep_power(gap):
    """Of gamma below 1, where p_t is almost 1: 1 - p_t keeps its digits."""
    x = torch.tensor([[gap, 0.0, 0.3, -0.2]], requires_grad=True)
    exact = x.detach().double().requires_grad_()
    target = torch.tensor([0])
    ce = F.cross_entropy(exact, target)
    smoothed = F.cross_entropy(exact, target, label_smoothing=0.1)
    (truth,) = torch.autograd.grad((-torch.expm1(-ce)) ** 0.5 * smoothed, exact)
    (grad,) = torch.autograd.grad(focal(x, target, gamma=0.5, label_smoothing=0.1), x)
    assert_close(grad.double(), truth, rtol=1e-5, atol=1e-6 * float(truth.abs().max()))


def test_all_ignored(forced):
    x = torch.randn(3, 4)
    targets = torch.full((3,), -100)
    loss, grad = both(lambda x: focal(x, targets, reduction="sum"), x, torch.tensor(1.0))
    assert loss == 0
    assert not grad.any()
    assert focal(x, targets).isnan()
    assert F.cross_entropy(x, targets).isnan()


def test_ignored_rows_of_nan_have_gradient_0(device):
    if missing := triton_why_not(device):
        pytest.skip(missing)
    x, targets = torch.full((2, 3), torch.nan, device=device), torch.tensor([-100, -100], device=device)
    with nnfast.backend("triton"):
        loss, grad = both(lambda x: focal(x, targets, reduction="none"), x, torch.ones(2, device=device))
    assert not loss.any()
    assert not grad.any()


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(
    "alpha", [0.5, torch.tensor([0.2, 1.5, 0.7], dtype=torch.float64)], ids=["number", "tensor"]
)
def test_gradcheck(forced, gamma, alpha):
    x = torch.tensor(
        [[0.3, -1.0, 2.0], [1.0, 0.1, -0.4], [0.0, 0.5, 1.5]], dtype=torch.float64, requires_grad=True
    )
    targets = torch.tensor([2, 0, -100])

    def f(x):
        return focal(x, targets, alpha, gamma)

    assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, x)


def test_alpha_gets_its_gradient():
    alpha = torch.rand(3, requires_grad=True)
    x, targets = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    (grad,) = torch.autograd.grad(focal(x, targets, alpha, reduction="sum"), alpha)
    plain = focal(x, targets, reduction="none")
    assert_close(grad, torch.stack([plain[targets == c].sum() for c in range(3)]))


def test_inputs_stay_and_the_graph_can_be_used_twice(forced):
    """Liger-Kernel#1251: gradients in the input's memory; apex rescales its saved gradient in place."""
    x = torch.randn(6, 4, requires_grad=True)
    before = x.detach().clone()
    y = focal(x, class_targets(x)) + x.square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0].clone()
    second = torch.autograd.grad(y * 2, x)[0]
    assert_close(second, first * 2)
    assert torch.equal(x, before)


@pytest.mark.parametrize("of_targets", [torch.int64, torch.int32, torch.uint8])
def test_target_dtypes(forced, of_targets):
    x = torch.randn(4, 3)
    targets = torch.tensor([0, 2, 1, 1])
    assert_close(focal(x, targets.to(of_targets)), focal(x, targets))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "stepped", "expanded"])
def test_layouts(forced, layout):
    x = {
        "channels_last": torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 5, 3, 2).transpose(0, 3),
        "stepped": torch.randn(2, 10, 3, 8)[:, ::2, :, ::2],
        "expanded": torch.randn(2, 5, 1, 1).expand(2, 5, 3, 4),
    }[layout]
    targets = class_targets(x)
    check(lambda x: focal(x, targets, reduction="none"), lambda x: seed_focal(x, targets), x)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)], ids=str)
def test_empty(forced, shape):
    x = torch.zeros(shape)
    targets = class_targets(x)
    assert focal(x, targets, reduction="none").shape == targets.shape
    assert focal(x, targets, reduction="sum") == 0
    assert focal(x, targets).isnan()


@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"reduction": "none", "gamma": 0.5}], ids=str)
def test_compile(options):
    """Liger-Kernel#1338: wrong with ignore_index under torch.compile."""
    torch._dynamo.reset()
    x = torch.randn(12, 5, requires_grad=True)
    loss = nnfast.FocalLoss(**options)
    targets = class_targets(x)
    expected = loss(x, targets)
    result = torch.compile(loss, fullgraph=True)(x, targets)
    assert_close(result, expected)
    assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (result, expected)))


@pytest.mark.parametrize("ignored", ["some", "all"])
def test_ignored_rows_in_a_compiled_graph(forced, ignored):
    """Liger-Kernel#1338, with our own operators in the graph."""
    torch._dynamo.reset()
    x = torch.randn(12, 5, requires_grad=True)
    targets = class_targets(x)
    targets[:: 2 if ignored == "some" else 1] = 255

    def f(x):
        return focal(x, targets, ignore_index=255, reduction="sum")

    loss = torch.compile(f, fullgraph=True)(x)
    (grad,) = torch.autograd.grad(loss, x)
    assert_close(loss, f(x))
    assert_close(grad, torch.autograd.grad(f(x), x)[0])
    assert not grad[::2].any()


def test_grad_scaler(forced):
    """A float16 gradient comes through the scale with its digits; an infinite one skips the step."""
    torch.manual_seed(4)
    x = torch.nn.Parameter((torch.randn(8, 5) * 3).half().float())
    targets, before = class_targets(x), x.detach().clone()
    scaler = torch.amp.GradScaler(x.device.type, init_scale=2.0**14)
    optimizer = torch.optim.SGD([x], lr=1.0)
    scaler.scale(focal(x.half(), targets)).backward()
    scaler.step(optimizer)
    scaler.update()
    truth = both(lambda x: seed_focal(x, targets).mean(), before.double(), torch.ones(()))[1]
    assert_close((before - x.detach()).double(), truth, rtol=2e-3, atol=2e-6)
    after, scale = x.detach().clone(), scaler.get_scale()
    optimizer.zero_grad()
    scaler.scale(focal(x.half(), targets) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(x, after)
    assert scaler.get_scale() < scale


@pytest.mark.parametrize("make", [nnfast.FocalLoss, nnfast.SigmoidFocalLoss])
@pytest.mark.parametrize("strict", [False, True])
def test_export_needs_no_nnfast(make, strict):
    x = torch.randn(12, 5)
    targets = class_targets(x) if make is nnfast.FocalLoss else x.sigmoid()
    program = torch.export.export(make(), (x, targets), strict=strict)
    assert not [n for n in program.graph.nodes if "nnfast" in str(n.target)]
    assert_close(program.module()(x, targets), make()(x, targets))


def test_autocast(forced):
    x = torch.randn(4, 3, dtype=torch.bfloat16)
    targets = class_targets(x)
    assert focal(x, targets).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert focal(x, targets).dtype == F.cross_entropy(x, targets).dtype == torch.float32


X, T = torch.randn(4, 10), torch.tensor([0, 1, 2, 12])
BAD = [
    ((X, T), {}, IndexError, r"targets has class 12 at index 3; inputs has 10 classes \(ignore_index=-100\)"),
    ((X, T - 5), {}, IndexError, "targets has class -5 at index 0"),
    ((X, T[:3]), {}, ValueError, r"targets has shape \[3\]; inputs \[4, 10\] need \[4\]"),
    ((X, T.to(torch.int16)), {}, TypeError, "targets has dtype torch.int16"),
    ((X, X[:2]), {}, ValueError, r"targets has shape \[2, 10\]; class probabilities need that of inputs"),
    ((X.long(), T), {}, TypeError, "inputs has dtype torch.int64"),
    ((X.tolist(), T), {}, TypeError, "inputs is a list"),
    ((X, T.to("meta")), {}, ValueError, "targets is on meta; it needs to be on cpu"),
    ((X, T), {"gamma": -1}, ValueError, "gamma is -1"),
    ((X, T), {"gamma": float("nan")}, ValueError, "gamma is nan"),
    ((X, T), {"alpha": torch.ones(9)}, ValueError, r"alpha has shape \[9\]; inputs has 10 classes"),
    ((X, T), {"alpha": [1.0] * 10}, TypeError, "alpha is a list; it needs a number or"),
    ((X, T), {"weight": 2.0}, TypeError, "weight is a float; it needs a floating-point tensor"),
    ((X, T), {"reduction": "avg"}, ValueError, "reduction is 'avg'; it needs to be one of none, mean, sum"),
    ((X, T), {"label_smoothing": 2}, ValueError, "label_smoothing is 2"),
    ((X[:, :0], T), {}, ValueError, "at least one class"),
]


@pytest.mark.parametrize(
    ("args", "options", "error", "words"), BAD, ids=lambda v: v if isinstance(v, str) else ""
)
def test_bad_input(forced, args, options, error, words):
    with pytest.raises(error, match=r"nnfast\.softmax_focal_loss: .*" + words):
        focal(*args, **options)


def test_module():
    alpha = torch.tensor([0.25, 0.5, 1.0])
    loss = nnfast.FocalLoss(alpha, 1.5, reduction="sum")
    assert repr(loss) == "FocalLoss(alpha=(C=3), gamma=1.5, reduction='sum')"
    assert loss.double().alpha.dtype == torch.float64
    assert loss.state_dict() == {}
    x, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert_close(loss(x, targets), focal(x, targets, alpha, 1.5, reduction="sum"))
    assert_close(nnfast.FocalLoss(0.25)(x, targets), seed_focal(x, targets, 0.25).mean())
    with pytest.raises(ValueError, match=r"nnfast\.FocalLoss: gamma is -2"):
        nnfast.FocalLoss(gamma=-2)


def test_class_balanced_alpha():
    """Cui et al. 2019: between no weighting (beta 0) and the inverse of the counts (beta 1)."""
    counts = [1000, 100, 1]
    assert_close(nnfast.class_balanced_alpha(counts, beta=0), torch.ones(3))
    inverse = 1 / torch.tensor(counts, dtype=torch.float32)
    assert_close(nnfast.class_balanced_alpha(counts, beta=1), inverse / inverse.sum() * 3)
    between = torch.tensor([(1 - 0.99) / (1 - 0.99**n) for n in counts])
    assert_close(nnfast.class_balanced_alpha(torch.tensor(counts), beta=0.99), between / between.sum() * 3)
    assert nnfast.class_balanced_alpha([3, 0])[1] == 0
    for bad, beta in itertools.chain([([-1, 2], 0.9), ([0, 0], 0.9), ([], 0.9), ([1], 1.5)]):
        with pytest.raises(ValueError, match="class_balanced_alpha"):
            nnfast.class_balanced_alpha(bad, beta)
