"""Residual blocks, ConvBNAct and batch norm + residual + relu against the seed's formulation and torch.

Of batch norm on CUDA also our kernels where they are not what serves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import nnfast
from benchmarks.runner import Result, compare, forced, rotation
from nnfast.core.op import OPS
from tests.conv_bn_act.test_blocks import SeedBlock

CUDA = torch.cuda.is_available()
BLOCKS = [(64, 64, 1, 56), (64, 128, 2, 56), (256, 256, 1, 14)]
BATCH, DTYPE = (256, torch.bfloat16) if CUDA else (8, torch.float32)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TRAINING = {(64, 64, 1, 56): 1.25, (64, 128, 2, 56): 1.15, (256, 256, 1, 14): 1.15}


def targets(shape: tuple[int, int, int, int], direction: str, layout: str) -> dict[str, float]:
    """What is promised for a block on this machine."""
    training = direction != "forward"
    if not CUDA:
        least = TRAINING[shape] if training else 1.0
        return {"compile": least, "channels_last": least, "seed": least if training else 1.2}
    if layout != "channels_last":
        return {}
    first = shape == BLOCKS[0]
    if training:
        return {"seed": 1.4, "compile": 1.14} if first else {"compile": 1.05}
    return {"seed": 2.2, "compile": 1.5} if first else {}


class SeedUnit(nn.Module):
    """A convolution, batch norm, residual and relu, as they are written."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def flops(model: nn.Module, x: Tensor) -> int:
    """Floating-point operations of the convolutions of a forward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops())


def contenders(
    theirs: nn.Module, ours: nn.Module, training: bool, layout: torch.memory_format
) -> dict[str, Callable[[Any], Any]]:
    """Name -> forward of x, or forward and backward of (x, upstream gradient)."""
    models = {"nnfast": ours, "seed": theirs, "compile": torch.compile(copy.deepcopy(theirs))}
    if layout is torch.contiguous_format:
        models["channels_last"] = copy.deepcopy(theirs).to(memory_format=torch.channels_last)

    def step(model: nn.Module) -> Callable[[Any], Any]:
        parameters = list(model.parameters())

        def run(pair: tuple[Tensor, Tensor]) -> Any:
            x, grad = pair
            return torch.autograd.grad(model(x), [x, *parameters], grad)

        return run

    def infer(model: nn.Module) -> Callable[[Any], Any]:
        def run(x: Tensor) -> Any:
            with torch.no_grad():
                return model(x)

        return run

    return {name: (step if training else infer)(model) for name, model in models.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", [*BLOCKS, "ConvBNAct"], ids=str)
def test_blocks(shape, direction, layout, device, quick, benchmark, record):
    training = direction != "forward"
    if quick and (shape, layout) != (BLOCKS[0], "channels_last"):
        pytest.skip("not in --quick")
    torch._dynamo.reset()
    torch.manual_seed(0)
    if shape == "ConvBNAct":
        channels, out, stride, size = 64, 64, 1, 56
        theirs, ours = SeedUnit(64), nnfast.ConvBNAct(64, 64, 3, padding=1)
        name = "ConvBNAct 64->64 at 56x56"
    else:
        channels, out, stride, size = shape
        theirs, ours = SeedBlock(channels, out, stride), nnfast.ResidualBlock(channels, out, stride)
        name = f"block {channels}->{out}{f' stride {stride}' * (stride > 1)} at {size}x{size}"
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = (
        m.to(device, DTYPE, memory_format=LAYOUTS[layout]).train(training) for m in (theirs, ours)
    )

    def image(c: int, s: int) -> Tensor:
        return torch.randn(BATCH, c, s, s, device=device).to(DTYPE).contiguous(memory_format=LAYOUTS[layout])

    def make() -> Any:
        x = image(channels, size)
        return (x.requires_grad_(), image(out, size // stride)) if training else x

    x = make()
    functions = contenders(theirs, ours, training, LAYOUTS[layout])
    with inductor.patch(freezing=not training):  # asked at the first call, which compiles
        results = {key: run(x) for key, run in functions.items()}
    truth = results["seed"][0] if training else results["seed"]
    for found in results.values():
        given = found[0] if training else found
        scale = float(truth.abs().max())
        off = (given - truth).abs() > scale * (2e-2 if DTYPE.itemsize == 2 else 1e-4)
        assert off.float().mean() < 2e-3 * training + 1e-9  # rounding moves a few elements across relu's kink
    source = x[0] if training else x
    elements = source.numel() + truth.numel() if not training else 2 * (source.numel() + x[1].numel())
    seconds = compare(
        functions, rotation(make, elements * DTYPE.itemsize, device), device, 1.0 if quick else 4.0
    )
    with torch.set_grad_enabled(training):
        backend = nnfast.explain(ours, source).backend or ""
    record(
        Result(
            family="conv_bn_act",
            op="conv_bn_act",
            case=f"{name} {'training' if training else 'inference'} {layout}",
            direction=direction,
            dtype=str(DTYPE).removeprefix("torch."),
            numel=source.numel(),
            backend=backend,
            seconds=seconds,
            bytes=elements * DTYPE.itemsize,
            flops=flops(theirs, source.detach()) * (3 if training else 1),
            targets={} if shape == "ConvBNAct" else _present(targets(shape, direction, layout), seconds),
        ),
        benchmark,
    )
    benchmark.pedantic(functions["nnfast"], args=(x,), rounds=5, warmup_rounds=1)


def _present(promised: dict[str, float], seconds: dict[str, float]) -> dict[str, float]:
    return {name: least for name, least in promised.items() if name in seconds}


NORMS = [(64, 56), (128, 28), (256, 14), (512, 7)]
"""Channels and pixels of a side."""


def _seed_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    return F.relu(F.batch_norm(x, mean, var, weight, bias, True) + residual)


def _our_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return nnfast.functional.batch_norm_act(x, mean, var, weight, bias, True, residual=residual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_batch_norm_act(shape, direction, layout, device, quick, benchmark, record):
    if quick and (shape, layout) != (NORMS[0], "channels_last"):
        pytest.skip("not in --quick")
    torch._dynamo.reset()
    grad, (channels, size) = direction != "forward", shape

    def image() -> Tensor:
        x = torch.randn(BATCH, channels, size, size, device=device).to(DTYPE)
        return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_(grad)

    parameters = [torch.ones(channels, device=device, requires_grad=grad) for _ in range(2)]
    running = [torch.zeros(channels, device=device), torch.ones(channels, device=device)]

    def both(function: Callable[..., Tensor]) -> Callable[[Any], Any]:
        def run(inputs: tuple[Tensor, Tensor, Tensor]) -> Any:
            x, residual, upstream = inputs
            y = function(x, residual, *parameters, *running)
            return torch.autograd.grad(y, [x, residual, *parameters], upstream) if grad else y

        return run

    functions = {
        "nnfast": both(_our_norm),
        "seed": both(_seed_norm),
        "compile": both(torch.compile(_seed_norm, fullgraph=True)),
    }
    inputs = (image(), image(), image().detach())
    given = OPS["batch_norm_act"].arguments(inputs[0], *running, *parameters, True, residual=inputs[1])
    explanation = OPS["batch_norm_act"].explain(*given)
    for backend in OPS["batch_norm_act"].backends:
        ours = backend.name in ("cuda", "triton") and backend.name != explanation.backend
        if CUDA and ours and not backend.why_not(*given):
            functions[backend.name] = both(forced(_our_norm, backend.name))
    truth = functions["seed"](inputs)
    for run in functions.values():
        assert_close(run(inputs), truth, rtol=2e-2, atol=2e-2 if DTYPE.itemsize == 2 else 1e-2)
    passes = 9 if grad else 4
    moved = passes * inputs[0].numel() * DTYPE.itemsize
    seconds = compare(
        functions, rotation(lambda: (image(), image(), image().detach()), moved, device), device, 1.0
    )
    record(
        Result(
            family="conv_bn_act",
            op="batch_norm_act",
            case=f"batch norm + add + relu {direction} {channels} at {size}x{size} {layout}",
            direction=direction,
            dtype=str(DTYPE).removeprefix("torch."),
            numel=inputs[0].numel(),
            backend=explanation.backend or "",
            seconds=seconds,
            bytes=moved,
            flops=inputs[0].numel() * (20 if grad else 8),
        ),
        benchmark,
    )
    benchmark.pedantic(functions["nnfast"], args=(inputs,), rounds=5, warmup_rounds=1)
