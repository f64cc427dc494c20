"""Batch norms folded into convolutions: the numbers, the cache and what invalidates it, and who refuses."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close

import nnfast
from nnfast.conv_bn_act import fold
from nnfast.core.snapshot import Snapshot

CHANNELS_LAST = torch.channels_last
ACTS = {
    "identity": lambda y: y,
    "relu": F.relu,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.2),
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
}
CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided, with a bias": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": True},
    "1x1": {"kernel_size": 1},
    "grouped": {"kernel_size": 3, "groups": 4},
    "depthwise": {"kernel_size": (5, 3), "groups": 8, "padding": (2, 1)},
    "dilated": {"kernel_size": 3, "dilation": (2, 1), "padding": 2},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "one channel": {"kernel_size": 3, "out_channels": 1},
    "circular, strided": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": (2, 1)},
}


def trained(module: nn.Module) -> nn.Module:
    """The module in eval mode, with parameters and statistics as after some training."""
    generator = torch.Generator().manual_seed(0)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator) * 0.3
            new = noise.abs() + 0.5 if name.endswith("var") else noise + (value.dim() == 1)
            value.data.copy_(new)
    return module.eval()


def as_written(block: nnfast.ConvBNAct, x: torch.Tensor, residual: torch.Tensor | None = None):
    y = block.bn(block.conv(x))
    y = y if residual is None else y + residual
    return F.leaky_relu(y, block.negative_slope) if block.act == "leaky_relu" else ACTS[block.act](y)


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())


def check(block: nnfast.ConvBNAct, x: torch.Tensor, residual: torch.Tensor | None = None) -> None:
    """Served by folded weights, as exact as torch, and laid out as torch lays it out.

    torch's own error is its worst for these images: with more of them it too takes oneDNN's convolution in
    channels_last, which is one long sum.
    """
    with torch.no_grad():
        assert nnfast.explain(block, x, residual).backend == "folded"
        theirs, ours = as_written(block, x, residual), block(x, residual)
        many = [None if t is None else t.repeat(4, 1, 1, 1) for t in (x, residual)]
        last = as_written(block, many[0].contiguous(memory_format=CHANNELS_LAST), many[1])[: len(x)]
        wide = copy.deepcopy(block).double()
        truth = as_written(wide, x.double(), None if residual is None else residual.double())
    assert ours.dtype == theirs.dtype
    assert ours.stride() == theirs.stride()
    torchs = max(error(theirs, truth), error(last, truth))
    assert error(ours, truth) <= 2 * torchs + torch.finfo(x.dtype).eps / 8


@pytest.fixture
def block() -> nnfast.ConvBNAct:
    return trained(nnfast.ConvBNAct(8, 12, 3, padding=1, bias=True))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 8, 10, 11, generator=torch.Generator().manual_seed(1))


def expected(block, x):
    with torch.no_grad():
        return as_written(block, x)


def agrees(block, x) -> None:
    with torch.no_grad():
        assert nnfast.explain(block, x).backend == "folded"
        assert_close(block(x), expected(block, x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last weight", "sliced"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_as_exact_as_torch(name, layout, x):
    block = trained(nnfast.ConvBNAct(8, **{"out_channels": 8, **CONVOLUTIONS[name]}))
    if layout == "channels_last weight":
        block = block.to(memory_format=CHANNELS_LAST)
    if layout == "channels_last":
        x = x.contiguous(memory_format=CHANNELS_LAST)
    if layout == "sliced":
        x = torch.randn(3, 16, 10, 22)[:, ::2, :, 1::2]
    check(block, x)
    residual = torch.randn_like(expected(block, x))
    check(block, x, residual)
    check(block, x, residual.contiguous(memory_format=CHANNELS_LAST))
    check(block, x, residual[:1, :, :1].expand_as(residual))


@pytest.mark.parametrize("act", ACTS)
def test_every_activation(act, x):
    block = trained(nnfast.ConvBNAct(8, 8, 3, padding=1, act=act, negative_slope=0.2))
    check(block, x)
    check(block, x, x)


@pytest.mark.parametrize("shape", [(1, 64, 14, 14), (64, 64, 1, 1), (1, 64, 1, 9), (2, 64, 56, 56)])
def test_sizes(shape):
    """Small images take oneDNN's own order of weights, large contiguous ones do not."""
    torch.manual_seed(0)
    block = trained(nnfast.ConvBNAct(64, 64, 3, padding=1, groups=2))
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        x = torch.randn(shape).contiguous(memory_format=layout)
        check(block, x)
        check(block, x, x)


