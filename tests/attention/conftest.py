"""Fixtures that several files of attention's tests share."""

from __future__ import annotations

import pytest

import nnfast
from nnfast.attention import kernels
from nnfast.core import extension
from nnfast.core.op import triton_why_not
from nnfast.core.tuning import AttentionConfig

SQUARE = AttentionConfig(16, 16, 4, 2)
TALL = AttentionConfig(32, 16, 4, 2)
FLAT = AttentionConfig(16, 32, 4, 2)


@pytest.fixture
def in_compiled(device):
    """Calls run in the compiled CPU kernels."""
    if device != "cpu" or (missing := extension.why_not("attention.cpu", "CPU")):
        pytest.skip(missing if device == "cpu" else "on the CPU alone")
    with nnfast.backend("cpu"):
        yield


@pytest.fixture
def in_triton(monkeypatch, device):
    """Calls run there, in tiles of a given size and with or without the copy engine's descriptors."""
    if missing := triton_why_not(device):
        pytest.skip(missing)

    def configure(config: AttentionConfig = SQUARE, arch: str = "sm_80") -> None:
        monkeypatch.setattr(kernels, "attention_config", lambda *_: config)
        if device == "cpu":
            monkeypatch.setattr(kernels, "architecture", lambda _: arch)

    configure()
    with nnfast.backend("triton"):
        yield configure


@pytest.fixture(params=["triton", "cpu"])
def in_kernels(request):
    """Calls run in Triton, as above, or in the compiled CPU kernels."""
    if request.param == "triton":
        yield request.getfixturevalue("in_triton")
        return
    request.getfixturevalue("in_compiled")
    yield lambda *_: None
