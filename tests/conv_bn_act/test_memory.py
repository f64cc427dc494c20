"""Memory that a training step of a residual block takes at its most, against the seed's block."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import nnfast
from nnfast.core import extension
from tests.conv_bn_act.test_blocks import SeedBlock

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def peak(block: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> int:
    """Most bytes that a forward and backward have allocated at once, the result and gradients included."""

    def step() -> None:
        torch.autograd.grad(block(x), [x, *block.parameters()], grad)

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    now = most = 0
    events = found.profiler.kineto_results.events()  # in the order of time
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.skipif(
    bool(extension.why_not("batch_norm_act", "CPU")), reason="nothing of ours is compiled for the CPU"
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 64, 1, 56), (64, 128, 2, 56)], ids=str)
def test_training_takes_three_quarters_of_the_seeds_memory(shape, layout):
    channels, out, stride, size = shape
    ours, theirs = (
        block(channels, out, stride).to(memory_format=LAYOUTS[layout])
        for block in (nnfast.ResidualBlock, SeedBlock)
    )
    x = torch.randn(8, channels, size, size).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    y = torch.randn(8, out, size // stride, size // stride).contiguous(memory_format=LAYOUTS[layout])
    most, seeds = peak(ours, x, y), peak(theirs, x, y)
    assert seeds > 6 * y.nbytes  # the profiler saw them
    assert most <= 0.75 * seeds, f"{most / y.nbytes:.2f} results, the seed's {seeds / y.nbytes:.2f}"
