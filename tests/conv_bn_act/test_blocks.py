"""Residual blocks and ConvBNAct: the modules they stand in for, trained and evaluated beside them."""

from __future__ import annotations

import copy
import importlib
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torch.nn.modules.module as torch_module
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import nnfast
from nnfast.conv_bn_act import blocks
from nnfast.core import tuning

CHANNELS_LAST = torch.channels_last


class SeedBlock(nn.Module):
    """The seed's block, as it was written."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, stride=1, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


def torchvision_resnet():
    importlib.import_module("tests.torchvision_operators")
    return importlib.import_module("torchvision.models.resnet")


def downsample(inplanes: int, planes: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def _torchvision(name: str, *args, down=None, **kwargs):
    def make(ours: bool) -> nn.Module:
        cls = getattr(nnfast if ours else torchvision_resnet(), name)
        return cls(*args, **kwargs, downsample=None if down is None else downsample(*down))

    return make


def _seed(*args):
    return lambda ours: (nnfast.ResidualBlock if ours else SeedBlock)(*args)


BLOCKS = {
    "seed": _seed(8, 8),
    "seed, projection": _seed(8, 12, 2),
    "seed, channels": _seed(8, 6, 1),
    "BasicBlock": _torchvision("BasicBlock", 8, 8),
    "BasicBlock, projection": _torchvision("BasicBlock", 8, 16, 2, down=(8, 16, 2)),
    "Bottleneck": _torchvision("Bottleneck", 8, 2),
    "Bottleneck, projection": _torchvision("Bottleneck", 8, 4, 2, down=(8, 16, 2)),
    "ResNeXt": _torchvision("Bottleneck", 8, 2, groups=4, base_width=64),
    "Wide": _torchvision("Bottleneck", 8, 2, base_width=128),
    "dilated": _torchvision("Bottleneck", 8, 2, dilation=2),
}


@pytest.fixture(autouse=True)
def channels_last_pays_for_small_images(monkeypatch):
    """So that the way through channels_last is tested without large ones."""
    monkeypatch.setattr(tuning, "CHANNELS_LAST_PIXELS", 14 * 14)


@pytest.fixture(params=BLOCKS)
def pair(request) -> tuple[nn.Module, nn.Module]:
    """(theirs, ours) with one state; the state of each loads into the other."""
    torch.manual_seed(0)
    theirs, ours = (BLOCKS[request.param](which) for which in (False, True))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def image(layout=torch.contiguous_format, dtype=torch.float32, size: int = 30) -> torch.Tensor:
    x = torch.randn(4, 8, size, size, generator=torch.Generator().manual_seed(2), device="cpu")
    return x.to(torch.get_default_device(), dtype).contiguous(memory_format=layout)


def step(block: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Result, and the gradients of the input and of every parameter."""
    leaf = x.detach().requires_grad_()
    y = block(leaf)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *block.parameters()], weights)]


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    return float((result.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-3))


def as_exact(theirs: nn.Module, ours: nn.Module, x: torch.Tensor) -> None:
    """Result and gradients are laid out as torch's, and as exact as the worse of torch's in both layouts."""
    wide = copy.deepcopy(theirs).double()
    other = copy.deepcopy(theirs).to(memory_format=CHANNELS_LAST)
    truth, found, torchs = step(wide, x.double()), step(ours, x), step(theirs, x)
    lasts = step(other, x.contiguous(memory_format=CHANNELS_LAST))
    names = ["y", "x", *dict(theirs.named_parameters())]
    for name, t, a, b, c in zip(names, truth, found, torchs, lasts, strict=True):
        assert a.stride() == b.stride(), name
        own = max(error(b, t), error(c, t))
        assert error(a, t) <= 2 * own + 1e-6, name


def test_state_dict_is_the_same_both_ways(pair):
    theirs, ours = pair
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]
    assert {n for n, _ in theirs.named_modules()} == {n for n, _ in ours.named_modules()}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "last"])
