"""Blocks trained by our own convolutions: results, gradients, what is saved, who is asked."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import nnfast
from nnfast.conv_bn_act import blocks, links
from nnfast.convolution import winograd
from nnfast.convolution.op import CONV2D_ACT, with_statistics
from nnfast.core import extension
from nnfast.core.op import triton_why_not
from tests.conftest import DEVICES, ON_LAST_DEVICE
from tests.conv_bn_act.test_blocks import BLOCKS, CHANNELS_LAST, error, image, step

HERE = DEVICES[-1]
pytestmark = [
    pytest.mark.skipif(bool(triton_why_not(HERE)), reason="no GPU, and Triton's interpreter is off"),
    *ON_LAST_DEVICE,
]
OF_THE_CPU = pytest.mark.skipif(HERE != "cpu", reason="its words and its kernels are the CPU's")

OURS = sorted(BLOCKS.keys() - {"ResNeXt", "dilated"})


@pytest.fixture(autouse=True)
def _place():
    """On a GPU where there is one."""
    with torch.device(HERE):
        yield


@pytest.fixture
def calls(monkeypatch):
    """How often a chain was trained by our convolutions."""
    seen = []

    def train(*args):
        seen.append(args)
        return original(*args)

    original = links.train
    monkeypatch.setattr(links, "train", train)
    return seen


def both(name):
    torch.manual_seed(0)
    theirs, ours = (BLOCKS[name](which) for which in (False, True))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def steps(x: torch.Tensor) -> list[int]:
    """Strides where there is more than one place: the others of 1x1 weights' gradients differ by threads."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("name", BLOCKS)
def test_training_is_as_exact_as_torch(name, calls):
    theirs, ours = both(name)
    x = image(CHANNELS_LAST, size=7)
    truth, torchs = step(copy.deepcopy(theirs).double(), x.double()), step(theirs, x)
    with nnfast.backend("triton"):
        found = step(ours, x)
    assert len(calls) == (name in OURS)
    names = ["y", "x", *dict(theirs.named_parameters())]
    for what, t, a, b in zip(names, truth, found, torchs, strict=True):
        assert steps(a) == steps(b), what
        assert error(a, t) <= 2 * error(b, t) + 2e-6, what
    for (what, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(a, b, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(half, calls):
    theirs, ours = both("Bottleneck, projection")
    x = image(CHANNELS_LAST, half, size=6)
    truth = step(copy.deepcopy(theirs).double(), x.double())
    torchs = step(copy.deepcopy(theirs).to(half), x)
    with nnfast.backend("triton"):
        found = step(ours.to(half), x)
    assert calls
    for t, a, b in zip(truth, found, torchs, strict=True):
        assert float((a.double() - t).norm()) <= 2 * float((b.double() - t).norm()) + 1e-6 * float(t.norm())


def test_autocast(calls):
    theirs, ours = both("BasicBlock, projection")
    x = image(CHANNELS_LAST, size=6)
    results = []
    for block in (theirs, ours):
        with nnfast.backend("triton"), torch.autocast(HERE, torch.bfloat16):
            results.append(step(block, x))
    assert calls
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).norm()) <= 0.05 * float(b.norm())


@pytest.mark.parametrize(("act", "shortcut"), [("relu", ""), ("mish", "x"), ("relu", "projection")])
def test_backward_twice(act, shortcut, calls):
    """Gradients, and gradients of them, are torch's."""
    torch.manual_seed(0)
    kernel = 1 if shortcut == "x" else (2, 1)
    *units, projection = [
        blocks.Unit(nn.Conv2d(*sizes, bias=bias).double(), nn.BatchNorm2d(sizes[1]).double(), act)
        for sizes, bias in (((2, 3, 1), True), ((3, 2, kernel), False), ((2, 2, kernel), False))
    ]
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    used = units + [projection] * (shortcut == "projection")
    leaves = [x, *(p for unit in used for m in (unit.conv, unit.bn) for p in m.parameters())]
    results = []
    for backend in ("triton", "aten"):
        with nnfast.backend(backend):
            y = blocks.chain(
                units, x, x if shortcut == "x" else None, projection if shortcut == "projection" else None
            )
        first = torch.autograd.grad(y.square().sum() + y.sum(), leaves, create_graph=True)
        mixed = sum((g * torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in first)
        results.append([y, *first, *torch.autograd.grad(mixed, leaves)])
    assert len(calls) == 1
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-11)


