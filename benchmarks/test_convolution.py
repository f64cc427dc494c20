"""Our convolution on each of ResNet-50's layers against cuDNN's, and blocks made of it against torch.compile.

Forced on a GPU, as nothing is measured there yet. On the CPU the images are tiny and torch's serves; what is
ours there, 3x3 at stride 1, has cases of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import nnfast
from benchmarks.cost_model import RESNET50, Layer
from benchmarks.runner import Result, compare, rotation
from nnfast.convolution.op import CONV2D_ACT, with_statistics
from tests.conv_bn_act.test_blocks import SeedBlock

CUDA = torch.cuda.is_available()
BATCH, DTYPE, BACKEND = (256, torch.bfloat16, "triton") if CUDA else (2, torch.float32, "aten")
LAST = torch.channels_last
LAYERS = {x.name: x for x in RESNET50}
DIRECTIONS = ("forward+statistics", "forward+residual", "backward")
QUICK = "conv2 3x3 64"


def targets(name: str, direction: str) -> dict[str, float]:
    """What is promised on a GPU."""
    if not CUDA or name != QUICK:
        return {}
    return {"forward+statistics": {"torch": 1.0}, "forward+residual": {"cudnn": 1.0}}.get(direction, {})


def scaled(layer: Layer) -> tuple[int, int, int]:
    """Channels, channels made and pixels of a side of the input; on the CPU an eighth of each."""
    part = 1 if CUDA else 8
    numbers = (layer.channels, layer.out_channels, layer.size * layer.stride)
    return tuple(max(n // part, layer.kernel) for n in numbers)  # type: ignore[return-value]


def served(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with ours forced on a GPU; on the CPU the ordinary choice."""
    if not CUDA:
        return function

    def run(*args: Any) -> Any:
        with nnfast.backend(BACKEND):
            return function(*args)

    return run


