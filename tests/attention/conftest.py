"""Fixtures that several files of attention's tests share."""

from __future__ import annotations

import pytest

import nnfast
from nnfast.core import extension


@pytest.fixture
def in_compiled(device):
    """Calls run in the compiled CPU kernels."""
    if device != "cpu" or (missing := extension.why_not("attention.cpu", "CPU")):
        pytest.skip(missing if device == "cpu" else "on the CPU alone")
    with nnfast.backend("cpu"):
        yield
