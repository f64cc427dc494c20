"""Images brought into the other memory format by our own kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from nnfast.conv_bn_act import op
from nnfast.core import extension

LAST = torch.channels_last
SHAPES = [
    (2, 64, 8, 8),
    (3, 70, 7, 9),
    (1, 5, 20, 11),
    (2, 16, 1, 16),
    (1, 1, 3, 3),
    (2, 33, 4, 1),
    (0, 4, 3, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways_give_what_torch_gives(shape):
    x = torch.randn(shape)
    last = x.clone(memory_format=LAST)
    for found, wanted in ((op._layout(x, True), last), (op._layout(last, False), x)):
        assert torch.equal(found, wanted)
        strides = [
            [step for step, size in zip(t.stride(), shape, strict=True) if size > 1] for t in (found, wanted)
        ]
        assert strides[0] == strides[1]
        assert found.data_ptr() not in (x.data_ptr(), last.data_ptr()) or not x.numel()


def test_opcheck():
    torch.library.opcheck(op._layout, (torch.randn(2, 5, 3, 4), True))
    torch.library.opcheck(op._layout, (torch.randn(2, 5, 3, 4).contiguous(memory_format=LAST), False))


def test_small_or_other_images_are_torchs():
    for x in (torch.randn(2, 3, 4, 4), torch.randn(8, 64, 16, 16, dtype=torch.float64)):
        found = op.in_layout(x, channels_last=True)
        assert found.is_contiguous(memory_format=LAST)
        assert torch.equal(found, x)
    large = torch.randn(8, 64, 16, 16)
    strided = large[:, ::2]
    assert op.in_layout(large, channels_last=False) is large
    assert torch.equal(op.in_layout(strided, channels_last=True), strided)


@pytest.mark.skipif(
    bool(extension.why_not(op.LAYOUT, "CPU")), reason="nothing of ours is compiled for the CPU"
)
def test_refuses_what_it_cannot_read():
    with pytest.raises(RuntimeError, match="image_layout: x has dtype Double"):
        op._layout(torch.randn(2, 3, 4, 5, dtype=torch.float64), True)
    with pytest.raises(RuntimeError, match="channels last"):
        op._layout(torch.randn(2, 3, 4, 5), False)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_instruction_sets(isa):
    if os.environ.get("NNFAST_CPU_ISA"):
        pytest.skip("run by this test itself")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "both_ways", __file__]
    environment = {**os.environ, "NNFAST_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