def test_training_by_torch_is_seen(block, x):
    """Its batch norm changes running statistics without moving their version counters."""
    agrees(block, x)
    block.bn.train()(3 * expected(block, x))
    block.bn.eval()
    agrees(block, x)


def test_the_residual_may_be_the_input(x):
    """pytorch#62926: cuDNN's fused convolution gets that wrong."""
    block = trained(nnfast.ConvBNAct(8, 8, 3, padding=1))
    before = x.clone()
    check(block, x, x)
    assert torch.equal(x, before)
    if torch.cuda.is_available():
        block, x = block.cuda(), x.cuda()
        reasons = nnfast.explain(block, x, x).reasons["folded"]
        assert "residual shares memory with x, which cuDNN's fused convolution gets wrong" in reasons


def test_bfloat16_is_folded_in_float32():
    """pytorch#120545: folded in bfloat16 the error was 0.12, against 0.016."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this CPU")
    torch.manual_seed(0)
    block = trained(nnfast.ConvBNAct(64, 64, 3, padding=1, act="identity"))
    block.bn.running_mean.mul_(20)
    block = block.bfloat16()
    x = torch.randn(4, 64, 14, 14).bfloat16()
    found = fold.folded(block.conv, block.bn)
    assert (found.weight.dtype, found.bias.dtype) == (torch.bfloat16, torch.float32)
    check(block, x)
    with torch.no_grad():
        reasons = nnfast.explain(block, x, x).reasons["folded"]
        assert reasons == ["oneDNN adds no residual in bfloat16 with a bias in float32"]
        truth = as_written(copy.deepcopy(block).double(), x.double(), x.double())
        assert error(block(x, x), truth) <= 2 * error(as_written(block, x, x), truth)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(value, block, x):
    """oneDNN's own relu makes 0 of NaN."""
    x[1, 2, 3, 4] = value
    for act in ACTS:
        block.act = act
        with torch.no_grad():
            assert_close(block(x), as_written(block, x), equal_nan=True)


CHANGES = {
    "in place": lambda b: [p.mul_(1.5) for p in b.parameters()],
    "a buffer in place": lambda b: b.bn.running_var.add_(1),
    "through .data": lambda b: [p.data.mul_(1.5) for p in b.parameters()],
    "one element through .data": lambda b: b.bn.weight.data[5].add_(1),
    "one element through NumPy": lambda b: b.conv.weight.detach().numpy().__setitem__((7, 3, 1, 2), 9),
    "a new .data": lambda b: setattr(b.conv.weight, "data", b.conv.weight * 2),
    "a new parameter": lambda b: setattr(b.bn, "weight", nn.Parameter(b.bn.weight * 2)),
    "a new buffer": lambda b: setattr(b.bn, "running_mean", b.bn.running_mean + 1),
    "load_state_dict": lambda b: b.load_state_dict({k: v * 2 for k, v in b.state_dict().items()}),
    "load_state_dict(assign)": lambda b: b.load_state_dict(
        {k: v * 2 for k, v in b.state_dict().items()}, assign=True
    ),
    "reset": lambda b: b.bn.reset_parameters(),
    "eps": lambda b: setattr(b.bn, "eps", 0.5),
    "channels_last": lambda b: b.to(memory_format=CHANNELS_LAST),
    "training": lambda b: [b.train()(torch.randn(4, 8, 5, 5) * 3), b.eval()],
    "training without the block": lambda b: [b.bn.train()(torch.randn(4, 12, 5, 5) * 3), b.eval()],
    "no bias": lambda b: setattr(b.conv, "bias", None),
    "dilation": lambda b: [setattr(b.conv, name, (2, 2)) for name in ("dilation", "padding")],
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change, block, x):
    agrees(block, x)
    before = expected(block, x)
    with torch.no_grad():
        CHANGES[change](block)
    if change != "channels_last":
        assert not torch.allclose(expected(block, x), before)
    agrees(block, x)


GEOMETRY = {"stride": (2, 2), "dilation": (2, 2), "padding": (2, 2), "padding_mode": "circular"}


@pytest.mark.parametrize("attribute", GEOMETRY)
def test_a_change_of_geometry_is_seen(attribute):
    block = trained(nnfast.ConvBNAct(64, 64, 3, padding=1))
    x = torch.randn(8, 64, 20, 20).contiguous(memory_format=CHANNELS_LAST)
    for _ in range(2):
        with torch.no_grad():
            assert_close(block(x), expected(block, x), rtol=1e-4, atol=1e-4)
        setattr(block.conv, attribute, GEOMETRY[attribute])