@pytest.mark.parametrize("weights", [torch.contiguous_format, CHANNELS_LAST], ids=["", "weights_last"])
def test_results_and_gradients(pair, training, layout, weights):
    theirs, ours = (block.train(training).to(memory_format=weights) for block in pair)
    as_exact(theirs, ours, image(layout))
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_many_steps_of_training(pair):
    """Weights, running statistics and losses go the same way; so a bias left out changes nothing."""
    theirs, ours = (block.double() for block in pair)
    losses = []
    for block in (theirs, ours):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(block.parameters(), 0.05, momentum=0.9)
        found = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = (block(torch.randn(4, 8, 9, 9, dtype=torch.float64)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert_close(losses[1], losses[0])
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-11)
    assert ours.bn1.num_batches_tracked == 8


def test_a_bias_before_a_batch_norm_has_no_gradient():
    block = nnfast.ResidualBlock(16, 12, 2)
    block(torch.randn(4, 16, 80, 80)).sum().backward()
    for conv in (block.conv1, block.conv2, block.shortcut[0]):
        assert torch.equal(conv.bias.grad, torch.zeros_like(conv.bias))
        assert conv.weight.grad.abs().max() > 0


def test_train_and_eval_alternate(pair):
    theirs, ours = pair
    for _ in range(3):
        for block in pair:
            block.train()(image())
        theirs.eval(), ours.eval()
        with torch.no_grad():
            assert nnfast.explain(ours, image()).backend == "folded"
            assert_close(ours(image()), theirs(image()), rtol=1e-4, atol=1e-5)


def test_explain_names_each_convolution(pair):
    _, ours = pair
    with torch.no_grad():
        found = nnfast.explain(ours, image())
        assert found.backend != "folded"
        reason = found.reasons["folded"][0]
        assert reason.startswith("conv1, ")
        assert reason.endswith("conv2: bn normalises with the statistics of the batch") or "conv3" in reason
        ours.eval().conv2.register_forward_hook(lambda *_: None)
        found = nnfast.explain(ours, image())
        assert found.reasons["folded"] == ["conv2: conv has hooks, which a fused call would skip"]
        assert found.backend in str(found)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_other_dtypes(pair, kind, training):
    theirs, ours = (block.train(training).to(kind) for block in pair)
    x = image(dtype=kind, size=12)
    with torch.no_grad():
        truth = copy.deepcopy(theirs).double()(x.double())
        torchs, found = theirs(x), ours(x)
    assert (found.dtype, found.stride()) == (torchs.dtype, torchs.stride())
    assert error(found, truth) <= 2 * error(torchs, truth) + torch.finfo(kind).eps * (
        16 if kind == torch.float64 else 1
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_autocast(pair, training):
    theirs, ours = (block.train(training) for block in pair)
    truth = copy.deepcopy(theirs).double()(image().double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torchs, found = step(theirs, image()), step(ours, image())
    assert [t.dtype for t in found] == [t.dtype for t in torchs]
    assert error(found[0], truth) <= 2 * error(torchs[0], truth) + 1e-3
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiled_and_exported_without_nnfast(pair, training):
    theirs, ours = (block.train(training) for block in pair)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    assert_close(compiled(image()), theirs(image()))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 1
    assert not any("nnfast" in target or "mkldnn" in target for target in targets)
    program = torch.export.export(ours, (image(),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("nnfast" in name or "mkldnn" in name for name in called)
    assert "aten.conv2d.default" in called


def test_traced(pair):
    theirs, ours = (block.eval() for block in pair)
    assert_close(torch.fx.symbolic_trace(ours)(image()), theirs(image()))
    assert_close(torch.jit.trace(ours, image())(image()), theirs(image()), rtol=1e-4, atol=1e-5)


def test_vmap_and_grad(pair):
    from torch.func import functional_call, grad, vmap

    theirs, ours = (block.eval().double() for block in pair)
    x = image(dtype=torch.float64, size=6)
    assert_close(*(vmap(block)(x.unsqueeze(1)) for block in (ours, theirs)))
    parameters = dict(theirs.named_parameters())
    gradients = [grad(lambda p, b=b: functional_call(b, p, (x,)).sum())(parameters) for b in (ours, theirs)]
    assert_close(*gradients)


def test_copies(pair):
    theirs, ours = pair
    for block in (ours.train(), ours.eval()):
        ours(image())
        for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert type(copied) is type(ours)
            assert copied.training == ours.training
            theirs.load_state_dict(ours.state_dict())
            assert_close(copied(image()), theirs.train(ours.training)(image()), rtol=1e-4, atol=1e-5)


def test_another_librarys_block_may_be_given_our_class():
    """Only the attributes that it has are used; swap relies on it."""
    resnet = torchvision_resnet()
    timm = importlib.import_module("timm.models.resnet")
    cases = [
        (SeedBlock(8, 12, 2), nnfast.ResidualBlock),
        (resnet.BasicBlock(8, 16, 2, downsample(8, 16, 2)), nnfast.BasicBlock),
        (resnet.Bottleneck(8, 2), nnfast.Bottleneck),
        (timm.BasicBlock(8, 8), nnfast.BasicBlock),
        (timm.BasicBlock(8, 8, act_layer=nn.SiLU), nnfast.BasicBlock),
        (timm.Bottleneck(8, 4, 2, downsample(8, 16, 2)), nnfast.Bottleneck),
    ]
    for block, cls in cases:
        theirs = copy.deepcopy(block)
        block.__class__ = cls
        for training in (True, False):
            theirs.train(training), block.train(training)
            with torch.no_grad():
                assert_close(block(image()), theirs(image()), rtol=1e-4, atol=1e-5)


def test_a_block_used_twice():
    torch.manual_seed(0)
    theirs = SeedBlock(8, 8)
    ours = nnfast.ResidualBlock(8, 8)
    ours.load_state_dict(theirs.state_dict())
    as_exact(*(nn.Sequential(b, b) for b in (theirs, ours)), image())
    assert_close(ours.state_dict(), theirs.state_dict())


def test_other_activations_and_watched_ones():
    resnet = torchvision_resnet()
    for act in (nn.SiLU(), nn.LeakyReLU(0.3), nnfast.Mish(), nn.Hardswish(), nn.Identity()):
        theirs, ours = resnet.BasicBlock(8, 8), nnfast.BasicBlock(8, 8)
        ours.load_state_dict(theirs.state_dict())
        theirs.relu = ours.relu = act
        for training in (True, False):
            theirs.train(training), ours.train(training)
            with torch.no_grad():
                assert_close(ours(image()), theirs(image()), rtol=1e-4, atol=1e-5)
    seen = []
    ours.relu.register_forward_hook(lambda *args: seen.append(args))
    ours(image())
    assert len(seen) == 2


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("size", [7, 30])
@pytest.mark.parametrize(
    "register", [torch_module.register_module_forward_pre_hook, torch_module.register_module_forward_hook]
)
def test_hooks_on_everything_see_every_call(pair, register, size, training):
    seen = []
    for block in (each.train(training) for each in pair):
        names = {module: name for name, module in block.named_modules()}
        with torch.no_grad():
            block(image(size=size))
            with register(lambda module, *_, names=names: seen[-1].append(names[module])):
                seen.append([])
                block(image(size=size))
    assert sorted(seen[1]) == sorted(seen[0])  # torchvision calls its shortcut last


def test_frozen_batch_norms():
    """Batch norms in eval mode inside a block that trains, and parameters without gradient."""
    theirs, ours = SeedBlock(8, 12, 2), nnfast.ResidualBlock(8, 12, 2)
    ours.load_state_dict(theirs.state_dict())
    for block in (theirs, ours):
        block.bn2.eval()
        block.bn1.weight.requires_grad_(False)
        block.shortcut[1].bias.requires_grad_(False)
        y = block(image())
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert_close(a.grad, b.grad, rtol=1e-3, atol=2e-3)
    assert_close(ours.state_dict(), theirs.state_dict())


def test_double_backward():
    x = image(dtype=torch.float64, size=3)[:2, :, :1, :2]
    for make in (lambda: nnfast.ResidualBlock(8, 3), lambda: nnfast.BasicBlock(8, 8)):
        block = make().double()
        leaf = x.clone().requires_grad_()
        assert torch.autograd.gradcheck(block, leaf)
        assert torch.autograd.gradgradcheck(block, leaf, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 8, 28, 28), (2, 64, 32, 32)])  # by torch's copy, and by our kernel
def test_double_backward_inside_in_channels_last(shape):
    """The gradients of a gradient go through the conversions, and through what is computed again."""
    theirs, ours = SeedBlock(shape[1], shape[1]), nnfast.ResidualBlock(shape[1], shape[1])
    ours.load_state_dict(theirs.state_dict())
    values, results = torch.randn(shape), []
    for block in (theirs, ours):
        x = values.clone().requires_grad_()
        (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), [block.conv1.weight, block.conv2.weight]))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max()))


