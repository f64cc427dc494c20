"""Batch norm with residual and activation against torch's modules: training, eval, and what is refused."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.testing._internal.common_modules import module_db
from torch.utils.checkpoint import checkpoint

import nnfast
from nnfast.activation.reference import ACTIVATIONS
from nnfast.conv_bn_act import op
from nnfast.conv_bn_act.module import normalise
from nnfast.core import extension, tuning
from tests.conftest import runs
from tests.ops import TABLE

CASE = next(case for case in TABLE if case.name == "batch_norm_act")
ACTS = {
    "identity": lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "silu": F.silu,
    "mish": F.mish,
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "step": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.fixture(params=runs(CASE, "cpu"), ids=str)
def backend(request):
    with request.param.forced():
        yield request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def expected(bn, x, residual=None, residual_bn=None, act="relu"):
    """What torch computes for `normalise`."""
    z = bn(x)
    if residual is not None:
        z = z + (residual if residual_bn is None else residual_bn(residual))
    return ACTS[act](z)


def batch_norm(channels: int, **options) -> nn.BatchNorm2d:
    """A batch norm whose parameters and running statistics are not the first ones."""
    bn = nn.BatchNorm2d(channels, **options)
    for value in (bn.weight, bn.bias, bn.running_mean):
        if value is not None:
            nn.init.normal_(value)
    return bn


def gradients(y, inputs, modules, grad):
    parameters = [p for m in modules if m is not None for p in m.parameters() if p.requires_grad]
    return torch.autograd.grad(y, [*inputs, *parameters], grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", ["none", "plain", "norm"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_as_torchs_modules(backend, training, residual, layout):
    combinations = itertools.product(((4, 5, 3, 7), (2, 19, 4, 4)), ACTS)
    for shape, act in backend.share(combinations, list(LAYOUTS).index(layout), len(LAYOUTS)):
        ours = [batch_norm(shape[1]).train(training) for _ in range(2)]
        torchs = copy.deepcopy(ours)
        results = []
        x, other = torch.randn(shape), torch.randn(shape)
        grad = torch.randn(shape)
        for (bn, residual_bn), function in (
            (ours, lambda *a, **k: normalise(*a, **k, negative_slope=0.2)),
            (torchs, expected),
        ):
            inputs = [LAYOUTS[layout](t.clone().requires_grad_()) for t in (x, other)]
            inputs = inputs[: 1 + (residual != "none")]
            residual_bn = residual_bn if residual == "norm" else None
            y = function(bn, inputs[0], residual=(*inputs, None)[1], residual_bn=residual_bn, act=act)
            results.append([y, *gradients(y, inputs, (bn, residual_bn), grad)])
        for mine, theirs in zip(*results, strict=True):
            assert_close(mine, theirs, atol=2e-5, rtol=2e-5)
        assert results[0][0].stride() == results[1][0].stride()
        for mine, theirs in zip(ours, torchs, strict=True):
            assert_close(mine.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_many_training_steps(backend, options, affine):
    """Weights, running statistics and losses, with eval steps between."""

    class Block(nn.Module):
        def __init__(self, ours):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.bn = (nnfast.BatchNormAct2d if ours else nn.BatchNorm2d)(6, affine=affine, **options)
            self.head = nn.Linear(6, 2)
            self.ours = ours

        def forward(self, x):
            z = self.conv(x)
            z = self.bn(z, z.flip(0)) if self.ours else F.relu(self.bn(z) + z.flip(0))
            return self.head(z.mean((2, 3)))

    ours, torchs = Block(True), Block(False)
    torchs.load_state_dict(ours.state_dict())
    histories = []
    for model in (ours, torchs):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        history = []
        for step in range(6 if backend.slow else 12):
            model.train(step % 4 != 3)
            x, target = torch.randn(4, 3, 5, 5), torch.randint(2, (4,))
            loss = F.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
        histories.append(torch.stack(history))
    assert_close(*histories, atol=1e-5, rtol=1e-4)
    assert_close(ours.state_dict(), torchs.state_dict(), atol=1e-5, rtol=1e-4)


def test_modes_of_two_norms_may_differ(backend):
    """A frozen shortcut beside a batch norm in training, and the other way round."""
    for main in (True, False):
        ours = [batch_norm(4).train(main), batch_norm(4).train(not main)]
        torchs = copy.deepcopy(ours)
        x, other = (torch.randn(3, 4, 2, 5, requires_grad=True) for _ in range(2))
        y = normalise(ours[0], x, residual=other, residual_bn=ours[1], act="mish")
        truth = expected(torchs[0], x, other, torchs[1], "mish")
        assert_close(y, truth)
        assert_close(
            gradients(y, [x, other], ours, torch.ones_like(y)),
            gradients(truth, [x, other], torchs, torch.ones_like(y)),
            atol=2e-5,
            rtol=2e-5,
        )
        for mine, theirs in zip(ours, torchs, strict=True):
            assert_close(mine.state_dict(), theirs.state_dict())


def test_one_norm_for_both(backend):
    bn = batch_norm(4, momentum=None)
    twin = copy.deepcopy(bn)
    x, other = torch.randn(2, 3, 4, 2, 5).unbind()
    assert_close(normalise(bn, x, residual=other, residual_bn=bn, act="relu"), expected(twin, x, other, twin))
    assert_close(bn.state_dict(), twin.state_dict())


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "input", "residual"])
def test_frozen(backend, frozen, training):
    for act, with_norm in itertools.product(("relu", "silu"), (False, True)):
        ours = [batch_norm(4).train(training) for _ in range(2)]
        for bn in ours:
            bn.weight.requires_grad_(frozen not in ("weight", "both"))
            bn.bias.requires_grad_(frozen not in ("bias", "both"))
        torchs = copy.deepcopy(ours)
        x, other = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
        x.requires_grad_(frozen != "input")
        other.requires_grad_(frozen != "residual")
        inputs = [t for t in (x, other) if t.requires_grad]
        y = normalise(ours[0], x, residual=other, residual_bn=ours[1] if with_norm else None, act=act)
        truth = expected(torchs[0], x, other, torchs[1] if with_norm else None, act)
        grad = torch.randn_like(y)
        mine = gradients(y, inputs, ours[: 1 + with_norm], grad)
        theirs = gradients(truth, inputs, torchs[: 1 + with_norm], grad)
        assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_offset_is_the_bias_that_was_not_added(backend, training):
    for options in ({}, {"affine": False}):
        ours = [batch_norm(4, **options).train(training) for _ in range(2)]
        torchs = copy.deepcopy(ours)
        x, other = (torch.randn(3, 4, 2, 5, requires_grad=True) for _ in range(2))
        offset, other_offset = (torch.randn(4, requires_grad=True) for _ in range(2))
        y = normalise(
            ours[0],
            x,
            residual=other,
            residual_bn=ours[1],
            act="silu",
            offset=offset,
            residual_offset=other_offset,
        )
        shifted = [t + o.view(-1, 1, 1) for t, o in ((x, offset), (other, other_offset))]
        truth = expected(torchs[0], shifted[0], shifted[1], torchs[1], "silu")
        assert_close(y, truth, atol=2e-5, rtol=2e-5)
        inputs, grad = [x, other, offset, other_offset], torch.randn_like(y)
        mine, theirs = gradients(y, inputs, ours, grad), gradients(truth, inputs, torchs, grad)
        assert_close(mine, theirs, atol=3e-5, rtol=2e-5)
        if training:
            assert [g.count_nonzero() for g in mine[2:4]] == [0, 0]
        for bn, twin in zip(ours, torchs, strict=True):
            assert_close(bn.state_dict(), twin.state_dict())


def test_strided_parameters_and_statistics(backend):
    """Buffers and parameters may be views."""
    base = torch.rand(4, 5, 2)
    twin, x = base.clone(), torch.randn(3, 5, 2, 4)
    y = nnfast.functional.batch_norm_act(x, *base[..., 0].unbind(), training=True, act="identity")
    assert_close(y, F.batch_norm(x, *twin[..., 0].unbind(), training=True))
    assert_close(base, twin)


def test_residual_is_the_input(backend):
    for act in ACTS:
        bn = batch_norm(4)
        twin = copy.deepcopy(bn)
        x = torch.randn(3, 4, 2, 5, requires_grad=True)
        y = normalise(bn, x, residual=x, act=act, negative_slope=0.2)
        truth = expected(twin, x, x, act=act)
        assert_close(y, truth)
        grad = torch.randn_like(y)
        assert_close(gradients(y, [x], [bn], grad), gradients(truth, [x], [twin], grad), atol=2e-5, rtol=1e-4)


def test_mixed_memory_formats(backend):
    formats = (torch.contiguous_format, torch.channels_last)
    for of_x, of_residual, of_grad in itertools.product(formats, repeat=3):
        for with_norm in (False, True):
            ours = [batch_norm(5) for _ in range(2)]
            torchs = copy.deepcopy(ours)
            x = torch.randn(3, 5, 4, 6).contiguous(memory_format=of_x).requires_grad_()
            other = torch.randn(3, 5, 4, 6).contiguous(memory_format=of_residual).requires_grad_()
            grad = torch.randn(3, 5, 4, 6).contiguous(memory_format=of_grad)
            y = normalise(ours[0], x, residual=other, residual_bn=ours[1] if with_norm else None, act="relu")
            truth = expected(torchs[0], x, other, torchs[1] if with_norm else None)
            assert_close(y, truth)
            assert y.is_contiguous(memory_format=of_x)
            mine = gradients(y, [x, other], ours[: 1 + with_norm], grad)
            theirs = gradients(truth, [x, other], torchs[: 1 + with_norm], grad)
            assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


FEW = [(2, 1, 1, 1), (1, 3, 1, 2), (2, 3, 1, 1), (1, 1, 1, 2), (1, 257, 2, 1), (67, 9, 1, 1)]


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_few_values(backend, shape):
    for dtype in backend.share((torch.float32, torch.float64), FEW.index(shape) % 2, 2):
        bn = batch_norm(shape[1]).to(dtype)
        twin = copy.deepcopy(bn)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        y, truth = (
            normalise(bn, x, residual=x.detach().flip(0), act="relu"),
            expected(twin, x, x.detach().flip(0)),
        )
        assert_close(y, truth, atol=1e-4, rtol=1e-4)
        grad = torch.randn_like(y)
        mine, theirs = gradients(y, [x], [bn], grad), gradients(truth, [x], [twin], grad)
        assert_close(mine, theirs, atol=1e-3, rtol=1e-4)
        assert_close(bn.state_dict(), twin.state_dict())


@pytest.mark.parametrize("dimensions", [(), (7,), (3, 4), (2, 3, 4)], ids=["2-D", "3-D", "4-D", "5-D"])
def test_any_number_of_dimensions(backend, dimensions):
    x = torch.randn(6, 5, *dimensions, requires_grad=True)
    weight, bias = torch.randn(5), torch.randn(5)
    running = [torch.zeros(5), torch.ones(5)]
    twins = [r.clone() for r in running]
    y = nnfast.functional.batch_norm_act(x, *running, weight, bias, True, 0.3, 1e-3, act="silu", residual=x)
    truth = F.silu(F.batch_norm(x, *twins, weight, bias, True, 0.3, 1e-3) + x)
    assert_close(y, truth)
    assert_close(running, twins)
    assert_close(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (y, truth)), atol=1e-4, rtol=1e-4)


def test_constant_input(backend):
    """Variance 0: not a little below it, and no NaN."""
    if backend.backend == "aten":
        pytest.skip("torch's own rounding")
    for value in (0.0, 1.0, 1e4 + 0.1, -3e-5):
        for layout in ("contiguous", "channels_last"):
            bn = batch_norm(3)
            bn.running_var.fill_(1)
            x = LAYOUTS[layout](torch.full((5, 3, 7, 9), value))
            y = normalise(bn, x)
            assert_close(y, bn.bias.view(3, 1, 1).expand_as(y), atol=1e-3 * max(abs(value), 1) ** 0.5, rtol=0)
            assert (bn.running_var >= 0.9 - 1e-6).all()
            assert_close(bn.running_var, torch.full((3,), 0.9), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mean", [10.0, 1e3, 1e4, -1e5])
def test_large_mean_and_small_variance(backend, mean):
    """E[x**2] - E[x]**2 has no right digit from 1e4 on."""
    if backend.backend == "aten":
        pytest.skip("torch's own rounding")
    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](torch.randn(8, 6, 13, 11) + mean)
        exact = x.double()
        var, average = torch.var_mean(exact, (0, 2, 3), correction=0)
        running = torch.zeros(6), torch.zeros(6)
        nnfast.functional.batch_norm_act(x, *running, training=True, momentum=1.0, act="identity")
        count = x.numel() // 6
        assert_close(running[0].double(), average, rtol=2e-7, atol=1e-6)
        assert_close(running[1].double(), var * count / (count - 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stats", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_types(backend, half, stats):
    """Parameters and statistics in x's dtype, or in float32."""
    if half == torch.float16 and stats == torch.bfloat16:
        stats = half
    bn = batch_norm(7).to(stats)
    twin = copy.deepcopy(bn).double()
    x, other = (torch.randn(4, 7, 5, 6).to(half).requires_grad_() for _ in range(2))
    y = normalise(bn, x, residual=other, act="silu")
    truth = expected(twin, x.double(), other.double(), act="silu")
    eps = torch.finfo(half).eps
    assert y.dtype == half
    assert_close(y.double(), truth, atol=2 * eps, rtol=eps)
    assert bn.running_mean.dtype == stats
    assert_close(bn.running_var.double(), twin.running_var, rtol=torch.finfo(stats).eps, atol=1e-6)
    assert_close(bn.running_mean.double(), twin.running_mean, rtol=torch.finfo(stats).eps, atol=1e-6)
    grad = torch.randn_like(y)
    mine = gradients(y, [x, other], [bn], grad)
    theirs = gradients(truth, [x, other], [twin], grad.double())
    assert [g.dtype for g in mine] == [half, half, stats, stats]
    for a, b in zip(mine, theirs, strict=True):
        assert (a.double() - b).abs().max() <= 2 * eps * max(1, b.abs().max())