def functions(layer: Layer, direction: str, weight: Tensor, bias: Tensor) -> dict[str, Callable[[Any], Any]]:
    """Name -> function of (x, residual)."""
    stride, padding = (layer.stride,) * 2, (layer.kernel // 2,) * 2

    def ours(pair: tuple[Tensor, Tensor]) -> Any:
        return nnfast.functional.conv2d_act(
            pair[0], weight, bias, stride, padding, act="relu", residual=pair[1]
        )

    def bare(pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.conv2d(pair[0], weight, None, stride, padding)

    def fused(pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cudnn_convolution_add_relu(
            pair[0], weight, pair[1], 1.0, bias.to(DTYPE), stride, padding, (1, 1), 1
        )

    def separate(pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.relu(F.conv2d(pair[0], weight, bias.to(DTYPE), stride, padding) + pair[1])

    def gradients(function: Callable[[Any], Tensor]) -> Callable[[Any], Any]:
        def run(pair: tuple[Tensor, Tensor]) -> Any:
            return torch.autograd.grad(function(pair), [pair[0], weight], pair[1])

        return run

    def convolved(pair: tuple[Tensor, Tensor]) -> Tensor:
        return nnfast.functional.conv2d_act(pair[0], weight, None, stride, padding)

    def counted(pair: tuple[Tensor, Tensor]) -> Tensor:
        return (
            with_statistics(CONV2D_ACT.kernels, pair[0], weight, stride, padding)[0] if CUDA else bare(pair)
        )

    if direction == "forward+statistics":
        return {"nnfast": counted, "torch": bare}
    if direction == "backward":
        return {"nnfast": served(gradients(convolved)), "torch": gradients(bare)}
    found = {"nnfast": served(ours), "torch": separate}
    return found | ({"cudnn": fused} if CUDA else {})


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, direction, device, quick, benchmark, record):
    if quick and name != QUICK:
        pytest.skip("one layer is enough where it is to be quick")
    layer, grad = LAYERS[name], direction == "backward"
    channels, out_channels, size = scaled(layer)
    torch.manual_seed(0)
    kernel = (layer.kernel, layer.kernel)
    weight = torch.randn(out_channels, channels, *kernel, device=device) / (channels * layer.kernel**2) ** 0.5
    weight = weight.to(DTYPE).contiguous(memory_format=LAST).requires_grad_(grad)
    bias = torch.randn(out_channels, device=device)
    out_size = (size + 2 * (layer.kernel // 2) - layer.kernel) // layer.stride + 1

    def make() -> tuple[Tensor, Tensor]:
        x, residual = (
            torch.randn(BATCH, c, s, s, device=device).to(DTYPE).contiguous(memory_format=LAST)
            for c, s in ((channels, size), (out_channels, out_size))
        )
        return x.requires_grad_(grad), residual

    contenders = functions(layer, direction, weight, bias)
    pair = make()
    truth = contenders["torch"](pair)
    for run in contenders.values():
        found = run(pair)
        for a, b in zip(found, truth, strict=True) if grad else [(found, truth)]:
            assert_close(
                a / b.abs().max(), b / b.abs().max(), rtol=0, atol=2e-2 if DTYPE.itemsize == 2 else 1e-4
            )
    elements = pair[0].numel() + pair[1].numel() * (2 if direction == "forward+residual" else 1)
    moved = elements * DTYPE.itemsize * (3 if grad else 1)
    with torch.set_grad_enabled(grad):
        seconds = compare(
            contenders, rotation(make, moved, device), device, 0.5 if quick or not CUDA else 2.0
        )
    record(
        Result(
            family="convolution",
            op="conv2d_act",
            case=f"{name} {direction}",
            direction=direction,
            dtype=str(DTYPE).removeprefix("torch."),
            numel=pair[0].numel(),
            backend=BACKEND,
            seconds=seconds,
            bytes=moved,
            flops=2 * pair[1].numel() * channels * layer.kernel**2 * (3 if grad else 1),
            targets=targets(name, direction),
        ),
        benchmark,
    )
    benchmark.pedantic(contenders["nnfast"], args=(pair,), rounds=3, warmup_rounds=1)


@pytest.mark.skipif(CUDA, reason="a convolution of the CPU")
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", [(64, 56), (128, 28), (256, 14), (512, 7)], ids=str)
def test_winograd(shape, direction, device, quick, benchmark, record):
    """3x3 at stride 1 through the ordinary choice, against torch's."""
    (channels, size), grad = shape, direction != "forward"
    torch.manual_seed(0)
    weight = (torch.randn(channels, channels, 3, 3) / (3 * channels**0.5)).requires_grad_(grad)

    def make() -> tuple[Tensor, Tensor]:
        x, upstream = (torch.randn(8, channels, size, size).contiguous(memory_format=LAST) for _ in range(2))
        return x.requires_grad_(grad), upstream

    def both(function: Callable[..., Tensor]) -> Callable[[Any], Any]:
        def run(pair: tuple[Tensor, Tensor]) -> Any:
            y = function(pair[0], weight, None, 1, 1)
            return torch.autograd.grad(y, [pair[0], weight], pair[1]) if grad else y

        return run

    contenders = {"nnfast": both(nnfast.functional.conv2d_act), "torch": both(F.conv2d)}
    pair = make()
    found, truth = (contenders[name](pair) for name in ("nnfast", "torch"))
    for a, b in zip(found, truth, strict=True) if grad else [(found, truth)]:
        assert_close(a / b.abs().max(), b / b.abs().max(), rtol=0, atol=1e-5)
    seconds = compare(contenders, [pair], device, 0.5 if quick else 2.0)
    moved = (2 * pair[0].nbytes + weight.nbytes) * (3 if grad else 1)
    record(
        Result(
            family="convolution",
            op="conv2d_act",
            case=f"3x3 {channels} at {size}x{size} {direction}",
            direction=direction,
            dtype="float32",
            numel=pair[0].numel(),
            backend=nnfast.explain("conv2d_act", pair[0], weight, None, 1, 1).backend or "",
            seconds=seconds,
            bytes=moved,
            flops=2 * pair[0].numel() * channels * 9 * (3 if grad else 1),
        ),
        benchmark,
    )
    benchmark.pedantic(contenders["nnfast"], args=(pair,), rounds=3, warmup_rounds=1)


BLOCKS = {(64, 56): 1.3, (128, 28): 1.1, (256, 14): 0.0, (512, 7): 0.0} if CUDA else {(8, 7): 0.0}
"""Channels and pixels of a side of a basic block -> least ratio of torch.compile's time in training."""


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_block_training(shape, device, quick, benchmark, record):
    if quick and shape != next(iter(BLOCKS)):
        pytest.skip("one block is enough where it is to be quick")
    torch._dynamo.reset()
    channels, size = shape
    torch.manual_seed(0)
    theirs, ours = SeedBlock(channels, channels), nnfast.ResidualBlock(channels, channels)
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = (m.to(device, DTYPE, memory_format=LAST) for m in (theirs, ours))

    def step(model: torch.nn.Module) -> Callable[[Any], Any]:
        parameters = list(model.parameters())

        def run(pair: tuple[Tensor, Tensor]) -> Any:
            return torch.autograd.grad(model(pair[0]), [pair[0], *parameters], pair[1])

        return run

    contenders = {"nnfast": served(step(ours)), "seed": step(theirs), "passes": step(copy.deepcopy(ours))}
    contenders["compile"] = step(torch.compile(copy.deepcopy(theirs)))

    def make() -> tuple[Tensor, Tensor]:
        x, grad = (
            torch.randn(BATCH, channels, size, size, device=device).to(DTYPE).contiguous(memory_format=LAST)
            for _ in range(2)
        )
        return x.requires_grad_(), grad

    pair = make()
    truth = contenders["seed"](pair)[0]
    for run in contenders.values():
        scale = float(truth.abs().max())
        assert_close(run(pair)[0] / scale, truth / scale, rtol=0, atol=3e-2 if DTYPE.itemsize == 2 else 1e-4)
    moved = 4 * pair[0].numel() * DTYPE.itemsize
    seconds = compare(contenders, rotation(make, moved, device), device, 0.5 if quick or not CUDA else 4.0)
    least = BLOCKS[shape]
    record(
        Result(
            family="convolution",
            op="conv_bn_act",
            case=f"block {channels} at {size}x{size} training by our convolution",
            direction="forward+backward",
            dtype=str(DTYPE).removeprefix("torch."),
            numel=pair[0].numel(),
            backend=BACKEND,
            seconds=seconds,
            bytes=moved,
            flops=3 * 2 * 2 * pair[0].numel() * channels * 9,
            targets={"compile": least} if least else {},
        ),
        benchmark,
    )
    benchmark.pedantic(contenders["nnfast"], args=(pair,), rounds=3, warmup_rounds=1)