@pytest.mark.parametrize("shape", [(64, 96, 3, 3), (96, 64, 1, 1), (64, 256, 1, 1), (128, 1, 5, 5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
def test_a_filter_or_channel_written_through_data_is_seen(layout, shape):
    weight = nn.Parameter(torch.randn(shape).contiguous(memory_format=layout))
    snapshot = Snapshot([weight])
    for dim in (0, 1):
        for at in range(shape[dim]):
            values = weight.data.select(dim, at)
            before = values.clone()
            values.zero_()
            assert not snapshot.holds([weight])
            values.copy_(before)
    assert snapshot.holds([weight])


def test_an_optimizers_step_is_seen(block, x):
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    for _ in range(3):
        agrees(block, x)
        block(x).square().mean().backward()  # in eval mode: statistics are frozen
        optimizer.step()
    agrees(block, x)


def test_a_change_of_dtype(block, x):
    agrees(block, x)
    block.double()
    with torch.no_grad():
        reasons = nnfast.explain(block, x.double()).reasons["folded"]
        assert reasons == ["x has dtype torch.float64; oneDNN has no fused convolution of it on this CPU"]
        assert_close(block(x.double()), as_written(block, x.double()))
    block.float()
    agrees(block, x)


def test_folded_once_and_beside_the_modules(block, x):
    state = {name: value.clone() for name, value in block.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in block.named_modules()}
    agrees(block, x)
    first = fold.folded(block.conv, block.bn)
    agrees(block, x)
    assert fold.folded(block.conv, block.bn) is first
    assert block.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    assert {name: set(vars(m)) for name, m in block.named_modules()} == attributes
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        agrees(copied, x)
        assert fold.folded(copied.conv, copied.bn) is not first
        with torch.no_grad():
            copied.conv.weight.mul_(2)
        agrees(copied, x)
    agrees(block, x)


def test_nothing_outlives_the_module(x):
    block = trained(nnfast.ConvBNAct(8, 8, 3))
    agrees(block, x)
    before = len(fold._FOLDED)
    del block
    gc.collect()
    assert len(fold._FOLDED) < before


def test_training_drops_what_is_folded(block, x):
    agrees(block, x)
    block.train()(x)
    assert block.bn not in fold._FOLDED[block.conv]


def test_a_shared_convolution_is_folded_for_each_batch_norm(x):
    """pytorch#124808: it was folded twice, in place."""
    first, second = (trained(nnfast.ConvBNAct(8, 8, 3, padding=1)) for _ in range(2))
    second.conv = first.conv
    second.bn.weight.data.mul_(3)
    before = first.conv.weight.clone()
    for _ in range(2):
        agrees(first, x)
        agrees(second, x)
    assert torch.equal(first.conv.weight, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_may_alternate(mode, block, x):
    for each in (mode, torch.inference_mode, torch.no_grad):
        with each():
            assert_close(block(x), as_written(block, x))
    x.requires_grad_()
    (ours,) = torch.autograd.grad(block(x).sum(), x)
    (theirs,) = torch.autograd.grad(as_written(block, x).sum(), x)
    assert_close(ours, theirs)


def test_inference_tensors_are_not_kept(x):
    with torch.inference_mode():
        block = nnfast.ConvBNAct(8, 8, 3).eval()
        reasons = nnfast.explain(block, x).reasons["folded"]
        assert any("inference tensors" in reason for reason in reasons)
        for _ in range(2):
            assert_close(block(x), as_written(block, x))
            block.conv.weight.mul_(2)


def test_a_gradient_is_differentiable(block, x):
    """Frozen statistics, as in fine-tuning."""
    assert "a gradient is asked for; folding is for inference" in nnfast.explain(block, x).reasons["folded"]
    results = []
    for function in (block, lambda x: as_written(block, x)):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *block.parameters()])))
    assert_close(*results, rtol=1e-4, atol=1e-4)
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    assert nnfast.explain(block, x).backend == "folded"
    assert not block(x).requires_grad


def test_threads(x):
    """Many threads fold and run while parameters stay."""
    block = trained(nnfast.ConvBNAct(8, 8, 3, padding=1))
    truth = expected(block, x)
    wrong, barrier = [], threading.Barrier(8)

    def work():
        barrier.wait()
        with torch.no_grad():
            for size in (3, 2, 1) * 5:
                if not torch.allclose(block(x[:size]), truth[:size], atol=1e-5):
                    wrong.append(size)

    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


