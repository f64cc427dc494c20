"""Tools of torch's that look into modules: jit.trace, fx, the meta device.

torch.jit.trace records torch's own operators alone: graphs have gradients, and need no nnfast.
"""

from __future__ import annotations

import copy
import importlib
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import nnfast
import nnfast.functional as ours

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


class OfItself(nn.Module):
    """Attention of a tensor over itself, without weights."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def swapped(model: nn.Module) -> nn.Module:
    """A model and what nnfast makes of it."""
    nnfast.swap(model)
    return model


def efficientnet() -> nn.Module:
    importlib.import_module("tests.torchvision_operators")
    torchvision = pytest.importorskip("torchvision")
    return swapped(torchvision.models.efficientnet_b0())


LARGE = (64, 4096)  # for our kernels in any case
HEADS = [(2, 4, 300, 64)] * 3
IMAGE = (4, 64, 28, 28)
FEW = (512, 1000)
CASES = {
    "silu": (lambda: nnfast.SiLU(), [LARGE]),
    "silu of a size at which only training is ours": (lambda: nnfast.SiLU(), [(64, 1024)]),
    "mish": (lambda: nnfast.Mish(), [LARGE]),
    "attention": (lambda: Function(ours.attention), HEADS),
    "attention, window": (lambda: Function(lambda *x: ours.attention(*x, is_causal=True, window=20)), HEADS),
    "attention, softcap": (lambda: Function(lambda *x: ours.attention(*x, softcap=5.0)), HEADS),
    "focal loss": (lambda: nnfast.FocalLoss(), [FEW, 1000]),
    "sigmoid focal loss": (lambda: nnfast.SigmoidFocalLoss(), [FEW, FEW]),
    "linear focal loss": (lambda: nnfast.LinearFocalLoss(64, 100), [(512, 64), 100]),
    "batch norm": (lambda: nnfast.BatchNormAct2d(64), [IMAGE]),
    "convolution": (lambda: nnfast.Conv2dAct(64, 64, 3, padding=1), [IMAGE]),
    "block": (lambda: nnfast.ResidualBlock(64, 64), [IMAGE]),
    "rotary": (lambda: Function(lambda x: nnfast.RotaryEmbedding(64)(x, x)[0]), [(2, 4, 512, 64)]),
    "self-attention": (lambda: nnfast.SelfAttention(512, 8), [(2, 300, 512)] * 3),
    "multihead attention": (
        lambda: OfItself(nnfast.MultiheadAttention(512, 8, batch_first=True)),
        [(2, 300, 512)],
    ),
    "positions": (lambda: nnfast.SinusoidalPositionalEncoding(512), [(2, 300, 512)]),
    "conv, norm, act": (lambda: nnfast.ConvBNAct(64, 64, 3), [IMAGE]),
    "swapped": (lambda: swapped(nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.SiLU())), [IMAGE]),
    "efficientnet": (efficientnet, [(2, 3, 64, 64)]),
}


@pytest.mark.parametrize("name", CASES)
def test_graphs_are_torchs(name):
    make, shapes = CASES[name]
    torch.manual_seed(0)
    module = make().eval()
    x = torch.randn(shapes[0])
    others = [
        torch.randint(0, shape, x.shape[:1]) if isinstance(shape, int) else torch.randn(shape).sigmoid()
        for shape in shapes[1:]
    ]
    traced = torch.jit.trace(copy.deepcopy(module), (x, *others))  # and once more, without gradients
    assert not re.findall(r"nnfast::\w+|\^\w+|mkldnn::\w+", str(traced.inlined_graph))
    results = []
    for call in (traced, module):
        leaf = x.flip(0).requires_grad_()
        y = call(leaf, *others)
        results.append([y, *torch.autograd.grad(y.sum(), [leaf, *call.parameters()])])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.detach().abs().max()) + 1e-6)


# In a graph of torch's own encoder layer, too, there is another path with than without gradients.
ON_META = CASES | {
    "encoder layer": (
        lambda: swapped(nn.TransformerEncoderLayer(512, 8, dropout=0.0, batch_first=True)),
        [(2, 300, 512)],
    )
}


@pytest.mark.parametrize("name", ON_META)
@pytest.mark.parametrize("training", [False, True])
def test_meta_device(name, training):
    """Shapes without values, as for models that are made before their weights are loaded."""
    make, shapes = ON_META[name]
    module = make().train(training).to("meta")
    x = torch.randn(shapes[0], device="meta")
    others = [
        torch.zeros(x.shape[:1], dtype=torch.int64, device="meta")
        if isinstance(shape, int)
        else torch.randn(shape, device="meta")
        for shape in shapes[1:]
    ]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert module(x, *others).is_meta


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
def test_fx_does_not_look_into_attention(kind):
    """Nor into torch's own: so feature extractors of torchvision and timm work."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = kind(16, 2, batch_first=True)

        def forward(self, x):
            if kind is nn.TransformerEncoderLayer:
                return self.inner(x, src_key_padding_mask=None)
            y, _ = self.inner(x, x, value=x, need_weights=False)
            return y

    torch.manual_seed(0)
    model = Model().eval()
    x = torch.randn(2, 300, 16)
    expected = model(x)
    assert nnfast.swap(model).replaced
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["inner"]
    assert_close(graph(x), expected, rtol=1e-4, atol=1e-5)


def test_multihead_attention():
    """torch's own graph differs with gradients and without, and so do ours."""
    module = nnfast.MultiheadAttention(512, 8, batch_first=True).eval()
    model = Function(lambda x: module(x, x, x, need_weights=False)[0])
    model.inner = module
    x = torch.randn(4, 300, 512)
    traced = torch.jit.trace(model, x, check_trace=False)
    assert "nnfast" not in re.findall(r"(\w+)::", str(traced.inlined_graph))
    assert_close(traced(x + 1), model(x + 1), rtol=1e-4, atol=1e-5)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.grad(traced(leaf).sum(), leaf)[0].abs().max() > 0


def test_said():
    """What explain says while a graph is recorded; a forced kernel refuses."""
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(nnfast.explain("silu", x))
        return F.relu(x)

    torch.jit.trace(function, torch.randn(LARGE), check_trace=False)
    assert seen[0].backend == "aten"
    assert "torch.jit.trace is recording" in seen[0].reasons["cpu"][0]
    with nnfast.backend("cpu"), pytest.raises(nnfast.BackendError, match=r"torch.jit.trace is recording"):
        torch.jit.trace(ours.silu, torch.randn(LARGE))