def test_parameters_and_statistics_of_several_dtypes():
    """Parameters in bfloat16, buffers in float32, as in FSDP's mixed precision; torch refuses on the cpu."""
    bn = batch_norm(3)
    bn.weight.data, bn.bias.data = bn.weight.data.bfloat16(), bn.bias.data.bfloat16()
    x = torch.randn(2, 3, 4, 4).bfloat16()
    reasons = nnfast.explain("batch_norm_act", x, bn.running_mean, bn.running_var, bn.weight, bn.bias).reasons
    assert any("several dtypes" in reason for reason in reasons["aten"])
    twin = copy.deepcopy(bn).float()
    assert_close(normalise(bn, x).float(), expected(twin, x.float(), act="identity"), atol=0.03, rtol=0.02)
    assert_close(bn.running_mean, twin.running_mean)


@pytest.mark.skipif(bool(extension.why_not("batch_norm_act", "CPU")), reason="built without CPU kernels")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mode", ["inference", "statistics", "autograd"])
def test_served_from_its_threshold_on(mode, layout):
    """Each mode has its own: of the batch's statistics alone, torch's are the slowest."""
    least = tuning.NORM_THRESHOLDS["cpu", mode, layout is torch.channels_last]
    images = -(-least.wide // (64 * 16 * 16))
    x = torch.randn(max(images, least.stretch // 256), 64, 16, 16).contiguous(memory_format=layout)
    mean, var = torch.zeros(64), torch.ones(64)
    weight = torch.ones(64, requires_grad=mode == "autograd")

    def found(x: torch.Tensor, act: str = "relu") -> str | None:
        args = x, mean, var, weight, torch.zeros(64), mode != "inference"
        return nnfast.explain("batch_norm_act", *args, act=act).backend

    assert found(x) == "cpu"
    assert found(x[: max(least.wide // (64 * 16 * 16) - 1, 1)]) == "aten"
    assert found(x, "identity") == ("cpu" if least.plain else "aten")
    if least.half == tuning.NEVER:
        large = x.bfloat16().repeat(8, 1, 1, 1).contiguous(memory_format=layout)
        assert found(large) == "aten"


def test_nan_and_infinity_stay_in_their_channel(backend):
    for bad in (torch.nan, torch.inf, -torch.inf):
        for act in ACTS:
            x = torch.randn(4, 3, 5, 5)
            x[1, 1, 2, 3] = bad
            weight, bias = torch.ones(3), torch.zeros(3)
            y = nnfast.functional.batch_norm_act(
                x, None, None, weight, bias, training=True, act=act, negative_slope=0.2
            )
            truth = ACTS[act](F.batch_norm(x, None, None, weight, bias, training=True))
            assert torch.equal(y.isnan(), truth.isnan())
            assert_close(y, truth, equal_nan=True, atol=1e-5, rtol=1e-5)
            frozen = (torch.zeros(3), torch.ones(3))
            x.requires_grad_()
            y = nnfast.functional.batch_norm_act(x, *frozen, weight, bias, act=act, negative_slope=0.2)
            truth = ACTS[act](F.batch_norm(x, *frozen, weight, bias))
            assert_close(y, truth, equal_nan=True, atol=1e-5, rtol=1e-5)
            ours, torchs = (torch.autograd.grad(t.clamp(max=10).sum(), x)[0] for t in (y, truth))
            kept = ~torchs.isnan()  # torch's silu and mish give NaN there
            assert kept.all() or act in ("silu", "swish", "mish")
            assert_close(ours[kept], torchs[kept], atol=1e-5, rtol=1e-5)


def test_empty_batch(backend):
    bn = batch_norm(3)
    before = copy.deepcopy(bn.state_dict())
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    y = normalise(bn, x, act="relu")
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert_close(bn.running_mean, before["running_mean"])


def test_double_backward(backend):
    for residual, act in itertools.product(("none", "plain", "norm"), ("relu", "leaky_relu", "silu")):
        for training in (True, False):
            ours = [batch_norm(3).double().train(training) for _ in range(2)]
            torchs = copy.deepcopy(ours)
            x, other, grad = (torch.randn(3, 3, 2, 4, dtype=torch.float64) for _ in range(3))
            results = []
            for (bn, other_bn), function in ((ours, normalise), (torchs, expected)):
                options = {} if function is expected else {"negative_slope": 0.2}
                inputs = [t.clone().requires_grad_() for t in (x, other)]
                residuals = {
                    "none": (None, None),
                    "plain": (inputs[1], None),
                    "norm": (inputs[1], other_bn),
                }[residual]
                y = function(
                    bn, inputs[0], residual=residuals[0], residual_bn=residuals[1], act=act, **options
                )
                first = torch.autograd.grad(y, inputs[0], grad, create_graph=True)[0]
                results.append(
                    torch.autograd.grad(first.square().sum(), [inputs[0], bn.weight], materialize_grads=True)
                )
            assert_close(*results)


def test_gradient_carries_no_graph_unless_asked(backend):
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    y = normalise(batch_norm(4), x, residual=x, act="relu")
    assert not torch.autograd.grad(y.sum(), x)[0].requires_grad


SAVED = [
    ("none", "relu", 1, 0),
    ("none", "mish", 1, 0),
    ("plain", "identity", 1, 0),
    ("plain", "relu", 1, 1),
    ("plain", "leaky_relu", 1, 1),
    ("plain", "silu", 2, 0),
    ("norm", "relu", 2, 0),
    ("norm", "mish", 2, 0),
]


@pytest.mark.parametrize(("residual", "act", "whole", "masks"), SAVED, ids=str)
def test_saved_for_backward(backend, residual, act, whole, masks):
    """Tensors as large as x, and a bit for each element."""
    if backend.backend == "aten":
        pytest.skip("torch saves what it needs")
    saved = []
    x, other = (torch.randn(4, 8, 5, 16, requires_grad=True) for _ in range(2))
    other = None if residual == "none" else other
    bn, other_bn = batch_norm(8), batch_norm(8) if residual == "norm" else None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        normalise(bn, x, residual=other, residual_bn=other_bn, act=act)
    large = [t for t in saved if t.numel() > 8]
    assert sorted(t.nbytes for t in large) == [x.numel() // 8] * masks + [x.nbytes] * whole


def test_no_mask_without_grad(backend):
    """Nothing is kept that nobody will read."""
    bn = batch_norm(4)
    x = torch.randn(3, 4, 2, 5)
    with torch.no_grad():
        assert normalise(bn, x, residual=x, act="relu").grad_fn is None
    with torch.inference_mode():
        assert_close(normalise(bn.eval(), x, residual=x, act="relu"), expected(bn, x, x))


def test_versions_of_running_statistics(backend):
    """As torch's: its batch norm keeps them for backward, and may be called again before."""
    bn = batch_norm(4)
    for running_mean in (bn.running_mean, torch.zeros(8)[::2]):
        bn.running_mean = running_mean
        before = [t._version for t in (bn.running_mean, bn.running_var, bn.num_batches_tracked)]
        normalise(bn, torch.randn(3, 4, 2, 5))
        now = [t._version for t in (bn.running_mean, bn.running_var, bn.num_batches_tracked)]
        assert now == [*before[:2], before[2] + 1]


@pytest.mark.parametrize("offset", [False, True])
def test_called_again_on_a_larger_input(offset):
    """In one graph: the smaller is torch's, the larger our kernels'; in training both, or the second only."""
    ours = batch_norm(16).double()
    torchs = copy.deepcopy(ours)
    added = torch.randn(16, dtype=torch.float64) if offset else torch.zeros(16, dtype=torch.float64)
    inputs = [torch.randn(4, 16, size, size, dtype=torch.float64) for size in (4, 128)]
    calls = {
        ours: lambda x: normalise(ours, x, offset=added if offset else None),
        torchs: lambda x: torchs(x + added.view(-1, 1, 1)),
    }
    for both in (True, False):
        results = []
        for bn, call in calls.items():
            bn.zero_grad()
            bn.train(both)
            total = call(inputs[0]).sin().sum()
            bn.train()
            (total + call(inputs[1]).sin().sum()).backward()
            results.append([bn.weight.grad, bn.bias.grad, *bn.buffers()])
        assert_close(*results, rtol=1e-9, atol=1e-9)


def test_leaky_relus_result_may_be_written_to(backend):
    """As torch's, which keeps its input: `y += x` after it is legal."""
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    bn = batch_norm(4)
    y = normalise(bn, x, act="leaky_relu")
    truth = F.leaky_relu(bn(x))
    grads = []
    for result in (y, truth):
        result += x
        grads.append(torch.autograd.grad(result.sum(), x)[0])
    assert_close(*grads)


def test_input_changed_before_backward_is_seen(backend):
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    z = x * 1
    y = normalise(batch_norm(4), z, act="silu")
    with torch.no_grad():
        z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_updates_statistics_once(backend, reentrant, momentum):
    """pytorch#96136: the forward that is repeated in backward changes them again in torch."""
    ours = nnfast.BatchNormAct2d(4, momentum=momentum)
    plain = copy.deepcopy(ours)
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    y = checkpoint(ours, x, x, use_reentrant=reentrant)
    truth = plain(x, x)
    grad = torch.randn_like(y)
    y.backward(grad)
    mine, x.grad = x.grad, None
    truth.backward(grad)
    assert_close(mine, x.grad)
    assert_close(ours.weight.grad, plain.weight.grad)
    assert_close(ours.state_dict(), plain.state_dict())
    assert ours.num_batches_tracked == 1


def test_autocast(backend):
    """Batch norm keeps the dtype of what the convolution gives it; a float32 residual is taken."""
    conv, bn = nn.Conv2d(3, 4, 3, padding=1), nnfast.BatchNormAct2d(4)
    x, other = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bn(conv(x), other)
        assert y.dtype == torch.bfloat16
    assert bn.running_mean.dtype == torch.float32
    y.float().sum().backward()
    assert other.grad.dtype == torch.float32
    assert conv.weight.grad is not None


def test_transforms_and_forward_mode_take_torchs_own():
    x = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    weight = torch.randn(4, dtype=torch.float64)

    def ours(x, weight):
        return nnfast.functional.batch_norm_act(x, None, None, weight, training=True, act="silu", residual=x)

    def torchs(x, weight):
        return F.silu(F.batch_norm(x, None, None, weight, training=True) + x)

    for transform in (
        torch.func.jacrev,
        torch.func.jacfwd,
        lambda f: torch.func.grad(lambda *a: f(*a).sum()),
    ):
        assert_close(transform(ours)(x, weight), transform(torchs)(x, weight))
    seen = []

    def look(x):
        seen.append(nnfast.explain("batch_norm_act", x, None, None, training=True).reasons["triton"])
        return x.sum()

    torch.func.grad(look)(x)
    assert any("a torch.func transform or forward-mode differentiation" in reason for reason in seen[0])
    with nnfast.backend("triton"), pytest.raises(nnfast.BackendError, match=r"torch\.func transform"):
        torch.func.grad(lambda x: ours(x, weight).sum())(x)


BAD = {
    "input is a list": (lambda bn, x: bn([1.0]), TypeError, None),
    "dtype": (lambda bn, x: bn(x.int()), NotImplementedError, r"input has dtype torch\.int32; it needs"),
    "dimensions": (lambda bn, x: bn(x[0]), ValueError, r"expected 4D input \(got 3D input\)"),
    "channels": (lambda bn, x: bn(x[:, :3]), ValueError, r"weight has shape \[4\]; input has 3 channels"),
    "parameters' dtype": (
        lambda bn, x: bn(x.double()),
        ValueError,
        r"weight has dtype torch\.float32; input",
    ),
    "residual's type": (lambda bn, x: bn(x, 1.0), TypeError, "residual is a float"),
    "residual's shape": (
        lambda bn, x: bn(x, x[:, :, :1]),
        ValueError,
        r"residual has shape \[3, 4, 1, 5\]; it needs that of input, \[3, 4, 2, 5\]",
    ),
    "residual's dtype": (lambda bn, x: bn(x, x.double()), ValueError, r"residual has dtype torch\.float64"),
    "residual's device": (lambda bn, x: bn(x, x.to("meta")), ValueError, "residual has device meta"),
    "one value": (lambda bn, x: bn(x[:1, :, :1, :1]), ValueError, "Expected more than 1 value per channel"),
    "activation": (
        lambda bn, x: normalise(bn, x, act="gelu"),
        ValueError,
        "act is 'gelu'; it needs to be one of identity, relu",
    ),
    "norm of no residual": (
        lambda bn, x: normalise(bn, x, residual_bn=nn.BatchNorm2d(4)),
        (ValueError, TypeError, AttributeError),
        None,
    ),
    "residual's norm": (
        lambda bn, x: normalise(bn, x, residual=x, residual_bn=nn.BatchNorm2d(5)),
        ValueError,
        r"residual's weight has shape \[5\]",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_changes_nothing(backend, what):
    call, error, words = BAD[what]
    bn = nnfast.BatchNormAct2d(4)
    before = copy.deepcopy(bn.state_dict())
    with pytest.raises(error, match=words):
        call(bn, torch.randn(3, 4, 2, 5))
    assert_close(bn.state_dict(), before, rtol=0, atol=0)


def test_refused_backend_changes_nothing():
    bn = nnfast.BatchNormAct2d(4)
    before = copy.deepcopy(bn.state_dict())
    with nnfast.backend("cuda"), pytest.raises(nnfast.BackendError, match="x is not on a CUDA device"):
        bn(torch.randn(3, 4, 2, 5))
    assert_close(bn.state_dict(), before, rtol=0, atol=0)


def test_one_value_per_channel_raises_torchs_error():
    x = torch.randn(1, 4, 1, 1)
    messages = []
    for module in (nn.BatchNorm2d(4), nnfast.BatchNormAct2d(4)):
        with pytest.raises(ValueError) as caught:
            module(x)
        messages.append(str(caught.value))
        module.eval()(x)
    assert messages[0] == messages[1]


def test_functional_refuses():
    x, stats = torch.randn(3, 4, 2, 5), torch.ones(4)
    f = nnfast.functional.batch_norm_act
    for arguments, words in (
        ((x, stats, None), "running_mean and running_var need to be given both, or neither"),
        ((x, None, None), "running_mean and running_var are None; eval mode needs them"),
        ((x, stats, stats[:3]), r"running_var has shape \[3\]; input has 4 channels and needs \[4\]"),
        ((x[0, 0, 0], stats, stats), r"input has shape \[5\]; it needs \(N, C, ...\)"),
        ((x, stats.to("meta"), stats), "running_mean is on meta; it needs to be on cpu"),
    ):
        with pytest.raises(ValueError, match=rf"nnfast\.batch_norm_act: {words}"):
            f(*arguments)


def test_module_is_a_drop_in():
    ours, torchs = nnfast.BatchNormAct2d(5, 1e-3, 0.2), nn.BatchNorm2d(5, 1e-3, 0.2)
    assert isinstance(ours, nn.BatchNorm2d)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    torchs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(torchs).replace("BatchNorm2d", "BatchNormAct2d")[:-1] + ", act='relu')"
    assert "negative_slope=0.3" in repr(nnfast.BatchNormAct2d(5, act="leaky_relu", negative_slope=0.3))
    x = torch.randn(2, 5, 3, 3)
    expected = F.relu(torchs(x))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert_close(copied(x), expected)
    assert nnfast.BatchNormAct2d(5, bias=False).bias is None
    assert nnfast.BatchNormAct2d(5, affine=False).weight is None
    assert nnfast.BatchNormAct2d(5, dtype=torch.float64).running_mean.dtype == torch.float64
    with pytest.raises(ValueError, match=r"act is 'tanh'; it needs to be one of"):
        nnfast.BatchNormAct2d(5, act="tanh")


def test_activations_by_name():
    x = torch.randn(2, 5, 3, 3)
    for name, function in ACTS.items():
        module = nnfast.BatchNormAct2d(5, act=name, negative_slope=0.2)
        assert_close(module(x), function(nn.BatchNorm2d(5)(x)))
    assert_close(nnfast.BatchNormAct2d(5, act="swish")(x), nnfast.BatchNormAct2d(5, act="silu")(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_torchs_module_database(backend, training):
    info = next(i for i in module_db if i.module_cls is nn.BatchNorm2d)
    count = 0
    for given in info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=True, training=training
    ):
        arguments, keywords = given.constructor_input.args, given.constructor_input.kwargs
        theirs = nn.BatchNorm2d(*arguments, **keywords).train(training)
        ours = nnfast.BatchNormAct2d(*arguments, **keywords, act="identity").train(training)
        ours.load_state_dict(theirs.state_dict())
        (x,) = given.forward_input.args
        for _ in range(2):
            y, truth = ours(x), theirs(x)
            assert_close(y, truth)
        grad = torch.randn_like(y)
        assert_close(
            gradients(y, [x], [ours], grad), gradients(truth, [x], [theirs], grad), atol=1e-4, rtol=1e-4
        )
        assert_close(ours.state_dict(), theirs.state_dict())
        count += 1
    assert count >= 3


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compile_lowers_to_torchs_operators(training):
    torch._dynamo.reset()
    graphs = []

    def capture(graph, _):
        graphs.append(graph)
        return graph.forward

    bn = nnfast.BatchNormAct2d(4, act="mish").train(training)
    twin = copy.deepcopy(bn)
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    y = torch.compile(bn, fullgraph=True, backend=capture)(x, x)
    assert_close(y, F.mish(nn.BatchNorm2d.forward(twin, x) + x))
    assert_close(bn.state_dict(), twin.state_dict())
    called = [n.target for g in graphs for n in g.graph.nodes if n.op == "call_function"]
    assert F.batch_norm in called
    assert F.mish in called
    assert not any("nnfast" in str(target) for target in called)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compile_a_forced_backend(backend, training):
    """Our own operators are in the graph, and running statistics change as without it."""
    torch._dynamo.reset()
    bn = nnfast.BatchNormAct2d(4).train(training)
    twin = copy.deepcopy(bn)
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    y = torch.compile(bn, fullgraph=True, backend="aot_eager")(x, x)
    truth = twin(x, x)
    assert_close(y, truth)
    grad = torch.randn_like(y)
    assert_close(*(torch.autograd.grad(t, x, grad)[0] for t in (y, truth)), atol=2e-5, rtol=2e-5)
    assert_close(bn.state_dict(), twin.state_dict())


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_needs_no_nnfast(strict):
    bn = nnfast.BatchNormAct2d(4).eval()
    x = torch.randn(3, 4, 2, 5)
    program = torch.export.export(bn, (x, x), strict=strict)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert called == {"aten.batch_norm.default", "aten.add.Tensor", "aten.relu.default"}
    assert_close(program.module()(x, x), bn(x, x))


def test_symbolic_trace_of_a_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nnfast.BatchNormAct2d(4)).eval()
    traced = torch.fx.symbolic_trace(model)
    assert F.batch_norm in [n.target for n in traced.graph.nodes]
    x = torch.randn(2, 3, 4, 4)
    assert_close(traced(x), model(x))


def test_subclasses_take_torchs_own():
    class Meter(torch.Tensor):
        seen: list = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(3, 4, 2, 5).as_subclass(Meter)
    assert type(nnfast.BatchNormAct2d(4)(x)) is Meter
    assert F.batch_norm in Meter.seen
    with nnfast.backend("triton"), pytest.raises(nnfast.BackendError, match="x is a Meter"):
        nnfast.BatchNormAct2d(4)(x)


def test_explain_module():
    bn = nnfast.BatchNormAct2d(4)
    found = nnfast.explain(bn, torch.randn(3, 4, 2, 5))
    assert found.backend == "aten"
    assert "batch norm of batch statistics" in str(found)
    assert "batch norm of running statistics" in str(nnfast.explain(bn.eval(), torch.randn(3, 4, 2, 5)))
    assert bn.num_batches_tracked == 0


@pytest.mark.parametrize("act", ["silu", "mish"])
def test_torchs_batch_norm_is_followed_by_our_activation(act):
    """torch's own mish takes several times as long as ours."""
    x, mean = torch.randn(2, 64, 64, 64), torch.zeros(64)
    norm = op.Norm(None, None, mean, mean + 1, False, 0.1, 1e-5)
    with torch.profiler.profile() as profile:
        op.BATCH_NORM_ACT.aten(x, norm, None, None, ACTIVATIONS[act], 0.0)
    called = {event.name for event in profile.events()}
    assert (f"nnfast::{act}" if nnfast.explain(act, x).backend == "cpu" else f"aten::{act}") in called


@pytest.mark.parametrize("batch", [False, True], ids=["eval", "batch"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [1, 7, 14, 28])
def test_what_is_decided_at_once_is_what_the_reasons_say(size, layout, half, grad, batch):
    channels = 64
    found = set()
    for n in (1, 40, 70, 130, 300, 1000, 9000, 40000):
        if n * channels * size**2 > 1 << 23:
            continue
        x = torch.empty(n, channels, size, size, dtype=torch.bfloat16 if half else torch.float32)
        x = LAYOUTS[layout](x).requires_grad_(grad)
        norm = op.Norm(None, None, torch.zeros(channels), torch.ones(channels), batch, 0.1, 1e-5)
        call = x, norm, None, None, 1, 0.0
        by_reasons = op.BATCH_NORM_ACT.explain(*call).backend
        assert op.BATCH_NORM_ACT.choose(*call).name == by_reasons
        small = op._is_small(x, op._mode(x, norm, None, None))
        assert not small or by_reasons == "aten"
        found.add(small)
    least = op._SMALLEST[op._mode(x, norm, None, None), op.channels_innermost(x)].elements(half, size**2)
    assert found == ({True} if least == tuning.NEVER else {False, True})