class Doubled(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 2


def _doubled(block):
    block.conv.__class__ = Doubled


def _own_forward(block):
    forward = block.bn.forward
    block.bn.forward = lambda x: forward(x) * 2


def _plain(child, name):
    """A tensor computed elsewhere in place of a parameter or buffer, as hypernetworks and MAML set it."""

    def change(block):
        module = getattr(block, child)
        value = getattr(module, name).detach() * 2
        delattr(module, name)
        setattr(module, name, value)

    return change, "a weight, bias or running statistic is no parameter or buffer"


REFUSALS = {
    "a plain weight": _plain("conv", "weight"),
    "a plain bias": _plain("conv", "bias"),
    "a plain gamma": _plain("bn", "weight"),
    "a plain mean": _plain("bn", "running_mean"),
    "no count of batches": (lambda b: delattr(b.bn, "num_batches_tracked"), _plain("bn", "bias")[1]),
    "a hook of conv": (
        lambda b: b.conv.register_forward_hook(lambda module, args, y: y * 2),
        "conv has hooks, which a fused call would skip",
    ),
    "a pre-hook of bn": (
        lambda b: b.bn.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        "bn has hooks, which a fused call would skip",
    ),
    "weight_norm": (
        lambda b: nn.utils.parametrizations.weight_norm(b.conv),
        "conv is a ParametrizedConv2d; it needs to be Conv2d",
    ),
    "spectral_norm": (
        lambda b: nn.utils.spectral_norm(b.conv),
        "conv has hooks, which a fused call would skip",
    ),
    "pruning": (
        lambda b: prune.l1_unstructured(b.conv, "weight", 0.5),
        "conv has hooks, which a fused call would skip",
    ),
    "a subclass": (_doubled, "conv is a Doubled; it needs to be Conv2d"),
    "a forward": (_own_forward, "bn has a forward of its own"),
    "a group norm": (
        lambda b: setattr(b, "bn", nn.GroupNorm(3, 12)),
        "bn is a GroupNorm; it needs to be BatchNorm2d or SyncBatchNorm",
    ),
    "training": (lambda b: b.bn.train(), "bn normalises with the statistics of the batch"),
    "no statistics": (
        lambda b: setattr(b, "bn", nn.BatchNorm2d(12, track_running_stats=False).eval()),
        "bn normalises with the statistics of the batch",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_folded_is_called_as_it_is(name, block, x):
    agrees(block, x)
    change, reason = REFUSALS[name]
    change(block)
    with torch.no_grad():
        assert reason in nnfast.explain(block, x).reasons["folded"]
        assert_close(block(x), as_written(block, x))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "bn.weight", "bn.bias"])
def test_a_plain_attribute_gets_its_gradient(name, train, block, x):
    child, attribute = name.split(".")

    def gradient(call, x):
        made = copy.deepcopy(block).train(train).to(x.dtype)
        module = getattr(made, child)
        source = getattr(module, attribute).detach().clone().requires_grad_()
        delattr(module, attribute)
        setattr(module, attribute, source * 2)
        loss = call(made.requires_grad_(False), x).square().sum()
        return torch.autograd.grad(loss, source)[0].double()

    truth = gradient(as_written, x.double())
    ours, torchs = (gradient(call, x) - truth for call in (nnfast.ConvBNAct.__call__, as_written))
    # absolute: in training the gradient of the convolution's bias is 0, and torch's all rounding
    assert ours.norm() <= 2 * torchs.norm() + torch.finfo(x.dtype).eps / 8 * truth.norm()


def test_global_hooks(block, x):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            block(x)
    finally:
        handle.remove()
    assert block.conv in seen
    assert block.bn in seen


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_onednn_switched_off(block, x):
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        reasons = nnfast.explain(block, x).reasons["folded"]
        assert reasons == ["torch's oneDNN is not there, or switched off"]
        assert_close(block(x), as_written(block, x))


def test_forced(block, x):
    with nnfast.backend("folded"):
        with torch.no_grad():
            assert_close(block(x), as_written(block, x))
        with pytest.raises(nnfast.BackendError, match="folded: a gradient is asked for"):
            block(x)
    for name in ("aten", "reference"):
        with nnfast.backend(name), torch.no_grad():
            assert "is forced" in nnfast.explain(block, x).reasons["folded"][0]
            assert_close(block(x), as_written(block, x))


@pytest.mark.parametrize("change", ["shape", "dtype", "channels", "dimensions"])
def test_bad_input(change, block, x):
    residual = torch.zeros_like(expected(block, x))
    with torch.no_grad():
        if change == "shape":
            with pytest.raises(ValueError, match="residual has shape"):
                block(x, residual[:, :, :1])
        elif change == "dtype":
            with pytest.raises(ValueError, match=r"residual has dtype torch\.float64"):
                block(x, residual.double())
        else:
            bad = x[:, :5] if change == "channels" else x[0, 0]
            with pytest.raises(RuntimeError) as theirs:
                block.conv(bad)
            with pytest.raises(type(theirs.value), match=r"Given groups|Expected"):
                block(bad)