class Additions(TorchDispatchMode):
    """Counts what adds two images."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += (
            function.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and args[0].dim() == 4
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OURS)
def test_the_shortcuts_gradient_takes_no_pass_of_its_own(name, calls):
    _, ours = both(name)
    counts = []
    for backend in ("triton", "aten"):
        x = image(CHANNELS_LAST, size=6).requires_grad_()
        with nnfast.backend(backend):
            y = ours(x)
        with Additions() as additions:
            y.sum().backward()
        counts.append(additions.count)
    assert calls
    assert counts[0] == 0 < counts[1]


def test_a_result_that_goes_nowhere_or_an_input_without_gradient():
    """Of what the first convolution gives, each part may be used without the other."""
    kernels = CONV2D_ACT.kernels
    x, weight = (
        torch.randn(size).contiguous(memory_format=CHANNELS_LAST) for size in ((2, 3, 5, 5), (4, 3, 1, 1))
    )
    assert with_statistics(kernels, x, weight.requires_grad_(), (1, 1), (0, 0))[2] is x
    y, _, again = with_statistics(kernels, x.requires_grad_(), weight, (1, 1), (0, 0))
    assert torch.equal(torch.autograd.grad(again.sum(), x, retain_graph=True)[0], torch.ones_like(x))
    alone = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert_close(alone, torch.autograd.grad(nn.functional.conv2d(x, weight).sum(), x)[0])
    assert_close(torch.autograd.grad(y.sum() + 3 * again.sum(), x)[0], alone + 3)


SAVED = {"seed": 3, "BasicBlock": 3, "Bottleneck": 4}


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved(name, calls):
    """The input and what each convolution makes; torch saves what each activation makes too."""
    theirs, ours = both(name)
    counts = []
    for block in (ours, theirs):
        saved = {}
        x = image(CHANNELS_LAST, size=6).requires_grad_()

        def keep(t, saved=saved):
            if t.dim() == 4 and t.shape[0] * t.shape[2:].numel() == 4 * 6 * 6:
                saved[t.data_ptr()] = t  # held, so that no other takes its place
            return t

        with nnfast.backend("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            block(x)
        counts.append(len(saved))
    assert calls
    assert counts == [SAVED[name], {3: 5, 4: 7}[SAVED[name]]]


def test_checkpointed_forward_counts_once(calls):
    _, plain = both("seed")
    _, repeated = both("seed")
    x = image(CHANNELS_LAST, size=5).requires_grad_()
    with nnfast.backend("triton"):
        plain(x).sum().backward()
        checkpoint(repeated, x, use_reentrant=False).sum().backward()
    assert len(calls) == 3
    assert_close(dict(repeated.named_buffers()), dict(plain.named_buffers()))
    for a, b in zip(plain.parameters(), repeated.parameters(), strict=True):
        assert_close(a.grad, b.grad)


def test_without_gradients(calls):
    theirs, ours = both("BasicBlock")
    x = image(CHANNELS_LAST, size=5)
    with torch.no_grad(), nnfast.backend("triton"):
        assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert calls
    assert_close(ours.state_dict(), theirs.state_dict())


def test_conv_bn_act_with_a_residual(calls):
    torch.manual_seed(0)
    module = nnfast.ConvBNAct(5, 6, 3, 2, 1, bias=True, act="leaky_relu", negative_slope=0.25)
    x, residual = (
        torch.randn(s).contiguous(memory_format=CHANNELS_LAST) for s in ((2, 5, 7, 7), (2, 6, 4, 4))
    )
    expected = module.act and nn.functional.leaky_relu(
        copy.deepcopy(module.bn)(module.conv(x)) + residual, 0.25
    )
    with nnfast.backend("triton"):
        assert_close(module(x, residual), expected, rtol=1e-4, atol=1e-5)
    assert calls
    with nnfast.backend("triton"), pytest.raises(ValueError, match="residual has shape"):
        module(x, residual[:1])
    with nnfast.backend("triton"), pytest.raises(RuntimeError, match="channels"):
        module(x[:, :4])


@pytest.mark.parametrize("name", ["seed, projection", "Bottleneck", "ResNeXt"])
def test_inference_folds_into_our_convolution(name, monkeypatch):
    theirs, ours = (block.eval().requires_grad_(False) for block in both(name))
    for block in (theirs, ours):
        for bn in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
            torch.manual_seed(1)
            bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
    found = []
    original = links.infer

    def infer(*args):
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(links, "infer", infer)
    x = image(CHANNELS_LAST, size=6)
    with nnfast.backend("triton"):
        assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert [y is None for y in found] == [name == "ResNeXt" and i == 1 for i in range(3)]


def test_not_forced_torchs_convolution_serves(calls):
    _, ours = both("BasicBlock")
    ours(image(CHANNELS_LAST, size=5))
    for backend in ("aten", "reference"):
        with nnfast.backend(backend):
            ours(image(CHANNELS_LAST, size=5))
    with nnfast.backend("triton"):
        ours(image(size=5))  # contiguous
    assert not calls


def of_ours(block, x):
    """What `explain` says of our convolutions on GPUs, and whether these train the chain or infer a unit."""
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train", "infer"):
            original = getattr(links, name)
            patch.setattr(links, name, lambda *a, f=original: ran.append(f(*a)) or ran[-1])
        block(x)
    reasons = nnfast.explain(block, x).reasons["conv2d_act"]
    return [r for r in reasons if ": cpu: " not in r], [y is not None for y in ran]


@OF_THE_CPU
def test_explain_tells_of_our_convolutions():
    """Never silent: it says whose the convolutions are, and why, as they then are."""
    block, x = nnfast.BasicBlock(8, 8), image(CHANNELS_LAST, size=6)
    assert of_ours(block, x) == (["conv1, conv2: triton: interpreted: for tests, not for speed"], [])
    few = "conv1, conv2: cpu: 8 channels; measured to pay from 32 on"
    assert few in nnfast.explain(block, x).reasons["conv2d_act"]
    with nnfast.backend("triton"):
        assert of_ours(block, x) == ([], [True])
        assert "conv2d_act serves" in str(nnfast.explain(block, x))
        reasons, ran = of_ours(block, x.contiguous())
        assert (reasons, ran) == (["conv1, conv2: triton: x is not laid out in torch.channels_last"], [])
        block.conv2.padding_mode = "circular"
        all_or_none = "conv1: in training ours serves all convolutions of a chain, or none"
        padding = "conv2: padding is (1, 1), by circular; our kernels take numbers, of zeros"
        assert of_ours(block, x) == ([all_or_none, padding], [])
        assert of_ours(block.eval().requires_grad_(False), x) == ([padding], [True, False])
        block.conv2.padding_mode = "zeros"
        found = nnfast.explain(block, x)
        assert (found.backend, found.reasons["triton"], found.reasons["conv2d_act"]) == ("triton", [], [])
        assert of_ours(block, x) == ([], [True, True])
        block.train().bn1.register_forward_hook(lambda *_: None)
        reasons, ran = of_ours(block, x)
        assert (reasons[0], ran) == ("conv1: bn has hooks, which a fused call would skip", [])
        block = nnfast.BasicBlock(8, 8)
        block.relu = nn.Hardswish()
        words = "conv1, conv2: the activation is another module, in training called as it is"
        assert of_ours(block, x) == ([words], [])


@OF_THE_CPU
@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["contiguous", "last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "make", [lambda: nnfast.ConvBNAct(64, 64, 3, padding=1), lambda: nnfast.ResidualBlock(64, 64)]
)
def test_explain_tells_of_winograds_convolution(make, training, layout, monkeypatch):
    """Of contiguous images too, which run inside in channels_last."""
    missing = extension.why_not(winograd.NAME, "CPU") or winograd.not_worth(
        torch.empty(4, 64, 32, 32), torch.empty(64, 64, 3, 3)
    )
    ran = []
    original = winograd._forward
    monkeypatch.setattr(winograd, "_forward", lambda *a: ran.append(a) or original(*a))
    block, x = make().train(training), torch.randn(4, 64, 32, 32).contiguous(memory_format=layout)
    with torch.set_grad_enabled(training):
        block(x)
        reasons = nnfast.explain(block, x).reasons["conv2d_act"]
    assert bool(ran) == (reasons == []) == (not missing)


@pytest.mark.parametrize("shape", [(1, 8, 28, 28), (2, 64, 32, 32)])
def test_many_gradients_at_once_inside_in_channels_last(shape):
    torch.manual_seed(0)
    block, x = nnfast.ResidualBlock(shape[1], shape[1]), torch.randn(shape, requires_grad=True)
    y, leaves = block(x), [x, block.conv1.weight, block.bn2.bias]
    upstream = torch.randn(3, *y.shape)
    together = torch.autograd.grad(y, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(upstream):
        alone = torch.autograd.grad(y, leaves, one, retain_graph=True)
        assert_close([t[i] for t in together], list(alone), rtol=1e-4, atol=1e-3)


def test_many_gradients_at_once(calls):
    """Batched, as `torch.autograd.functional.jacobian(vectorize=True)` asks for them."""
    torch.manual_seed(0)
    block = nnfast.ResidualBlock(2, 3).double()
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    with nnfast.backend("triton"):
        y = block(x)
    upstream = torch.randn(3, *y.shape, dtype=torch.float64)
    leaves = [x, *block.parameters()]
    together = torch.autograd.grad(y, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(upstream):
        alone = torch.autograd.grad(y, leaves, one, retain_graph=True)
        assert_close([t[i] for t in together], list(alone), rtol=1e-9, atol=1e-11)
    assert calls