@pytest.mark.parametrize("backend", [None, "cpu", "aten", "reference"], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "last"])
@pytest.mark.parametrize("size", [6, 30])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", ""])
@pytest.mark.parametrize("name", ["seed", "seed, projection", "Bottleneck"])
def test_checkpointing(name, reentrant, size, layout, backend):
    """The forward that is repeated in backward counts once, and gives the gradients there are without it."""
    torch.manual_seed(0)
    block = BLOCKS[name](ours=True)
    twin = copy.deepcopy(block)
    x, leaf = (image(layout, size=size).requires_grad_() for _ in range(2))
    with nnfast.backend(backend) if backend else nullcontext():
        for _ in range(2):
            y, again = twin(x), checkpoint(block, leaf, use_reentrant=reentrant)
            weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
            y.backward(weights)
            again.backward(weights)
    assert_close(again, y)
    assert_close(leaf.grad, x.grad)
    assert_close([p.grad for p in block.parameters()], [p.grad for p in twin.parameters()])
    assert_close(block.state_dict(), twin.state_dict())
    assert block.bn1.num_batches_tracked == 2


def test_an_input_changed_before_backward_is_noticed():
    block = nnfast.ResidualBlock(64, 64)
    x = torch.randn(2, 64, 32, 32, requires_grad=True)
    z = x * 1
    y = block(z)
    with torch.no_grad():
        z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_small_images_stay_contiguous():
    """oneDNN is slower in channels_last there; who is asked for it gives the same."""
    block = nnfast.ResidualBlock(8, 8)
    units = block._units()
    assert not blocks._pays_channels_last(units, image(size=7))
    assert not blocks._pays_channels_last(units, image(size=28))  # too few elements
    assert blocks._pays_channels_last(units, image(size=80))
    assert not blocks._pays_channels_last(units, image(CHANNELS_LAST))
    assert not blocks._pays_channels_last(units, image(dtype=torch.float64))
    strided = nnfast.ResidualBlock(16, 12, 2)
    units = [*strided._units(), *blocks._parts(strided.shortcut)]
    x = torch.randn(8, 16, 56, 56)
    assert not blocks._pays_channels_last(units, x.view(128, 16, 14, 14))
    assert blocks._pays_channels_last(units, x)


def test_few_channels_that_crash_onednn_stay_contiguous():
    """In channels_last the weight gradient of a strided 1x1 convolution of them does, at times."""
    strided = nnfast.ResidualBlock(8, 12, 2)
    units = [*strided._units(), *blocks._parts(strided.shortcut)]
    x = torch.randn(2, 8, 160, 160)
    assert not blocks._pays_channels_last(units, x)
    with torch.no_grad():
        assert blocks._pays_channels_last(units, x)


@pytest.mark.parametrize("act", ["identity", "relu", "leaky_relu", "silu", "mish"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_conv_bn_act(act, training):
    block = nnfast.ConvBNAct(8, 8, 3, 2, 1, bias=True, act=act).train(training)
    functional = copy.deepcopy(block)
    x, r = image(), torch.randn(4, 8, 15, 15)
    expected = functional.bn(functional.conv(x)) + r
    expected = {"leaky_relu": F.leaky_relu, "identity": lambda y: y}.get(act) or getattr(F, act)
    conv, bn = functional.conv, functional.bn
    bn.reset_running_stats()
    theirs = expected(F.batch_norm(F.conv2d(x, conv.weight, conv.bias, 2, 1), bn.running_mean.clone(),
                      bn.running_var.clone(), bn.weight, bn.bias, training) + r)  # fmt: skip
    assert_close(block(x, r), theirs, rtol=1e-4, atol=1e-5)
    ours = nnfast.functional.conv_bn_act(
        x, conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, training,
        stride=2, padding=1, act=act, residual=r,
    )  # fmt: skip
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_close(bn.running_mean, block.bn.running_mean)
    assert_close(bn.running_var, block.bn.running_var)


@pytest.mark.parametrize(("channels", "pixels"), [(8, 3), (1, 9)])
def test_a_result_of_both_formats_may_be_written_to(channels, pixels):
    """Of one pixel, or of one channel: contiguous and channels_last at once."""
    block = nnfast.ConvBNAct(16, channels, 3, stride=2, act="identity").eval()
    x = torch.randn(2, 16, pixels, pixels, requires_grad=True)
    torchs = block.bn(block.conv(x))
    found = [torch.autograd.grad(y.mul_(2).sum(), x)[0] for y in (block(x), torchs)]
    assert_close(*found)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_weights_in_channels_last(stride, training):
    """Which are contiguous too: the result is laid out as torch's."""
    block = nnfast.ConvBNAct(16, 16, 3, stride=stride, padding=1, groups=16).train(training)
    block = block.to(memory_format=CHANNELS_LAST)
    x = image()[:, :1].repeat(1, 16, 1, 1).contiguous().requires_grad_()
    assert block(x).stride() == torch.relu(block.bn(block.conv(x))).stride()


def test_one_value_per_channel_leaves_statistics():
    block = nnfast.ConvBNAct(8, 8, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        block(torch.randn(1, 8, 1, 1))
    with pytest.raises(ValueError, match="residual has shape"):
        block(torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 5))
    assert block.bn.num_batches_tracked == 0
    assert torch.equal(block.bn.running_mean, torch.zeros(8))


def test_constructors_refuse_as_torchvision():
    resnet = torchvision_resnet()
    for options in ({"groups": 2}, {"base_width": 32}, {"dilation": 2}):
        with pytest.raises((ValueError, NotImplementedError)) as theirs:
            resnet.BasicBlock(8, 8, **options)
        with pytest.raises(type(theirs.value), match=r"nnfast\.BasicBlock: "):
            nnfast.BasicBlock(8, 8, **options)
    with pytest.raises(ValueError, match="act is 'gelu'"):
        nnfast.ConvBNAct(8, 8, 1, act="gelu")
    assert "act='leaky_relu', negative_slope=0.1" in repr(
        nnfast.ConvBNAct(8, 8, 1, act="leaky_relu", negative_slope=0.1)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "last"])
def test_backward_twice_and_of_backward(layout):
    """conv2's input, computed again in backward, is there as often as it is asked for, and differentiable."""
    torch.manual_seed(0)
    theirs = SeedBlock(8, 8).double()
    ours = nnfast.ResidualBlock(8, 8).double()
    ours.load_state_dict(theirs.state_dict())

    def gradients(block: nn.Module) -> list[torch.Tensor]:
        x = image(layout, torch.float64, size=6).requires_grad_()
        weights = [p for p in block.parameters() if p.dim() == 4]
        y = block(x)
        grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        once = torch.autograd.grad(y, [x, *weights], grad, retain_graph=True)
        again = torch.autograd.grad(y, [x, *weights], grad, create_graph=True)
        assert_close(again, once)
        return [*once, *torch.autograd.grad(sum(g.square().sum() for g in again), [x, *weights])]

    with nnfast.backend("reference"):
        found = gradients(ours)
    assert_close(found, gradients(theirs))
